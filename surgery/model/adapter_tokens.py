"""Adapter files that hold virtual tokens and no change of a weight, read into one form.

===========================  ==========================================================================================================
PROMPT_TUNING, P_TUNING, CPT  ``prompt_embeddings [tokens, width]``: what peft's encoder makes of its own tensors is computed when it saves
MULTITASK_PROMPT_TUNING       the same, times ``prefix_task_cols [tasks, tokens, r]`` ``prefix_task_rows [tasks, r, width]`` of one task
PREFIX_TUNING, CARTRIDGE      ``prompt_embeddings [tokens, layers 2 heads head]``: keys and values of every layer, rotated by nothing
===========================  ==========================================================================================================

Beside them stand tensors of the base that were trained whole (``base_model.classifier.weight``).

Sources: arXiv:2104.08691 (prompt), arXiv:2103.10385 (p-tuning), arXiv:2303.02861 (several tasks), arXiv:2410.17222 (context-aware prompt),
arXiv:2101.00190 (prefix), arXiv:2506.06266 (cartridges).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.core.diagnostics import SurgeryError
from surgery.model.adapter_forms import TASK
from surgery.model.checkpoint_headers import TensorHeader
from surgery.model.weights import Apply, Expr, Load, is_float, select

Fault = Callable[..., SurgeryError]

KEY = "prompt_embeddings"
TASK_FACTORS = ("prefix_task_cols", "prefix_task_rows")

_ALL = frozenset({
    "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "num_attention_heads", "num_layers", "num_transformer_submodules",
    "num_virtual_tokens", "peft_type", "peft_version", "revision", "task_type", "token_dim",
})  # fmt: skip

PROMPTS: Mapping[str, frozenset[str]] = {
    "PROMPT_TUNING": _ALL | {"prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"},
    "MULTITASK_PROMPT_TUNING": _ALL | {
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_state_dict_path",
        "prompt_tuning_init_task", "num_ranks", "num_tasks",
    },
    "P_TUNING": _ALL | {"encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"},
    "CPT": _ALL | {
        "cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask", "opt_weighted_loss_type", "opt_loss_decay_factor", "opt_projection_epsilon",
        "opt_projection_format_epsilon", "tokenizer_name_or_path",
    },
}  # fmt: skip
"""Kinds that hold embeddings, with the fields of a config that are known or say nothing about a trained one."""

PREFIXES: Mapping[str, frozenset[str]] = {
    "PREFIX_TUNING": _ALL | {"encoder_hidden_size", "prefix_projection", "init_weights"},
    "CARTRIDGE": _ALL | {"num_frozen_tokens"},
}
"""Kinds that hold keys and values."""

PAIRED = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING")
"""Kinds that peft runs on an encoder with a decoder."""

BOTH = ("MULTITASK_PROMPT_TUNING",)
"""Those whose second half peft puts in front of the decoder; of the others it uses the first half alone."""

NAMES = {
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "prompt tuning of several tasks",
    "P_TUNING": "p-tuning",
    "CPT": "context-aware prompts",
    "PREFIX_TUNING": "prefix tuning",
    "CARTRIDGE": "cartridges",
}


@dataclass(frozen=True)
class VirtualTokens:
    """``count`` virtual tokens: ``stored [count, width]`` are their embeddings, or with ``layers`` more than 0 the keys and values
    ``[count, layers 2 heads head]`` that they have in every layer, keys first. ``pair`` says that they are those of an encoder and its decoder, whose own embeddings are ``decoder [count, width]``, if it has some."""

    stored: Expr
    count: int
    layers: int = 0
    heads: int = 0
    pair: bool = False
    decoder: Expr | None = None

    @property
    def expressions(self) -> tuple[Expr, ...]:
        return (self.stored,) if self.decoder is None else (self.stored, self.decoder)

    @property
    def head(self) -> int:
        """The width of a key head."""
        return self.stored.shape[1] // (2 * self.layers * self.heads)


def fields_of(kind: str) -> frozenset[str] | None:
    """The known fields of a kind of virtual tokens; None for any other kind."""
    return PROMPTS.get(kind) or PREFIXES.get(kind)


def read_tokens(
    kind: str, config: Mapping[str, Any], tensors: Iterable[TensorHeader], fault: Fault
) -> tuple[VirtualTokens, dict[str, Load]]:
    """The tokens, and tensors of the base that were trained whole. ``fault(message, help)`` gives the diagnostic of what does not go together."""
    found: TensorHeader | None = None
    factors: dict[str, TensorHeader] = {}
    whole: dict[str, Load] = {}
    stray = ""
    for header in tensors:
        if header.key == KEY:
            found = header
            continue
        if header.key in TASK_FACTORS and kind == "MULTITASK_PROMPT_TUNING":
            factors[header.key] = header
        elif header.key.startswith("base_model."):
            whole[re.sub(r"\.modules_to_save(\.[^.]+)?\.", ".", header.key.removeprefix("base_model."))] = header.load()
        else:
            stray = header.key
    if found is None:
        raise fault(f"it has no `{KEY}`")
    if stray:
        raise fault(f"it has a tensor `{stray}`, which no folder of this kind has")
    if not is_float(found.dtype):
        raise fault(f"`{KEY}` is {found.dtype}, not a floating type")
    if len(found.shape) != 2 or 0 in found.shape:
        raise fault(f"`{KEY}` has the shape {list(found.shape)}, not [tokens, features]")
    count = _size(config, "num_virtual_tokens", fault)
    pair = str(config.get("task_type") or "").rpartition(".")[2] == "SEQ_2_SEQ_LM"
    times = _size(config, "num_transformer_submodules", fault, 2 if pair else 1)
    if times > 2 or (times == 2 and not pair):
        raise fault(f"`num_transformer_submodules` is {times} for the task {config.get('task_type')}", "correct the config of the adapter")
    if (pair and kind not in PAIRED) or (kind not in PROMPTS and pair and times != 2):
        raise fault(
            "such tokens stand in front of a decoder's own, too, or have no cache to stand in",
            "train a prompt, p-tuning or a prefix on both",
        )
    rows = count * times if kind in PROMPTS else count
    width = _size(config, "token_dim", fault, found.shape[1])
    if rows != found.shape[0]:
        raise fault(f"its config says {rows} virtual tokens, and `{KEY}` has {found.shape[0]}", "correct `num_virtual_tokens`")
    if kind in PROMPTS:
        if width != found.shape[1]:
            raise fault(f"its config says {width} features a token, and `{KEY}` has {found.shape[1]}", "correct `token_dim`")
        stored = found.load() if kind != "MULTITASK_PROMPT_TUNING" else _of_task(found, factors, config, fault)
        # of an encoder and a decoder peft trains tokens for both, and mostly uses those of the encoder
        second = select(stored, 0, ((count, rows),)) if kind in BOTH and times == 2 else None
        return VirtualTokens(select(stored, 0, ((0, count),)), count, pair=pair, decoder=second), whole
    layers, heads = _size(config, "num_layers", fault), _size(config, "num_attention_heads", fault)
    if found.shape[1] != 2 * layers * width or width % heads:
        raise fault(
            f"its config says keys and values of {layers} layers with {heads} heads of together {width} features, and `{KEY}` has {found.shape[1]} a token",
            "correct `num_layers`, `num_attention_heads` and `token_dim`",
        )
    return VirtualTokens(found.load(), count, layers, heads, pair), whole


def _of_task(found: TensorHeader, factors: Mapping[str, TensorHeader], config: Mapping[str, Any], fault: Fault) -> Expr:
    """The embeddings of one task."""
    missing = next((n for n in TASK_FACTORS if n not in factors), None)
    if missing:
        raise fault(f"it has no `{missing}`")
    columns, rows = (factors[n] for n in TASK_FACTORS)
    tasks = _size(config, "num_tasks", fault, 1)
    rank = columns.shape[-1] if columns.shape else 0
    if (
        columns.shape != (tasks, found.shape[0], rank)
        or rows.shape != (tasks, rank, found.shape[1])
        or not (is_float(columns.dtype) and is_float(rows.dtype))
    ):
        raise fault(f"its factors of {tasks} tasks have the shapes {list(columns.shape)} and {list(rows.shape)}", "correct `num_tasks`")
    params = (("task", int(config.get(TASK) or 0)),)
    return Apply(found.shape, "float32", "kinds/adapter_more:of_task", (found.load(), columns.load(), rows.load()), params)


def _size(config: Mapping[str, Any], key: str, fault: Fault, default: int | None = None) -> int:
    value = config.get(key, default) if config.get(key) is not None else default
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise fault(f"`{key}` is {value!r}, not a number of at least 1", "correct the config of the adapter")
    return value
