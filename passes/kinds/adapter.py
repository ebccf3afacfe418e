"""Merging adapters: several loaded ones become one that is attached, trains and folds like any other.

What a method does with adapters is one word (``AdapterSide.adapters``):

``sum``      the weighted sum of their changes, exactly: factors side by side
``change``   their changes are merged by the method's own formula and factored again, to a stated rank
``terms``    the method makes new factors from the rank-one terms (its function ``factors``)

A weight that one adapter alone changes, with factor 1, keeps that adapter as it is, scale and magnitude included. Biases and other tensors of
the base that adapters trained whole are summed as differences from the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from surgery.core.diagnostics import Severity, error, fail
from surgery.core.plan import group_roles, plural
from surgery.core.site import Site
from surgery.model import masked
from surgery.model.program import Program
from surgery.model.weights import Add, Expr, Scale, cast
from surgery.passes.kinds import attach
from surgery.passes.kinds.adapter_basis import check_bases
from surgery.passes.kinds.adapter_checks import check_finite, is_copy
from surgery.passes.kinds.adapter_claim import kept, sum_claim
from surgery.passes.kinds.adapter_join import (
    AdapterInputs,
    Here,
    Joined,
    Loaded,
    is_sum,
    join,
    kind_of,
    listed,
    prepared_facts,
    refuse,
    scaled,
    tell_shares,
)
from surgery.passes.kinds.adapter_place import Placed, Placement, place, within_selection
from surgery.passes.kinds.adapter_tokens import put
from surgery.passes.kinds.adapter_variant import randomised
from surgery.passes.kinds.calls import ties_outside
from surgery.passes.kinds.delta import attach_one
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.parts import untie
from surgery.passes.operation import Resolved, SiteChange


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Attaches the merge of the adapters in ``op.data``.

    Raises S0775 (factors), S0784, S0785 and S0789 (what does not fit the model), S0786 (what cannot be merged exactly), S0787 (values that are not
    finite), S0791 (a selector that leaves nothing).
    """
    assert isinstance(op.data, AdapterInputs) and isinstance(op.method, MergeMethod)
    method, loaded = op.method, op.data.adapters
    weights = _Factors(op, method)
    placements = []
    for item in loaded:
        check_finite(item.adapter, op.study, item.span)
        check_bases(program, item.adapter, op.study, item.span)
        placement, warnings = place(program, item.adapter, item.span)
        for warning in [*warnings, *_randomised(item)]:
            op.warn(warning)
        placements.append(placement)
    places, left = _gather(program, op, placements, weights)
    whole = _whole(program, op, placements, weights)
    _told(op, placements, left)
    changes = put(program, op, loaded, whole)
    if not places and not whole and not changes:
        raise fail(
            "S0791", f"nothing of {listed([i.adapter.name for i in loaded])} stands at what is selected", op.origin.span, "merged here",
            notes=[f"{i.adapter.name} has parts at {_few(program, p)}" for i, p in zip(loaded, placements, strict=True)],
            help="select what the adapters change, or leave the selector out",
        )  # fmt: skip
    moved = [name for name, parts in whole.items() if not parts]
    whole = {name: parts for name, parts in whole.items() if parts}
    before = kept(program, places, whole) if op.study is not None and is_sum(method) else None
    attach.freeze_base(program)
    program.frozen -= {program.aliases.get(n, n) for n in moved}
    touched: dict[str, fx.GraphModule] = {}
    by_layer = [(site, m) for site, m in op.data.layers]
    methods = [_method_of(here.site, by_layer, method) for here in places]
    prepared = prepared_facts(op, method, places)
    shares: list[tuple[str, Expr]] = []
    for i, (here, own) in enumerate(zip(places, methods, strict=True)):
        joined = join(op, own, here, prepared.get(str(i), ()))
        if joined.share is not None:
            shares.append((here.site.role, joined.share))
        change = _attach(program, op, here, joined, touched)
        changes.append(replace(change, note="; ".join(filter(None, (change.note, _by_whom(here, loaded))))))
        _shift(program, op, here)
    for gm in touched.values():
        attach.recompile_later(gm)
    tied = {n for p in placements for n in p.tied}
    changes += [_replace(program, op, method, name, parts, name in tied) for name, parts in whole.items()]
    tell_shares(op, shares)
    if before is not None and not shares and (places or whole):
        biases = [h.site.bias for h in places if any(p.shift is not None for p in h.parts)]
        claim = sum_claim(before, program, places, [*whole, *biases], str(method.name), op.origin.span)
        if claim is not None:
            op.claim(claim)
    return changes


