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
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "kv_n_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "ffn": ("{side}_ffn_dim", "intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "ffn_hidden_size"),
    "expert_ffn": ("moe_intermediate_size", "intermediate_size", "ffn_hidden_size", "ffn_dim", "d_ff"),
    "shared_ffn": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_top_k", "top_k"),
    "hidden": ("hidden_size", "d_model", "n_embd", "dim"),
}
"""Spellings of a quantity, the more particular first; ``{side}`` is ``encoder`` or ``decoder`` in models that have both."""

PARTS = {"attn_config": ("kv_heads", "head_dim"), "ffn_config": ("ffn", "expert_ffn", "shared_ffn", "experts", "top_k", "hidden")}
"""Configs within a config that speak of one part of every layer, and the quantities that stand there."""

STAGED = {"layers": ("depths",), "heads": ("num_heads", "num_attention_heads"), "width": ("hidden_sizes", "embed_dims")}
"""Spellings of quantities that a config lists stage by stage."""

EACH = "{name}_per_layer"
"""How a list with an entry for each layer is spelled beside the one number for all of them."""


@dataclass
class Derived:
    """A transformers config with the changes that led to it; ``problems`` are quantities that it has no word for."""

    config: Any
    changes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    layers: list[tuple[Any, int, str, Any]] = field(default_factory=list)
    """Config, layer, name and value where layers differ and the config keeps no list: for ``per_layer_config``."""


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
            facts = {k: v for k, v in facts.items() if k not in ("layers", "heads", "kv_heads", "width")}
        for what, values in facts.items():
            for place in _places(owner, what):
                _write(out, place, what, side, values, stack.name, stack.layers)
    _hidden(out, anatomy)
    _ties(out, program)
    _per_layer(out)
    return out


def _owner(config: Any, stack: str) -> tuple[Any, str]:
    """The (sub-)config that speaks of a stack, and the side that its names carry."""
    head = stack.partition(".")[0].partition("[")[0]
    sub = getattr(config, f"{head}_config", None)
    if sub is not None and not isinstance(sub, dict):
        return sub, ""
    return config, head if head in ("encoder", "decoder") else ""


def _places(owner: Any, what: str) -> list[Any]:
    """The configs that say a quantity: those of parts of a layer that have a word for it, and the stack's own."""
    parts = [getattr(owner, name, None) for name, said in PARTS.items() if what in said]
    found = [p for p in parts if p is not None and not isinstance(p, dict) and _spelling(p, what, "") is not None]
    return [*found, owner] if not found or _spelling(owner, what, "") is not None else found


def _facts(anatomy: Anatomy, stack: str, layers: int) -> Iterator[tuple[str, list[Any]]]:
    """Quantity and its value in each layer of a stack that has it."""
    yield "layers", [_runs(anatomy, stack) if layers == 1 else layers]
    found: dict[str, list[tuple[int | None, Any]]] = {}

    def note(site: Site, what: str, value: Any) -> None:
        entry = (site.layer, value)
        if entry not in found.setdefault(what, []):  # blocks of one layer that are alike are one
            found[what].append(entry)

    pattern = re.compile(re.escape(stack) + r"\[\d+\]\.(attn|ffn)(?:\[\d+\])?(\.experts)?")
    norms = {s.shape[0] for s in anatomy.sites if s.op == "norm" and s.stack == stack and len(s.shape) == 1}
    if len(norms) == 1:
        yield "width", [*norms]
    # beside experts in one layer a plain block is the shared expert, of which few configs speak apart
    routed = {s.layer for s in anatomy.sites if s.stack == stack and s.is_region and "experts" in s.facts}
    parts = {s.role: s for s in anatomy.sites if s.stack == stack and not s.is_region}
    for site in anatomy.sites:
        match = pattern.fullmatch(site.role)
        if match is None:
            continue
        if match.group(1) == "attn":
            counts = {
                "heads": _of_rows(parts.get(f"{site.role}.q"), site.heads),
                "kv_heads": _of_rows(parts.get(f"{site.role}.k"), site.kv_heads),
            }
            for what, value in (*counts.items(), ("head_dim", site.head_dim)):
                if value is not None:
                    note(site, what, value)
        elif match.group(2):
            for what, fact in (("expert_ffn", "width"), ("experts", "experts"), ("top_k", "top_k")):
                note(site, what, site.facts.get(fact))
        elif "experts" not in site.facts:
            note(site, "shared_ffn" if site.layer in routed else "ffn", site.facts.get("width"))
    for what, entries in found.items():
        values = [v for _, v in entries]
        if all(v is not None for v in values):
            yield what, values


def _of_rows(part: Site | None, heads: int | None) -> int | None:
    """The heads that a config counts, where those of the program are groups of them that go together (the pairs of differential attention)."""
    if part is None or not heads or not part.head_dim or part.shape[0] % (part.head_dim * heads):
        return heads
    return part.shape[0] // part.head_dim


def _runs(anatomy: Anatomy, stack: str) -> int:
    """How often the one layer of a stack is run: a family that shares its layers counts the runs."""
    calls = next((s.facts.get("calls") for s in anatomy.sites if s.role == f"{stack}[0]"), 1)
    return calls if isinstance(calls, int) else 1


