"""The config of a model without some of its layers: how many there are, and what it lists layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from typing import Any

from surgery.model.program import Program

COUNTS = ("{side}_layers", "num_{side}_layers", "num_hidden_layers", "num_layers", "n_layer", "n_layers")
"""Spellings of the number of layers; ``{side}`` is ``encoder`` or ``decoder`` in models that have both."""

LISTS = (
    "layer_types", "mlp_layer_types", "layers_block_type", "attention_layers", "no_rope_layers", "block_types",
    "sliding_window_layers", "rope_layers",
)  # fmt: skip
"""Lists with one entry for each layer; those whose names end in `_per_layer` are, too."""

SIZES = ("intermediate_size", "activation_sparsity_pattern", "num_experts", "moe_topk")
"""Quantities that some families give as one number and others by layer."""

NUMBERS = ("moe_layers", "mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "global_attn_layers", "attn_layer_indices")
"""Lists of the layers that have something."""

THRESHOLDS = ("first_k_dense_replace", "max_window_layers")
"""Numbers of layers at the start that are of one kind."""

TAILS = ("num_kv_shared_layers",)
"""Numbers of layers at the end that are of one kind."""


def drop_layers(program: Program, gone: Mapping[str, tuple[int, set[int]]]) -> None:
    """Write into the program's config that stacks lost layers: name of the stack to its layers before and those that are gone.

    Names that the config does not have stay away; a list that the family's class derives from the number of layers is written
    out first, because what it would derive from the new number is another list.
    """
    config = deepcopy(program.info.config)
    full = full_config(program)
    for stack, (count, lost) in gone.items():
        owner, side = owner_of(config, stack)
        _drop(owner, owner_of(full, stack)[0], side, stack, count, lost)
    program.info = replace(program.info, config=config)


def full_config(program: Program) -> dict[str, Any]:
    """Everything that the family's config class says of this model, with its defaults; empty for other models."""
    if not program.info.family:
        return {}
    from transformers import AutoConfig

    plain = {k: v for k, v in program.info.config.items() if k not in ("model_type", "auto_map")}
    try:
        return dict(AutoConfig.for_model(program.info.family, **deepcopy(plain)).to_dict())
    except (ValueError, TypeError, KeyError):
        return {}


def owner_of(config: dict[str, Any], stack: str) -> tuple[dict[str, Any], str]:
    head = stack.partition(".")[0].partition("[")[0]
    sub = config.get(f"{head}_config")
    if isinstance(sub, dict):
        return sub, ""
    return config, head if head in ("encoder", "decoder") else ""


def _drop(owner: dict[str, Any], full: dict[str, Any], side: str, stack: str, count: int, lost: set[int]) -> None:
    if "stages[" in stack:
        at = int(stack.rpartition("stages[")[2].partition("]")[0])
        depths = owner.get("depths", full.get("depths"))
        if isinstance(depths, list | tuple) and at < len(depths) and depths[at] == count:
            owner["depths"] = [n - len(lost) if i == at else n for i, n in enumerate(depths)]
        return
    own = [n.format(side=side) for n in COUNTS if side or "{side}" not in n]
    known = [n for n in own if owner.get(n, full.get(n)) == count and not isinstance(owner.get(n, full.get(n)), bool)]
    if side == "decoder" and known[:1] and known[0] in ("decoder_layers", "num_decoder_layers"):
        known = known[:1]  # the names without a side speak of the encoder
    if side == "encoder":
        known = [n for n in known if "decoder" not in n]
    for name in known:
        if name in owner or name == known[0]:
            owner[name] = count - len(lost)
    for name in (*LISTS, *(n for n in {**full, **owner} if n.endswith("_per_layer") or n in SIZES)):
        entries = owner.get(name, full.get(name))
        if isinstance(entries, list | tuple) and len(entries) == count:
            owner[name] = [e for i, e in enumerate(entries) if i not in lost]
    for name in NUMBERS:
        entries = owner.get(name, full.get(name))
        if isinstance(entries, list | tuple) and all(isinstance(e, int) for e in entries):
            owner[name] = [e - sum(j < e for j in lost) for e in entries if e not in lost]
    for name in THRESHOLDS:
        first = owner.get(name, full.get(name))
        if isinstance(first, int) and not isinstance(first, bool):
            owner[name] = first - sum(j < first for j in lost)
    for name in TAILS:
        last = owner.get(name, full.get(name))
        if isinstance(last, int) and not isinstance(last, bool):
            owner[name] = last - sum(j >= count - last for j in lost)
