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
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from surgery.core.diagnostics import Severity, error, fail
from surgery.core.plan import group_roles, plural
from surgery.core.site import Site
from surgery.core.source import NOWHERE, Span
from surgery.model import masked
from surgery.model.adapter import Adapter
from surgery.model.program import Program
from surgery.model.realise import realise
from surgery.model.weights import Add, Apply, Concat, Expr, Init, Scale, cast
from surgery.passes.kinds import attach
from surgery.passes.kinds.adapter_checks import check_finite, is_copy
from surgery.passes.kinds.adapter_place import Placed, Placement, place, within_selection
from surgery.passes.kinds.adapter_variant import plain, randomised
from surgery.passes.kinds.calls import ties_outside
from surgery.passes.kinds.delta import attach_one
from surgery.passes.kinds.delta_method import DeltaMethod
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.merge_inputs import Operands, Source
from surgery.passes.kinds.parts import untie
from surgery.passes.operation import Resolved, SiteChange


@dataclass(frozen=True)
class Loaded:
    """One adapter of a merge with its factor, and where the statement names it."""

    adapter: Adapter
    weight: float
    span: Span = NOWHERE


@dataclass(frozen=True)
class AdapterInputs:
    """What a merge of adapters names, in the order written, and the method of each layer where its parameters differ by layer."""

    adapters: tuple[Loaded, ...]
    layers: tuple[tuple[Site, MergeMethod], ...] = ()