# ------------------------------------------------------------------ what is merged where


class _Factors:
    """The factors of a statement by place, divided by their sum where the method says so. Raises S0775 for those that do not go with it."""

    def __init__(self, op: Resolved, method: MergeMethod) -> None:
        assert isinstance(op.data, AdapterInputs)
        self.by_layer = [(site, self._settled(op, method, given)) for site, given in op.data.factors]
        self.elsewhere = self.by_layer[0][1] if self.by_layer else self._settled(op, method, [i.weight for i in op.data.adapters])

    @staticmethod
    def _settled(op: Resolved, method: MergeMethod, given: Sequence[float]) -> list[float]:
        total, divides = sum(given), bool(getattr(method, "normalize", False))
        why = "the factors sum to zero, and it divides by their sum" if divides and abs(total) < 1e-8 else ""
        if why := why or (method.check(given) if kind_of(method) == "change" else ""):
            raise fail("S0775", f"merge {op.origin.method}: {why}", op.origin.span, "these factors", help="change the factors behind `of`")
        return [w / total for w in given] if divides else list(given)

    def at(self, role: str, path: str) -> list[float]:
        """One factor for each adapter at a place; outside of the layers those of the first layer."""
        return next((own for region, own in self.by_layer if _inside(region, role, path)), self.elsewhere)


def _inside(region: Site, role: str, path: str) -> bool:
    from surgery.passes.resolve import within

    return within(role, region.role) or bool(region.path and path.startswith(f"{region.path}."))


def _randomised(item: Loaded) -> list[Any]:
    if not randomised(item.adapter):
        return []
    return [
        error(
            "S0795", f"{item.adapter.name} started from a randomised decomposition of the base, which cannot be repeated exactly", item.span, "merged here",
            severity=Severity.WARNING, notes=("the full decomposition takes its place",),
            help="save it with `path_initial_model_for_weight_conversion`: peft then writes a LoRA for the original base",
        )
    ]  # fmt: skip


def _gather(program: Program, op: Resolved, placements: Sequence[Placement], weights: _Factors) -> tuple[list[Here], dict[str, list[str]]]:
    """The places in model order with what stands there, and of each adapter the roles that the selector leaves out."""
    found: dict[str, list[tuple[Placed, float, str]]] = {}
    left: dict[str, list[str]] = {}
    for i, placement in enumerate(placements):
        for part in placement.parts.values():
            chosen = within_selection(program, part, op.sites) if op.sites else [part]
            if not chosen:
                left.setdefault(placement.adapter.name, []).append(part.site.role)
            for each in chosen:
                found.setdefault(each.site.role, []).append((each, weights.at(each.site.role, each.site.path)[i], placement.adapter.name))
    order = {name: i for i, name in enumerate(program.weights)}
    out = [
        Here(
            parts[0][0].site,
            parts[0][0].geometry,
            tuple(p for p, _, _ in parts),
            tuple(w for _, w, _ in parts),
            tuple(n for _, _, n in parts),
        )
        for parts in found.values()
    ]
    out.sort(key=lambda h: (order.get(program.aliases.get(h.site.weight, h.site.weight), len(order)), h.site.rows, h.site.role))
    return out, left


def _whole(program: Program, op: Resolved, placements: Sequence[Placement], weights: _Factors) -> dict[str, list[tuple[float, str, Expr]]]:
    """Tensors of the base that adapters replace, by first name: factor, adapter and value of each."""
    names = {n for s in op.sites for n in (s.weight, s.bias, *s.parameters) if n} if op.sites else None
    assert isinstance(op.data, AdapterInputs)
    found: dict[str, list[tuple[float, str, Expr]]] = {}
    for i, placement in enumerate(placements):
        for name, expr in placement.whole.items():
            mine = {name, program.aliases.get(name, name)}
            if names is not None and not mine & names:
                continue
            old = program.weights[program.aliases.get(name, name)]
            if name in placement.adapter.copies and is_copy(op.study, expr, old):
                continue
            found.setdefault(name, []).append((weights.at("", name)[i], placement.adapter.name, expr))
    return found


