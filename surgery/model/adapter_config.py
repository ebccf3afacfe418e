"""What the config of an adapter folder says of its kind, and which of its fields are understood."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from surgery.core.diagnostics import fail
from surgery.core.near import quoted
from surgery.core.source import Span
from surgery.model.adapter_dense import DENSE_KINDS
from surgery.model.adapter_forms import KINDS as THIN_KINDS
from surgery.model.adapter_forms import WHY_NOT, Kind
from surgery.model.adapter_tokens import NAMES, fields_of

KINDS = {**THIN_KINDS, **DENSE_KINDS}
"""Kinds of folders beside LoRA that change weights, by ``peft_type``."""

UNCHANGED = ("true", "false", "gaussian", "eva", "orthogonal", "mica", "none", "")
"""Ways to start an adapter that leave the base as it is: they say nothing about a trained one."""

QUIET = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "modules_to_save", "peft_type", "peft_version",
    "qalora_group_size", "r", "rank_pattern", "alpha_pattern", "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices", "use_dora",
    "use_rslora",
})  # fmt: skip
"""Fields of a config whose meaning is known here, or that say nothing about what a trained adapter computes."""


def known(config: Mapping[str, Any], name: str, span: Span) -> Kind | str | None:
    """The kind of a folder that is no LoRA (its ``peft_type`` where it holds virtual tokens), None for one that is.

    Raises S0782 for a kind of adapter, a way to start or a field that changes what the tensors mean and is not known here.
    """
    kind = str(config.get("peft_type") or "").rpartition(".")[2].upper()
    if kind in KINDS:
        fields(config, KINDS[kind].fields, name, span)
        return KINDS[kind]
    own = fields_of(kind)
    if own is not None:
        fields(config, own, name, span)
        if config.get("num_transformer_submodules") not in (None, 1):
            raise fail(
                "S0782", f"{name} has virtual tokens for an encoder and a decoder, and they stand in front of one sequence here", span, "opened here",
                help="`insert prefix(..)` on the attentions of both makes such keys and values, trained here",
            )  # fmt: skip
        return kind
    if kind != "LORA":
        raise fail(
            "S0782", f"{name} is an adapter of type {kind or 'unknown'}, which surgery does not read", span, "opened here",
            notes=(WHY_NOT[kind],) if kind in WHY_NOT else (),
            help=f"known are LoRA, rsLoRA, DoRA, PiSSA, {', '.join(k.name for k in KINDS.values())}, {', '.join(NAMES.values())}, with biases and whole modules beside them; "
            "peft's `convert_to_lora` makes a LoRA of most other kinds",
        )  # fmt: skip
    start = str(config.get("init_lora_weights", True)).lower()
    if start not in UNCHANGED and not start.startswith("pissa"):
        raise fail(
            "S0782", f"{name} was trained on a base that its start ({start}) rewrote, and the folder does not hold that base", span, "opened here",
            help="save it with `path_initial_model_for_weight_conversion`: peft then writes a LoRA for the original base",
        )  # fmt: skip
    bare = config.get("target_parameters") or []
    if not isinstance(bare, list) or not all(isinstance(p, str) for p in bare):
        raise fail(
            "S0783", f"`target_parameters` of {name} is no list of names", span, "opened here", help="correct the config of the adapter"
        )
    fields(config, QUIET, name, span)
    if config.get("lora_bias") and config.get("use_dora"):
        raise fail("S0782", f"{name} has a bias behind its factors and a magnitude", span, "opened here", help="train with one of the two")
    return None


def fields(config: Mapping[str, Any], known: frozenset[str], name: str, span: Span) -> None:
    other = [k for k, v in config.items() if k not in known and v not in (None, False, [], {}, "", 0)]
    if other:
        raise fail(
            "S0782", f"{name} uses {quoted(sorted(other)[:4], 'and')}, which surgery does not know", span, "opened here",
            help="what it means for the tensors is not known here: save the adapter without it, or as a plain LoRA",
        )  # fmt: skip


def flags(config: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {k: True for k in ("use_rslora", "use_dora") if config.get(k)}
    start = str(config.get("init_lora_weights", True)).lower()
    return out | ({"init_lora_weights": start} if start.startswith("pissa") else {})


def number(config: Mapping[str, Any], key: str, default: float, name: str, span: Span) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise fail("S0783", f"`{key}` of {name} is {value!r}, not a number", span, "opened here", help="correct the config of the adapter")
    return float(value)
