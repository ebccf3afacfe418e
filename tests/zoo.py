"""Tiny seeded models of many families: a config, a class and inputs for any batch and length. One entry a family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """``config`` holds the keyword arguments of ``AutoConfig.for_model(family)``; ``inputs(batch, length)`` seeded tensors
    (and plain values) for ``forward``; ``capturable`` is False where the tracer cannot follow the model's code."""

    family: str
    architecture: str
    config: dict[str, Any]
    inputs: Callable[[int, int], Inputs]
    capturable: bool = True
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def plain_config(self) -> dict[str, Any]:
        return {"model_type": self.family, **self.config}

    def make_config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(self.family, **self.config)

    def make_model(self, seed: int = 0, **more: Any) -> nn.Module:
        """A live model in fp32, eval mode; vectors are perturbed so that biases and norm weights matter."""
        import transformers

        torch.manual_seed(seed)
        config = self.make_config()
        for key, value in more.items():
            setattr(config, key, value)
        model: nn.Module = getattr(transformers, self.architecture)._from_config(config, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for _, tensor in model.named_parameters():
                if tensor.ndim == 1:
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
            for name, tensor in model.named_buffers():
                if name.endswith("running_mean"):
                    tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
        return model


def _ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def _mask(batch: int, length: int, left: bool = False) -> Tensor:
    """Ones, with four padded tokens in the last row (right, or left for decoders)."""
    mask = torch.ones(batch, length, dtype=torch.long)
    if length > 6 and batch > 1:
        if left:
            mask[-1, :4] = 0
        else:
            mask[-1, -4:] = 0
    return mask


def text(batch: int, length: int) -> Inputs:
    return {"input_ids": _ids(batch, length), "attention_mask": _mask(batch, length)}


def typed_text(batch: int, length: int) -> Inputs:
    return {**text(batch, length), "token_type_ids": _ids(batch, length, 1) % 2}


def causal(layers: int, heads: int, width: int, positions: bool = False) -> Callable[[int, int], Inputs]:
    """New tokens after a past of five, the last row padded on the left."""

    def make(batch: int, length: int) -> Inputs:
        from transformers.cache_utils import DynamicCache

        past = 5
        generator = torch.Generator().manual_seed(7)
        pairs = [tuple(torch.randn(batch, heads, past, width, generator=generator) for _ in range(2)) for _ in range(layers)]
        mask = _mask(batch, length + past, left=True)
        out: Inputs = {"input_ids": _ids(batch, length), "attention_mask": mask, "past_key_values": DynamicCache(pairs), "use_cache": True}
        if positions:
            out["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, past:]
        return out

    return make


def seq2seq(batch: int, length: int) -> Inputs:
    target = max(2, length // 2)
    return {
        **text(batch, length), "decoder_input_ids": _ids(batch, target, 2), "decoder_attention_mask": _mask(batch, target), "use_cache": False,
    }  # fmt: skip


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def pixels(size: int) -> Callable[[int, int], Inputs]:
    return lambda batch, length: {"pixel_values": _noise(batch, 3, size, size)}


def speech2text(batch: int, length: int) -> Inputs:
    target = max(2, length // 2)
    return {
        "input_features": _noise(batch, 16, 40), "decoder_input_ids": _ids(batch, target, 2),
        "decoder_attention_mask": _mask(batch, target), "use_cache": False,
    }  # fmt: skip


def clip(batch: int, length: int) -> Inputs:
    ids = _ids(batch, length)
    ids[:, -1] = 98
    return {"input_ids": ids, "pixel_values": _noise(batch, 3, 16, 16), "attention_mask": _mask(batch, length)}


def waves(batch: int, length: int) -> Inputs:
    samples = 40 * length + 80
    mask = torch.ones(batch, samples, dtype=torch.long)
    mask[-1, -100:] = 0
    return {"input_values": _noise(batch, samples), "attention_mask": mask}


def spectrogram(batch: int, length: int) -> Inputs:
    return {"input_values": _noise(batch, 32, 16)}


def vilt(batch: int, length: int) -> Inputs:
    return {**text(batch, length), "pixel_values": _noise(batch, 3, 16, 16)}


_BERT = dict(vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64)
_LLAMA = dict(_BERT, num_key_value_heads=2, head_dim=8)
_BART = dict(
    vocab_size=99, d_model=32, encoder_layers=3, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    decoder_start_token_id=2,
)  # fmt: skip
_VIT = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4)

_ENTRIES = [
    Entry("bert", "BertModel", _BERT, typed_text),
    Entry("roberta", "RobertaModel", dict(_BERT, type_vocab_size=1, pad_token_id=1), text),
    Entry(
        "distilbert", "DistilBertModel", dict(vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=64), text
    ),
    Entry("albert", "AlbertModel", dict(_BERT, embedding_size=16), typed_text),
    Entry(
        "deberta-v2",
        "DebertaV2Model",
        dict(
            _BERT,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            position_buckets=8,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            position_biased_input=False,
            type_vocab_size=0,
        ),
        text,
    ),
    Entry(
        "gpt2",
        "GPT2LMHeadModel",
        dict(vocab_size=99, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
        causal(3, 4, 8, True),
    ),
    Entry("llama", "LlamaForCausalLM", _LLAMA, causal(3, 2, 8)),
    Entry("qwen3", "Qwen3ForCausalLM", _LLAMA, causal(3, 2, 8)),
    Entry(
        "gemma3_text", "Gemma3ForCausalLM", dict(_LLAMA, num_hidden_layers=6, sliding_window=8, sliding_window_pattern=3), causal(6, 2, 8)
    ),
    Entry("phi3", "Phi3ForCausalLM", dict(_BERT, num_key_value_heads=2, pad_token_id=0), causal(3, 2, 8)),
    Entry("mixtral", "MixtralForCausalLM", dict(_LLAMA, num_local_experts=4, num_experts_per_tok=2), causal(3, 2, 8)),
    Entry(
        "t5",
        "T5Model",
        dict(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=3, num_heads=4, relative_attention_num_buckets=8),
        seq2seq,
    ),
    Entry("bart", "BartModel", _BART, seq2seq),
    Entry(
        "whisper",
        "WhisperModel",
        dict(_BART, num_mel_bins=16, max_source_positions=20, max_target_positions=32, pad_token_id=0, begin_suppress_tokens=None),
        speech2text,
    ),
    Entry("vit", "ViTModel", _VIT, pixels(16)),
    Entry(
        "swin",
        "SwinModel",
        dict(image_size=32, patch_size=2, embed_dim=8, depths=[2, 4], num_heads=[2, 4], window_size=4, drop_path_rate=0.5),
        pixels(32),
    ),
    Entry(
        "clip",
        "CLIPModel",
        dict(
            text_config=dict(_BERT, eos_token_id=98, projection_dim=16),
            vision_config=dict(_VIT, projection_dim=16),
            projection_dim=16,
        ),
        clip,
    ),
    Entry(
        "wav2vec2-conformer",
        "Wav2Vec2ConformerModel",
        dict(
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=64,
            conv_dim=[16, 16],
            conv_kernel=[10, 4],
            conv_stride=[5, 4],
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            conv_depthwise_kernel_size=5,
            feat_extract_norm="layer",
        ),
        waves,
    ),
    Entry("resnet", "ResNetModel", dict(embedding_size=8, hidden_sizes=[16, 32], depths=[3, 3], layer_type="bottleneck"), pixels(224)),
    Entry(
        "convnext",
        "ConvNextModel",
        dict(hidden_sizes=[8, 16], depths=[3, 3], num_stages=2, image_size=32, drop_path_rate=0.5, layer_scale_init_value=0.1),
        pixels(32),
    ),
    Entry(
        "audio-spectrogram-transformer",
        "ASTModel",
        dict(_VIT, max_length=32, num_mel_bins=16, frequency_stride=4, time_stride=4),
        spectrogram,
    ),
    Entry("vilt", "ViltModel", dict(_BERT, image_size=16, patch_size=4), vilt, capturable=False),
]

ZOO: dict[str, Entry] = {entry.family: entry for entry in _ENTRIES}
CAPTURABLE: list[str] = [family for family, entry in ZOO.items() if entry.capturable]