@dataclass(frozen=True)
class _Here:
    """The parts of all adapters at one place, in the order in which the statement names them."""

    site: Site
    geometry: Geometry
    parts: tuple[Placed, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class _Joined:
    """What is attached at one place. ``share`` is an expression of what a smaller rank keeps of the change (kept, whole), None where nothing is lost."""

    method: DeltaMethod
    tensors: Mapping[str, Expr]
    share: Expr | None = None


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Attaches the merge of the adapters in ``op.data``.

    Raises S0775 (factors), S0784, S0785 and S0789 (what does not fit the model), S0786 (what cannot be merged exactly), S0787 (values that are not
    finite), S0791 (a selector that leaves nothing).
    """
    assert isinstance(op.data, AdapterInputs) and isinstance(op.method, MergeMethod)
    method, loaded = op.method, op.data.adapters
    weights = _weights(op, method, [item.weight for item in loaded])
    placements = []
    for item in loaded:
        check_finite(item.adapter, op.study, item.span)
        placement, warnings = place(program, item.adapter, item.span)
        for warning in [*warnings, *_randomised(item)]:
            op.warn(warning)
        placements.append(placement)
    places, left = _gather(program, op, placements, weights)
    whole = _whole(program, op, placements)
    _told(op, placements, left)
    if not places and not whole:
        raise fail(
            "S0791", f"nothing of {_and([i.adapter.name for i in loaded])} stands at what is selected", op.origin.span, "merged here",
            notes=[f"{i.adapter.name} has parts at {_few(program, p)}" for i, p in zip(loaded, placements, strict=True)],
            help="select what the adapters change, or leave the selector out",
        )  # fmt: skip
    attach.freeze_base(program)
    touched: dict[str, fx.GraphModule] = {}
    by_layer = [(site, m) for site, m in op.data.layers]
    methods = [_method_of(here.site, by_layer, method) for here in places]
    prepared = _prepared(program, op, method, places)
    changes: list[SiteChange] = []
    shares: list[tuple[str, Expr]] = []
    for i, (here, own) in enumerate(zip(places, methods, strict=True)):
        joined = _join(op, own, here, prepared.get(str(i), ()))
        if joined.share is not None:
            shares.append((here.site.role, joined.share))
        change = _attach(program, op, here, joined, touched)
        changes.append(replace(change, note="; ".join(filter(None, (change.note, _by_whom(here, loaded))))))
        _shift(program, op, here)
    for gm in touched.values():
        attach.recompile_later(gm)
    changes += [_replace(program, op, method, name, parts) for name, parts in whole.items()]
    _tell_shares(op, shares)
    return changes


# ------------------------------------------------------------------ what is merged where


def kind_of(method: MergeMethod) -> str:
    """What a method does with adapters: ``sum``, ``change`` or ``terms``."""
    return str(getattr(method, "adapters", ""))


def _weights(op: Resolved, method: MergeMethod, given: Sequence[float]) -> list[float]:
    """The factors, divided by their sum where the method says so."""
    if not getattr(method, "normalize", False):
        return list(given)
    total = sum(given)
    if abs(total) < 1e-8:
        raise fail("S0775", f"merge {op.name}: the factors sum to zero, and it divides by their sum", op.origin.span, "these factors", help="change the factors behind `of`")
    return [w / total for w in given]


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


def _gather(
    program: Program, op: Resolved, placements: Sequence[Placement], weights: Sequence[float]
) -> tuple[list[_Here], dict[str, list[str]]]:
    """The places in model order with what stands there, and of each adapter the roles that the selector leaves out."""
    found: dict[str, list[tuple[Placed, float, str]]] = {}
    left: dict[str, list[str]] = {}
    for placement, weight in zip(placements, weights, strict=True):
        for part in placement.parts.values():
            chosen = within_selection(program, part, op.sites) if op.sites else [part]
            if not chosen:
                left.setdefault(placement.adapter.name, []).append(part.site.role)
            for each in chosen:
                found.setdefault(each.site.role, []).append((each, weight, placement.adapter.name))
    order = {name: i for i, name in enumerate(program.weights)}
    out = [
        _Here(parts[0][0].site, parts[0][0].geometry, tuple(p for p, _, _ in parts), tuple(w for _, w, _ in parts), tuple(n for _, _, n in parts))
        for parts in found.values()
    ]
    out.sort(key=lambda h: (order.get(program.aliases.get(h.site.weight, h.site.weight), len(order)), h.site.rows, h.site.role))
    return out, left


def _whole(program: Program, op: Resolved, placements: Sequence[Placement]) -> dict[str, list[tuple[float, str, Expr]]]:
    """Tensors of the base that adapters replace, by first name: factor, adapter and value of each."""
    names = {n for s in op.sites for n in (s.weight, s.bias, *s.parameters) if n} if op.sites else None
    assert isinstance(op.data, AdapterInputs)
    found: dict[str, list[tuple[float, str, Expr]]] = {}
    for placement, item in zip(placements, op.data.adapters, strict=True):
        for name, expr in placement.whole.items():
            mine = {name, program.aliases.get(name, name)}
            if names is not None and not mine & names:
                continue
            old = program.weights[program.aliases.get(name, name)]
            if name in placement.adapter.copies and is_copy(op.study, expr, old):
                continue
            found.setdefault(name, []).append((item.weight, placement.adapter.name, expr))
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


def _and(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _by_whom(here: _Here, loaded: Sequence[Loaded]) -> str:
    """A note where not all adapters have a part."""
    return "" if len(here.names) == len(loaded) else f"of {_and(here.names)} alone"


def _method_of(site: Site, layers: Sequence[tuple[Site, MergeMethod]], method: MergeMethod) -> MergeMethod:
    from surgery.passes.resolve import within

    for region, own in layers:
        if within(site.role, region.role) or (region.path and site.path.startswith(f"{region.path}.")):
            return own
    return method


# ------------------------------------------------------------------ one place


def _join(op: Resolved, method: MergeMethod, here: _Here, prepared: tuple[Any, ...]) -> _Joined:
    if kind_of(method) == "sum" and len(here.parts) == 1 and here.weights == (1.0,):
        part = here.parts[0]
        if part.direct or not part.method.rebase(part.geometry):  # type: ignore[arg-type]
            return _Joined(part.method, part.tensors)
    if getattr(method, "factorwise", False):
        return _factorwise(op, method, here)
    if kind_of(method) == "sum":
        return _sum(op, here)
    if kind_of(method) == "terms":
        return _terms(op, method, here)
    return _change(op, method, here, prepared)


def _refuse(op: Resolved, here: _Here, why: str, help: str) -> Exception:
    return fail(
        "S0786", f"merge {op.origin.method} cannot merge {_and(here.names)} exactly at {here.site.role}: {why}", op.origin.span, "merged here", help=help
    )


FULL = "`merge svd(rank = full)` merges the changes themselves; or merge this adapter alone with factor 1 and fold it first"


def _lows(op: Resolved, here: _Here) -> list[tuple[Expr, Expr, float]]:
    """``A``, ``B`` and scale of every part, the factors of the statement in the scales."""
    out = []
    for part, weight, name in zip(here.parts, here.weights, here.names, strict=True):
        low = part.low()
        if low is None:
            raise _refuse(op, here, f"the change of {name} is no product of thin factors", FULL)
        out.append((low[0], low[1], weight * low[2]))
    return out


def _dropout(here: _Here) -> float:
    """The adapters' dropout; the largest where they differ."""
    return max(float(getattr(p.method, "dropout", 0.0)) for p in here.parts)


def _scaled(expr: Expr, factor: float) -> Expr:
    return expr if factor == 1.0 else Scale(expr.shape, "float32", expr, factor)


def _side(parts: Sequence[Expr], axis: int) -> Expr:
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    return Concat(tuple(shape), "float32", tuple(parts), axis)


def _sum(op: Resolved, here: _Here) -> _Joined:
    """The weighted sum: ``A = [w_i s_i A_i]``, ``B = [B_1, B_2, ...]``, scale 1."""
    lows = _lows(op, here)
    a = _side([_scaled(a, s) for a, _, s in lows], 0)
    b = _side([b for _, b, _ in lows], 1)
    return _Joined(plain(a.shape[0], 1.0, _dropout(here)), {"A": a, "B": b})


def _equal_ranks(op: Resolved, here: _Here, lows: Sequence[tuple[Expr, Expr, float]]) -> int:
    ranks = [a.shape[0] for a, _, _ in lows]
    if len(set(ranks)) > 1:
        raise _refuse(op, here, f"their ranks are {_and([str(r) for r in ranks])}, and factors are merged one by one", "leave `factorwise` out: changes may have any ranks")
    return ranks[0]


def _factorwise(op: Resolved, method: MergeMethod, here: _Here) -> _Joined:
    if getattr(method, "trim", "tensor") == "global":
        raise _refuse(op, here, "factors have no common scale to be trimmed by", "write `trim = tensor` beside `factorwise = true`")
    lows = _lows(op, here)
    rank = _equal_ranks(op, here, lows)
    params = _params(method)
    more = (("scales", tuple(s for _, _, s in lows)), ("number", attach.seed_of(op.seed, op.name, here.site.role)))
    args = tuple(e for a, b, _ in lows for e in (a, b))
    made = [
        Apply(args[i].shape, "float32", f"merge/{method.name}:each", args, (*params, *more), output=i) for i in (0, 1)
    ]  # fmt: skip
    return _Joined(plain(rank, 1.0, _dropout(here)), {"A": made[0], "B": made[1]})


def _terms(op: Resolved, method: MergeMethod, here: _Here) -> _Joined:
    lows = _lows(op, here)
    rank = int(getattr(method, "rank", 0)) or max(1, round(sum(a.shape[0] for a, _, _ in lows) / len(lows)))
    total = sum(a.shape[0] for a, _, _ in lows)
    if rank > total:
        raise _refuse(op, here, f"rank {rank} is more than the {total} terms there are", "ask for a smaller rank")
    args = tuple(e for a, b, _ in lows for e in (a, b))
    params = (*_params(method), ("scales", tuple(s for _, _, s in lows)), ("size", rank), ("number", attach.seed_of(op.seed, op.name, here.site.role) if op.seed else 0))
    shapes = ((rank, *lows[0][0].shape[1:]), (lows[0][1].shape[0], rank, *lows[0][1].shape[2:]))
    a, b = (Apply(shape, "float32", f"merge/{method.name}:terms", args, params, output=i) for i, shape in enumerate(shapes))
    return _Joined(plain(rank, 1.0, _dropout(here)), {"A": a, "B": b})


def _params(method: MergeMethod) -> tuple[tuple[str, Any], ...]:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in method.params().items() if k not in ("seed", "weights", "vocab"))


