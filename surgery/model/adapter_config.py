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
from surgery.model.adapter_forms import TASK, WHY_NOT, Kind
from surgery.model.adapter_more import MORE_KINDS
from surgery.model.adapter_tokens import NAMES, fields_of

__all__ = ["KINDS", "TASK", "fields", "flags", "known", "number"]

KINDS = {**THIN_KINDS, **DENSE_KINDS, **MORE_KINDS}
"""Kinds of folders beside LoRA that change weights, by ``peft_type``."""

TASKS = {**{name: k.tasks for name, k in KINDS.items() if k.tasks}, "MULTITASK_PROMPT_TUNING": "num_tasks"}
"""Kinds that are another adapter for every task, with the field that counts them."""

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


def known(config: Mapping[str, Any], name: str, span: Span, task: int | None = None) -> Kind | str | None:
    """The kind of a folder that is no LoRA (its ``peft_type`` where it holds virtual tokens), None for one that is.

    Raises S0782 for a kind of adapter, a way to start or a field that changes what the tensors mean and is not known here, or a task that is
    not said; S0783 for one where there are none.
    """
    kind = str(config.get("peft_type") or "").rpartition(".")[2].upper()
    counted = TASKS.get(kind)
    _tasked(config, counted, name, span, task)
    if kind in KINDS:
        fields(config, KINDS[kind].fields, name, span)
        against = KINDS[kind].against
        if against is not None and (why := against(config)):
            raise fail(
                "S0782", f"{name} is an adapter of type {kind}, which surgery cannot read as it is", span, "opened here", notes=(why,),
                help="save it with what is missing, or as a plain LoRA",
            )  # fmt: skip
        return KINDS[kind]
    own = fields_of(kind)
    if own is not None:
        fields(config, own, name, span)
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


def _tasked(config: Mapping[str, Any], counted: str | None, name: str, span: Span, task: int | None) -> None:
    """Whether a task is said exactly where there are several."""
    count = config.get(counted, 1) if counted else 1
    if counted and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise fail(
            "S0783",
            f"`{counted}` of {name} is {count!r}, not a number of at least 1",
            span,
            "opened here",
            help="correct the config of the adapter",
        )
    if task is None and count > 1:
        raise fail(
            "S0782", f"{name} is another adapter for each of {count} tasks", span, "opened here",
            notes=("what peft computes depends on the task that a call names; one program has one",), help="say which: `load(\"...\", task = 0)`",
        )  # fmt: skip
    if task is not None and (not counted or task >= count):
        what = f"{name} knows {count} tasks, counted from 0" if counted else f"{name} knows no tasks"
        raise fail(
            "S0783",
            f"{what}, and task {task} is asked for",
            span,
            "opened here",
            help="name one of them" if counted else "leave `task` out",
        )


def fields(config: Mapping[str, Any], known: frozenset[str], name: str, span: Span) -> None:
    # an empty table is off for a pattern, and a variant with its usual numbers where it is a config of its own
    other = [
        k for k, v in config.items() if k not in known and (v not in (None, False, [], {}, "", 0) or (v == {} and k.endswith("_config")))
    ]
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