def _told(op: Resolved, placements: Sequence[Placement], left: Mapping[str, Sequence[str]]) -> None:
    """Lines of the plan: what was carried over, what went with dropped layers, what the selector leaves out."""
    for p in placements:
        if p.carried:
            op.tell(f"{p.adapter.name} was trained before the cut and is carried over")
        if p.dropped:
            some = ", ".join(dict.fromkeys(p.dropped[:3])) + (", ..." if len(p.dropped) > 3 else "")
            op.tell(f"{plural(len(p.dropped), 'part')} of {p.adapter.name} went with what was dropped: {some}")
        if out := left.get(p.adapter.name):
            op.tell(f"left out by the selector: {plural(len(out), 'part')} of {p.adapter.name}, {', '.join(group_roles(list(out))[:3])}")


def _few(program: Program, placement: Placement) -> str:
    roles = group_roles([p.site.role for p in placement.parts.values()])
    return ", ".join(roles[:3]) + (", ..." if len(roles) > 3 else "") if roles else "no weight"


def _by_whom(here: Here, loaded: Sequence[Loaded]) -> str:
    """A note where not all adapters have a part."""
    return "" if len(here.names) == len(loaded) else f"of {listed(here.names)} alone"


def _method_of(site: Site, layers: Sequence[tuple[Site, MergeMethod]], method: MergeMethod) -> MergeMethod:
    return next((own for region, own in layers if _inside(region, site.role, site.path)), method)


# ------------------------------------------------------------------ attaching


def _attach(program: Program, op: Resolved, here: Here, joined: Joined, touched: dict[str, fx.GraphModule]) -> SiteChange:
    inner = replace(op, verb=joined.method.verb, methods=(joined.method,), sites=(here.site,))
    change = attach_one(program, inner, here.site, joined.method, {}, touched)
    attached = program.attachments[-1]
    for name in attached.tensors:
        leaf = name.rpartition(".")[2]
        given = joined.tensors[leaf]
        program.weights[name] = cast(given, program.weights[name].dtype)
        program.journal.record(name, op.origin)
    return change


def _shift(program: Program, op: Resolved, here: Here) -> None:
    """Biases behind ``B`` add to the bias of the layer."""
    terms = [
        scaled(part.shift, weight * float(part.method.scale()))  # type: ignore[attr-defined]
        for part, weight in zip(here.parts, here.weights, strict=True) if part.shift is not None
    ]  # fmt: skip
    if not terms:
        return
    if not here.site.bias or here.site.rows:
        raise refuse(op, here, "an adapter has a bias behind its factors, and the layer has none", "train the adapter without `lora_bias`")
    name = program.aliases.get(here.site.bias, here.site.bias)
    old = program.weights[name]
    program.weights[name] = cast(Add(old.shape, "float32", (cast(old, "float32"), *terms)), old.dtype)
    program.frozen.discard(name)
    program.journal.record(name, op.origin)


def _replace(
    program: Program, op: Resolved, method: MergeMethod, name: str, parts: Sequence[tuple[float, str, Expr]], tied: bool
) -> SiteChange:
    """A tensor of the base that adapters trained whole: theirs, or the sum of their differences from the base. What is tied to it gets that, too, or
    stays as it was."""
    if not tied and ties_outside(program, (name,)):
        untie(program, (name,))
    first = program.aliases.get(name, name)
    old = program.weights[first]
    if len(parts) == 1 and parts[0][0] == 1.0:
        new: Expr = cast(parts[0][2], old.dtype)
    elif is_sum(method):
        rest = 1.0 - sum(w for w, _, _ in parts)
        terms = [Scale(old.shape, "float32", cast(old, "float32"), rest)] if rest else []
        new = cast(Add(old.shape, "float32", (*terms, *(scaled(cast(e, "float32"), w) for w, _, e in parts))), old.dtype)
    else:
        raise fail(
            "S0786", f"merge {op.origin.method} merges low-rank changes, and {listed([n for _, n, _ in parts])} trained `{name}` whole", op.origin.span,
            "merged here", help="merge with `linear`, `cat` or `svd`, which add the differences of such tensors",
        )  # fmt: skip
    program.weights[first] = new
    masked.keep_mask(program, first)
    program.frozen.discard(first)
    program.journal.record(first, op.origin)
    size = math.prod(old.shape)
    return SiteChange(
        f'"{name}"',
        name,
        shape_before=old.shape,
        shape_after=old.shape,
        trainable=size,
        note=f"trained whole by {listed([n for _, n, _ in parts])}",
    )