def _arguments(here: _Here) -> tuple[tuple[Expr, ...], tuple[Any, ...]]:
    """The tensors of all parts and how each is computed from its own (see :mod:`surgery.passes.kinds.adapter_math`)."""
    args: list[Expr] = []
    parts: list[Any] = []
    for part in here.parts:
        low = part.low()
        if low is not None:
            args += low[:2]
            parts.append(("low", low[2]))
            continue
        method = part.method
        pairs = tuple((k, v) for k, v in method.params().items() if k not in ("seed", "shared"))
        args += [*part.tensors.values(), part.weight]
        parts.append(("method", f"{method.verb}/{method.name}", pairs, tuple(part.tensors)))
    return tuple(args), tuple(parts)


def _change(op: Resolved, method: MergeMethod, here: _Here, prepared: tuple[Any, ...]) -> _Joined:
    geometry = here.geometry
    args, parts = _arguments(here)
    ranks = [a.shape[0] for p in here.parts for a in [p.tensors["A"]]]
    most = min(geometry.out, geometry.fan_in)
    lows = all(p[0] == "low" for p in parts)
    everything = min(most, sum(ranks)) if lows and getattr(method, "thin", False) else most
    asked = getattr(method, "rank", "largest")
    size = everything if asked == "full" else max(ranks) if asked == "largest" else int(asked)
    if size > most:
        raise _refuse(op, here, f"rank {size} is more than the {most} that this weight can have", "ask for a smaller rank")
    params = (
        *_params(method), ("parts", parts), ("weights", here.weights), ("size", size), ("site", geometry.pairs()),
        ("number", attach.seed_of(op.seed, op.name, here.site.role)), *((("prepared", prepared),) if prepared else ()),
    )  # fmt: skip
    from surgery.passes.kinds.lowrank import factor_shapes

    shapes = (*factor_shapes(geometry, size), (2,))
    a, b, share = (Apply(shape, "float32", f"merge/{method.name}:change", args, params, output=i) for i, shape in enumerate(shapes))
    lossy = size < everything or getattr(method, "clamp", None) is not None
    return _Joined(plain(size, 1.0, _dropout(here)), {"A": a, "B": b}, share if lossy else None)


