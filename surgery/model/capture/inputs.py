"""How transformers models are called at capture: main inputs, their axes, and sizes that trace well."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.model.capture.flatcall import Axes, Call, filled_cache

BATCH, LENGTH, TARGET, PAST = 2, 12, 7, 8
QUERY = 3  # new tokens of a causal model; differs from every other size, so that no two sizes are taken for one


def hf_call(model: Any, past: bool = True) -> Call:
    """Meta inputs for a transformers model, from its class, its ``forward`` and its config; without ``past`` a causal one gets no cache.

    Text: ids, mask and, where taken, token types; encoder-decoders their decoder ids and mask too; causal models get a
    filled cache, so that one graph serves prefill, decoding and padding. Vision and audio models get their features.
    Raises S0505 for a model whose main input is none of these.
    """
    config = model.config
    taken = inspect.signature(type(model).forward).parameters
    values: dict[str, Any] = {}
    axes: dict[str, Axes] = {}
    constants: dict[str, Any] = {}

    def ids(name: str, length: int, size: str, rows: int = 1) -> None:
        if name in taken:
            values[name] = torch.ones(BATCH * rows, length, dtype=torch.long, device="meta")
            axes[name] = {0: f"{rows}*batch" if rows > 1 else "batch", 1: size}

    causal = past and _is_causal(model, taken) and not other_states(model.config)
    both = bool(getattr(config, "is_encoder_decoder", False)) and "decoder_input_ids" in taken
    features = _features(model, taken)
    if ("input_ids" in taken and features is None) or ("pixel_values" in taken and "input_ids" in taken):
        text = getattr(config, "text_config", None) or config
        longest = getattr(text, "max_position_embeddings", None) or LENGTH
        longest = longest if isinstance(longest, int) and longest > 0 else LENGTH  # XLNet says -1: no limit
        length = min(LENGTH, longest)
        while any(length % whole == 0 for whole in _blocks(text)):
            length += 1
        books = _codebooks(model)
        if causal:
            ids("input_ids", QUERY, "query", books)
            values["attention_mask"] = torch.ones(BATCH, QUERY + PAST, dtype=torch.long, device="meta")
            axes["attention_mask"] = {0: "batch", 1: "query+past"}
            if "position_ids" in taken and _learned_positions(model):
                values["position_ids"] = torch.ones(BATCH, QUERY, dtype=torch.long, device="meta")
                axes["position_ids"] = {0: "batch", 1: "query"}
            _cache(model, values, axes)
            constants["use_cache"] = True
        else:
            ids("input_ids", length, "sequence", books)
            ids("attention_mask", length, "sequence")
            if (getattr(text, "type_vocab_size", 0) or 0) > 1:
                ids("token_type_ids", length, "sequence")
    if features is not None:
        name, tensor, feature_axes = features
        values[name] = tensor
        axes[name] = feature_axes
        if name != "pixel_values" and "attention_mask" in taken and 1 in feature_axes:
            ids("attention_mask", tensor.shape[1], feature_axes[1])
    if both:
        ids("decoder_input_ids", TARGET, "target")
        ids("decoder_attention_mask", TARGET, "target")
    if not values:
        raise fail(
            "S0505", f"the inputs of {type(model).__name__} are not known",
            notes=["its forward takes " + ", ".join(n for n in taken if n != "self")],
            help="capture it from Python with example inputs: surgery.capture(module, inputs)",
        )  # fmt: skip
    # some pass it on with what else they are given
    passed_on = "past_key_values" in taken and hasattr(config, "use_cache") and any(p.kind is p.VAR_KEYWORD for p in taken.values())
    if ("use_cache" in taken or passed_on) and "use_cache" not in constants:
        constants["use_cache"] = False
    order = [n for n in taken if n in values]
    return Call({n: values[n] for n in order}, axes, constants)


def _blocks(text: Any) -> list[int]:
    """Numbers of tokens that a model fills up to whole multiples of, by code that whole ones do not run: blocks of LongT5, chunks of Mamba-2,
    windows of Longformer and LED."""
    radius, window = getattr(text, "local_radius", None), getattr(text, "attention_window", None)
    found = [radius + 1 if isinstance(radius, int) else None, getattr(text, "chunk_size", None), getattr(text, "mamba_chunk_size", None)]
    found += window if isinstance(window, list) else [window]
    return [n for n in found if isinstance(n, int) and n > 1]


def _is_causal(model: Any, taken: Any) -> bool:
    """Decoder-only models that can cache; a cross-attending or encoder-only model cannot."""
    config = model.config
    if "past_key_values" not in taken or "input_ids" not in taken or getattr(config, "is_encoder_decoder", False):
        return False
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    encoder_like = "token_type_ids" in taken and getattr(text, "is_decoder", None) is False and type(model).__name__ != "GPT2LMHeadModel"
    if encoder_like and not _always_causal(config):
        return False
    return getattr(text, "is_decoder", None) is not False or _always_causal(config)


def _codebooks(model: Any) -> int:
    """How many rows of ids make one sample: MusicGen takes those of all codebooks, one below the other. What the model caches tells."""
    books = getattr(model.config.get_text_config(decoder=True), "num_codebooks", None)
    if not isinstance(books, int) or books < 2:
        return 1
    try:
        with torch.no_grad():
            out = model(input_ids=torch.ones(BATCH * books, QUERY, dtype=torch.long, device="meta"), use_cache=True)
        kept = getattr(out.past_key_values, "self_attention_cache", out.past_key_values)
        return books if kept.layers[0].keys.shape[0] == BATCH else 1
    except Exception:  # ids of another form, or a model that cannot run by itself
        return 1


_KEPT = ("full_attention", "sliding_attention", "chunked_attention", "attention", "dummy")


def other_states(config: Any) -> tuple[str, ...]:
    """Types of layers that keep states between calls which are no keys and values (linear attention, recurrence, convolution): no graph that
    takes a past of keys and values can continue them."""
    from transformers.cache_utils import get_layer_types_and_kwargs

    try:
        types, _ = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
    except Exception:  # configs of old families say nothing by layer; their own cache is tried
        return ()
    return tuple(dict.fromkeys(t for t in types if t not in _KEPT))


def _always_causal(config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

    family = config.model_type
    return family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and family not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _learned_positions(model: Any) -> bool:
    """Whether positions are looked up in a table, so that left padding needs them as an input; rotary ones are relative."""
    names = [n for n, _ in model.named_modules()]
    return any(n.rpartition(".")[2] in ("wpe", "embed_positions", "position_embeddings") for n in names)


def _cache(model: Any, values: dict[str, Any], axes: dict[str, Axes]) -> None:
    text = model.config.get_text_config(decoder=True)
    borrowing = [mode == "reuse" for mode in getattr(text, "kv_sharing_modes", None) or ()]
    layers = int(text.num_hidden_layers) - sum(borrowing)  # those at the end that read the keys and values of earlier ones keep none
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    by_layer = list(text.per_layer_config)[:layers] if getattr(text, "is_heterogeneous", False) else [text] * layers

    def one(of: Any) -> Tensor:
        heads = int(getattr(of, "num_key_value_heads", None) or of.num_attention_heads)
        width = int(getattr(of, "head_dim", None) or of.hidden_size // of.num_attention_heads)
        return torch.zeros(BATCH, heads, PAST, width, dtype=dtype, device="meta")

    if getattr(text, "kv_lora_rank", None) or getattr(text, "v_head_dim", None) or _untold(text):
        values["past_key_values"] = filled_cache(*_kept(model, layers))
    else:
        values["past_key_values"] = filled_cache([one(c) for c in by_layer], [one(c) for c in by_layer])
    for i in range(layers):
        for what in ("key", "value"):
            axes[f"past_key_values_{what}_{i}"] = {0: "batch", 2: "past"}


def _untold(text: Any) -> bool:
    """Whether heads share keys and values (Shazeer 2019, 1911.02150) and no number of the usual name says how many are kept: Falcon."""
    return bool(getattr(text, "multi_query", None)) and getattr(text, "num_key_value_heads", None) is None


def note_of_cache(model: Any) -> tuple[str, ...]:
    """What to say of a model that could cache and is captured without one."""
    taken = inspect.signature(type(model).forward).parameters
    if "use_cache" in taken and "past_key_values" not in taken:
        return ("captured without a past: what this model keeps between calls is no keys and values",)
    states = other_states(model.config) if _is_causal(model, taken) else ()
    if not states:
        return ()
    return (f"captured without a past: layers of type {' and '.join(states)} keep states between calls that are no keys and values",)


def _kept(model: Any, layers: int) -> tuple[list[Tensor], list[Tensor]]:
    """Keys and values as the model itself caches them, grown to PAST tokens: with latent attention (DeepSeek-V2, 2405.04434) no config says
    how many heads of which width each has. One run on meta."""
    try:
        with torch.no_grad():
            out = model(input_ids=torch.ones(BATCH, QUERY, dtype=torch.long, device="meta"), use_cache=True)
    except Exception as error:  # whatever the model's own code raises
        said = str(error).splitlines()[0][:200] if str(error) else ""
        raise fail(
            "S0504", f"{type(model).__name__} does not run with this config: {type(error).__name__}: {said}",
            help="complete the values in config.json",
        ) from error  # fmt: skip
    made = getattr(getattr(out, "past_key_values", None), "layers", [])

    def grown(tensor: Any) -> Tensor:
        shape = tuple(getattr(tensor, "shape", ()))
        if len(made) != layers or len(shape) != 4 or shape[0] != BATCH or shape[2] != QUERY:
            raise fail(
                "S0505", f"the cache of {type(model).__name__} is not made of keys and values by layer",
                help="capture it from Python with example inputs: surgery.capture(module, inputs)",
            )  # fmt: skip
        return torch.zeros(BATCH, shape[1], PAST, shape[3], dtype=tensor.dtype, device="meta")

    return [grown(getattr(m, "keys", None)) for m in made], [grown(getattr(m, "values", None)) for m in made]


def _features(model: Any, taken: Any) -> tuple[str, Tensor, Axes] | None:
    """Pixels (batch, channels, height, width; for a video the frames behind the batch) or audio features, None for a text model."""
    config = model.config
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if "pixel_values" in taken:
        vision = getattr(config, "vision_config", None) or config
        size = getattr(vision, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = int(getattr(vision, "num_channels", 3))
        frames = getattr(vision, "num_frames", None)
        video = isinstance(frames, int) and (hasattr(vision, "tubelet_size") or hasattr(vision, "attention_type"))
        times = (frames,) if video else ()
        return "pixel_values", torch.zeros(BATCH, *times, channels, height, width, dtype=dtype, device="meta"), {0: "batch"}
    length = getattr(config, "frames_per_clip", None)
    if "pixel_values_videos" in taken and isinstance(length, int):
        side = int(getattr(config, "crop_size", 0) or getattr(config, "image_size", 224))
        clip = torch.zeros(BATCH, length, int(getattr(config, "in_chans", 3)), side, side, dtype=dtype, device="meta")
        return "pixel_values_videos", clip, {0: "batch"}
    wide = getattr(config, "feature_projection_input_dim", None) or getattr(config, "input_feat_per_channel", None)
    if "input_features" in taken and isinstance(wide, int):  # frames of features, one behind the other
        return "input_features", torch.zeros(BATCH, 2 * LENGTH, wide, dtype=dtype, device="meta"), {0: "batch", 1: "sequence"}
    if "input_features" in taken:
        bins = int(getattr(config, "num_mel_bins", 80))
        frames = 2 * int(getattr(config, "max_source_positions", 1500))
        return "input_features", torch.zeros(BATCH, bins, frames, dtype=dtype, device="meta"), {0: "batch"}
    if "input_values" in taken:
        if hasattr(config, "max_length") and hasattr(config, "num_mel_bins") and hasattr(config, "frequency_stride"):
            shape = (BATCH, int(config.max_length), int(config.num_mel_bins))
            return "input_values", torch.zeros(*shape, dtype=dtype, device="meta"), {0: "batch"}
        if not (hasattr(config, "conv_kernel") and hasattr(config, "conv_stride")):
            second = torch.zeros(BATCH, 16000, dtype=dtype, device="meta")  # how many samples make a frame stands in the model's code
            return "input_values", second, {0: "batch", 1: "sequence"}
        reach = 1
        for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
            reach = (reach - 1) * stride + kernel
        step = 1
        for stride in config.conv_stride:
            step *= stride
        samples = reach + 10 * step
        return "input_values", torch.zeros(BATCH, samples, dtype=dtype, device="meta"), {0: "batch", 1: "sequence"}
    return None
