"""The config of a changed model: what the anatomy says now, written with the names that the family's config has for it.

Which number stands where is read from the model (heads, widths, layers of each stack); only the spelling of each quantity is a
table, because a family's config is words and not dataflow. Whether a config says everything is never guessed: the model class is
built from it without memory, and its tensors are compared with the program's by name and shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from surgery.core.site import Anatomy, Site
from surgery.model.program import Program

NAMES: dict[str, tuple[str, ...]] = {
    "layers": ("{side}_layers", "num_{side}_layers", "num_hidden_layers", "num_layers", "n_layer", "n_layers"),
    "heads": ("{side}_attention_heads", "num_attention_heads", "num_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "ffn": ("{side}_ffn_dim", "intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "ffn_hidden_size"),
    "expert_ffn": ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size", "ffn_dim"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_top_k", "top_k"),
    "hidden": ("hidden_size", "d_model", "n_embd", "dim"),
}
"""Spellings of a quantity, the more particular first; ``{side}`` is ``encoder`` or ``decoder`` in models that have both."""

STAGED = {"layers": ("depths",), "heads": ("num_heads", "num_attention_heads"), "width": ("hidden_sizes", "embed_dims")}
"""Spellings of quantities that a config lists stage by stage."""


@dataclass
class Derived:
    """A transformers config with the changes that led to it; ``problems`` are quantities that it has no word for."""

    config: Any
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def original(program: Program) -> Any:
    """The config object of the model as it was; None where the program is no transformers model."""
    from transformers import AutoConfig

    info = program.info
    if not info.family:
        return None
    plain = {k: v for k, v in info.config.items() if k not in ("model_type", "auto_map")}
    try:
        return AutoConfig.for_model(info.family, **plain)
    except (ValueError, TypeError, KeyError):
        return None


def derive(program: Program, config: Any) -> Derived:
    """A copy of ``config`` in which every quantity of the anatomy has its present value."""
    out = Derived(deepcopy(config))
    anatomy = program.anatomy
    for stack in anatomy.stacks:
        stage = re.fullmatch(r"(?:.*\.)?stages\[(\d+)\]\.layers", stack.name)
        owner, side = _owner(out.config, stack.name)
        facts = dict(_facts(anatomy, stack.name, stack.layers))
        if stage is not None and _staged(out, owner, int(stage.group(1)), facts):
            facts = {k: v for k, v in facts.items() if k not in ("layers", "heads", "kv_heads")}
        for what, values in facts.items():
            _write(out, owner, what, side, values, stack.name)
    _hidden(out, anatomy)
    _ties(out, program)
    return out


def _owner(config: Any, stack: str) -> tuple[Any, str]:
    """The (sub-)config that speaks of a stack, and the side that its names carry."""
    head = stack.partition(".")[0].partition("[")[0]
    sub = getattr(config, f"{head}_config", None)
    if sub is not None and not isinstance(sub, dict):
        return sub, ""
    return config, head if head in ("encoder", "decoder") else ""


def _facts(anatomy: Anatomy, stack: str, layers: int) -> Iterator[tuple[str, list[Any]]]:
    """Quantity and its value in each layer of a stack that has it."""
    yield "layers", [_runs(anatomy, stack) if layers == 1 else layers]
    found: dict[str, list[Any]] = {}
    pattern = re.compile(re.escape(stack) + r"\[\d+\]\.(attn|ffn|ffn\.experts)")
    for site in anatomy.sites:
        match = pattern.fullmatch(site.role)
        if match is None:
            continue
        if match.group(1) == "attn":
            for what, value in (("heads", site.heads), ("kv_heads", site.kv_heads), ("head_dim", site.head_dim)):
                if value is not None:
                    found.setdefault(what, []).append(value)
        elif match.group(1) == "ffn" and "experts" not in site.facts:
            found.setdefault("ffn", []).append(site.facts.get("width"))
        elif match.group(1) == "ffn.experts":
            found.setdefault("expert_ffn", []).append(site.facts.get("width"))
            found.setdefault("experts", []).append(site.facts.get("experts"))
            found.setdefault("top_k", []).append(site.facts.get("top_k"))
    yield from ((what, values) for what, values in found.items() if all(v is not None for v in values))


def _runs(anatomy: Anatomy, stack: str) -> int:
    """How often the one layer of a stack is run: a family that shares its layers counts the runs."""
    calls = next((s.facts.get("calls") for s in anatomy.sites if s.role == f"{stack}[0]"), 1)
    return calls if isinstance(calls, int) else 1


def _spelling(owner: Any, what: str, side: str) -> str | None:
    names = [n.format(side=side) for n in NAMES[what] if side or "{side}" not in n]
    return next((n for n in names if _has(owner, n)), None)


def _has(owner: Any, name: str) -> bool:
    return hasattr(owner, name) and not isinstance(getattr(owner, name), bool)


def _write(out: Derived, owner: Any, what: str, side: str, values: list[Any], stack: str) -> None:
    name = _spelling(owner, what, side)
    uniform = len(set(values)) == 1
    if name is None:
        if what == "ffn" and uniform and isinstance(getattr(owner, "mlp_ratio", None), int | float):
            _ratio(out, owner, values[0])
        return  # a number that the family fixes by others (heads by widths): the comparison of tensors judges
    value = values[0] if uniform else list(values)
    if not uniform:
        shown = ", ".join(str(v) for v in values[:8]) + (" ..." if len(values) > 8 else "")
        out.problems.append(f"the {what.replace('_', ' ')} of {stack} differs from layer to layer ({shown})")
    _set(out, owner, name, value)


def _ratio(out: Derived, owner: Any, width: int) -> None:
    """Families that give the feed-forward width as a factor of the hidden size."""
    hidden = _spelling(owner, "hidden", "")
    if hidden is not None and isinstance(getattr(owner, hidden), int):
        factor = width / getattr(owner, hidden)
        _set(out, owner, "mlp_ratio", int(factor) if float(factor).is_integer() else factor)


def _staged(out: Derived, owner: Any, stage: int, facts: dict[str, list[Any]]) -> bool:
    """Writes one entry of the lists that a config keeps stage by stage; False where it has none."""
    any_list = False
    for what, names in STAGED.items():
        name = next((n for n in names if isinstance(getattr(owner, n, None), list | tuple)), None)
        if name is None or what not in facts:
            continue
        any_list = True
        values = list(getattr(owner, name))
        if stage < len(values) and len(set(facts[what])) == 1 and values[stage] != facts[what][0]:
            values[stage] = facts[what][0]
            _set(out, owner, name, type(getattr(owner, name))(values))
    return any_list


def _hidden(out: Derived, anatomy: Anatomy) -> None:
    """The width of the residual stream, where one number says it: the width that most norms of layers have."""
    widths = [s.shape[0] for s in anatomy.sites if s.op == "norm" and s.stack and s.shape]
    sides = {s.stack.partition(".")[0] for s in anatomy.sites if s.op == "norm" and s.stack}
    if not widths or len(set(widths)) != 1 or any(getattr(out.config, f"{side}_config", None) is not None for side in sides):
        return
    name = _spelling(out.config, "hidden", "")
    if name is not None and isinstance(getattr(out.config, name), int):
        _set(out, out.config, name, widths[0])


def _ties(out: Derived, program: Program) -> None:
    """``tie_word_embeddings`` as the program has it: the head is tied while it shares the tensor of the token embedding."""
    by_role: dict[str, Site] = {s.role: s for s in program.anatomy.sites}
    head, tokens = by_role.get("head"), by_role.get("embed.tokens")
    if head is None or tokens is None or not hasattr(out.config, "tie_word_embeddings"):
        return
    names = [program.aliases.get(s.weight, s.weight) for s in (head, tokens)]
    if bool(out.config.tie_word_embeddings) and names[0] != names[1]:
        _set(out, out.config, "tie_word_embeddings", False)


def _set(out: Derived, owner: Any, name: str, value: Any) -> None:
    old = getattr(owner, name)
    if old == value:
        return
    from huggingface_hub.errors import StrictDataclassError

    try:
        setattr(owner, name, value)
    except StrictDataclassError:  # a list where the family takes one number: the problem is written down already
        return
    out.changes[name] = (old, value)