def _prepared(program: Program, op: Resolved, method: MergeMethod, places: Sequence[_Here]) -> dict[str, tuple[Any, ...]]:
    """Facts of whole adapters that a place's merge needs, by number of the place; computed when weights may be read."""
    if kind_of(method) != "change" or op.study is None or getattr(method, "factorwise", False):
        return {}
    assert isinstance(op.data, AdapterInputs)
    names = [str(i) for i in range(len(places))]
    operands = {
        n: Operands(Init(h.geometry.canonical, "float32", "zeros"), tuple(_alone(method, h, i) for i in op.data.adapters))
        for n, h in zip(names, places, strict=True)
    }
    sources = [Source(i.adapter.name, {}, {}, i.weight, span=i.span) for i in op.data.adapters]
    found = method.prepare(op, operands, sources)
    # a place has the facts of the adapters that stand there
    everyone = [i.adapter.name for i in op.data.adapters]
    for n, here in zip(names, places, strict=True):
        if n in found and len(here.names) < len(everyone):
            first, *rest = found[n]
            found[n] = (tuple(f for f, name in zip(first, everyone, strict=True) if name in here.names), *rest)
    return found


def _alone(method: MergeMethod, here: _Here, item: Loaded) -> Expr:
    """The change that one adapter makes at a place, zero where it has no part there."""
    mine = [p for p, name in zip(here.parts, here.names, strict=True) if name == item.adapter.name]
    if not mine:
        return Init(here.geometry.canonical, "float32", "zeros")
    args, parts = _arguments(replace(here, parts=tuple(mine[:1])))
    params = (("part", parts[0]), ("site", here.geometry.pairs()))
    return Apply(here.geometry.canonical, "float32", f"merge/{method.name}:alone", args, params)