def _spelling(owner: Any, what: str, side: str) -> str | None:
    names = [n.format(side=side) for n in NAMES[what] if side or "{side}" not in n]
    return next((n for n in names if _has(owner, n)), None)


def _value(owner: Any, name: str) -> Any:
    """What a config says, None where it says nothing, or not one thing for all layers."""
    try:
        return getattr(owner, name, None)
    except RuntimeError:  # transformers guards names that `per_layer_config` gives by layer
        return None


def _has(owner: Any, name: str) -> bool:
    try:
        return hasattr(owner, name) and not isinstance(getattr(owner, name), bool)
    except RuntimeError:
        return True


def _write(out: Derived, owner: Any, what: str, side: str, values: list[Any], stack: str, layers: int) -> None:
    """One quantity of a stack, in the first of the forms that the config has: a list by layer, one number, a number with exceptions."""
    if what == "width":
        return  # one number for the whole model, which `_hidden` writes
    if what == "head_dim" and _value(owner, "qk_rope_head_dim") is not None:
        return  # with latent attention this word is the rotated part's width, and the widths have words of their own
    name = _spelling(owner, what, side)
    uniform = len(set(values)) == 1
    if name is None:
        if what == "ffn" and uniform and isinstance(getattr(owner, "mlp_ratio", None), int | float):
            _ratio(out, owner, values[0])
        elif what == "head_dim" and uniform and _implied(owner, side) not in (None, values[0]):
            setattr(owner, what, values[0])  # some classes look for it though their config does not declare it
            out.changes[what] = (None, values[0])
        return  # a number that the family fixes by others (heads by widths): the comparison of tensors judges
    if len(values) == 1:
        by_layer = list(values) * layers
    else:
        by_layer = _spoken_of(values, _value(owner, name), layers) if what == "ffn" else list(values)
    for listed in (EACH.format(name=name), name):
        if isinstance(_value(owner, listed), list | tuple) and what != "layers":
            if len(by_layer) == layers:
                _set(out, owner, listed, type(getattr(owner, listed))(by_layer))
                if listed == name:
                    return
            break
    if not uniform:
        shown = ", ".join(str(v) for v in values[:8]) + (" ..." if len(values) > 8 else "")
        out.problems.append(f"the {what.replace('_', ' ')} of {stack} differs from layer to layer ({shown})")
        if len(by_layer) != layers or isinstance(_value(owner, EACH.format(name=name)), list | tuple):
            return
        if _takes_list(owner, name):
            _set(out, owner, name, by_layer)
        else:
            out.layers += [(owner, i, name, v) for i, v in enumerate(by_layer)]
        return
    _set(out, owner, name, values[0])


def _spoken_of(values: list[Any], said: Any, layers: int) -> list[Any]:
    """Of several feed-forward blocks in each layer, the one that a list by layer speaks of: the block that still has most of its widths.

    ``values``: block by block within layer by layer. Unchanged where the config keeps no list or layers differ in their blocks.
    """
    if not isinstance(said, list | tuple) or len(said) != layers or len(values) % layers:
        return list(values)
    blocks = [list(values[i :: len(values) // layers]) for i in range(len(values) // layers)]
    return max(blocks, key=lambda widths: (sum(a == b for a, b in zip(widths, said, strict=True)), sum(widths)))


def _takes_list(owner: Any, name: str) -> bool:
    """Whether the config declares one number or a list of them."""
    declared = getattr(type(owner), "__dataclass_fields__", {}).get(name)
    return declared is not None and re.search(r"\blist\b", str(declared.type)) is not None


def _implied(owner: Any, side: str) -> int | None:
    """The size of a head that follows from the width and the number of heads."""
    hidden, heads = (_value(owner, str(_spelling(owner, what, side))) for what in ("hidden", "heads"))
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def _per_layer(out: Derived) -> None:
    """``per_layer_config``: exceptions from the one number, in the form that any config takes. Whether the class reads them shows when it is built."""
    owners = {id(owner): owner for owner, *_ in out.layers}
    for owner in owners.values():
        if not hasattr(type(owner), "per_layer_config") or _spelling(owner, "layers", "") is None:
            continue  # a config of a part of every layer does not know the layers
        spec = getattr(owner, "_heterogeneity_spec", None)
        given: dict[int, dict[str, Any]] = {int(i): dict(v) for i, v in getattr(spec, "per_layer_overrides", {}).items()}
        for other, layer, name, value in out.layers:
            if other is owner:
                given.setdefault(layer, {})[name] = value
        try:
            owner.per_layer_config = given
        except (ValueError, TypeError):
            continue  # the problems say which quantity it is about
        out.changes["per_layer_config"] = (None, given)


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
    for place in _places(out.config, "hidden"):
        name = _spelling(place, "hidden", "")
        if name is not None and isinstance(getattr(place, name), int):
            _set(out, place, name, widths[0])


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
    old = _value(owner, name)
    if old == value:
        return
    from huggingface_hub.errors import StrictDataclassError

    try:
        setattr(owner, name, value)
    except StrictDataclassError:  # a list where the family takes one number: the problem is written down already
        return
    out.changes[name] = (old, value)