def _tell_shares(op: Resolved, shares: Sequence[tuple[str, Expr]]) -> None:
    """What smaller ranks keep, where it is least: a number of compile, which may read weights."""
    if not shares:
        return
    if op.study is None:
        op.tell(f"the rank may be smaller than that of the merged change at {plural(len(shares), 'place')}: compile says what is kept")
        return
    memo = op.study.tensors._memo
    worst, where = 1.0, shares[0][0]
    for role, expr in shares:
        kept, whole = realise(expr, memo, functions=op.study.tensors.functions).tolist()
        share = kept / whole if whole > 0 else 1.0
        if share < worst:
            worst, where = share, role
    op.tell(f"the factors keep {100 * math.sqrt(max(0.0, worst)):.4g}% of the merged change (Frobenius norm) at {where}, where they keep least")


# ------------------------------------------------------------------ attaching


def _attach(program: Program, op: Resolved, here: _Here, joined: _Joined, touched: dict[str, fx.GraphModule]) -> SiteChange:
    inner = replace(op, verb=joined.method.verb, methods=(joined.method,), sites=(here.site,))
    change = attach_one(program, inner, here.site, joined.method, {}, touched)
    attached = program.attachments[-1]
    for name in attached.tensors:
        leaf = name.rpartition(".")[2]
        given = joined.tensors[leaf]
        program.weights[name] = cast(given, program.weights[name].dtype)
        program.journal.record(name, op.origin)
    return change


def _shift(program: Program, op: Resolved, here: _Here) -> None:
    """Biases behind ``B`` add to the bias of the layer."""
    terms = [
        _scaled(part.shift, weight * float(part.method.scale()))  # type: ignore[attr-defined]
        for part, weight in zip(here.parts, here.weights, strict=True) if part.shift is not None
    ]  # fmt: skip
    if not terms:
        return
    if not here.site.bias or here.site.rows:
        raise _refuse(op, here, "an adapter has a bias behind its factors, and the layer has none", "train the adapter without `lora_bias`")
    name = program.aliases.get(here.site.bias, here.site.bias)
    old = program.weights[name]
    program.weights[name] = cast(Add(old.shape, "float32", (cast(old, "float32"), *terms)), old.dtype)
    program.frozen.discard(name)
    program.journal.record(name, op.origin)


def _replace(program: Program, op: Resolved, method: MergeMethod, name: str, parts: Sequence[tuple[float, str, Expr]]) -> SiteChange:
    """A tensor of the base that adapters trained whole: theirs, or the sum of their differences from the base."""
    if ties_outside(program, (name,)):
        untie(program, (name,))
    first = program.aliases.get(name, name)
    old = program.weights[first]
    if len(parts) == 1 and parts[0][0] == 1.0:
        new: Expr = cast(parts[0][2], old.dtype)
    elif kind_of(method) == "sum" or getattr(method, "thin", False):
        rest = 1.0 - sum(w for w, _, _ in parts)
        terms = [Scale(old.shape, "float32", cast(old, "float32"), rest)] if rest else []
        new = cast(Add(old.shape, "float32", (*terms, *(_scaled(cast(e, "float32"), w) for w, _, e in parts))), old.dtype)
    else:
        raise fail(
            "S0786", f"merge {op.origin.method} merges low-rank changes, and {_and([n for _, n, _ in parts])} trained `{name}` whole", op.origin.span,
            "merged here", help="merge with `linear`, `cat` or `svd`, which add the differences of such tensors",
        )  # fmt: skip
    program.weights[first] = new
    masked.keep_mask(program, first)
    program.frozen.discard(first)
    program.journal.record(first, op.origin)
    size = math.prod(old.shape)
    return SiteChange(f'"{name}"', name, shape_before=old.shape, shape_after=old.shape, trainable=size, note=f"trained whole by {_and([n for _, n, _ in parts])}")
