"""What several adapters become at one place: the sum of their changes, a merged change factored again, or new factors from their terms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from surgery.core.diagnostics import fail
from surgery.core.plan import plural
from surgery.core.site import Site
from surgery.core.source import NOWHERE, Span
from surgery.model.adapter import Adapter
from surgery.model.realise import realise
from surgery.model.weights import Apply, Concat, Expr, Init, Scale
from surgery.passes.kinds import attach
from surgery.passes.kinds.adapter_place import Placed
from surgery.passes.kinds.adapter_variant import plain
from surgery.passes.kinds.delta_method import DeltaMethod
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.kinds.lowrank import factor_shapes
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.merge_inputs import Operands, Source
from surgery.passes.operation import Resolved


@dataclass(frozen=True)
class Loaded:
    """One adapter of a merge with its factor, and where the statement names it."""

    adapter: Adapter
    weight: float
    span: Span = NOWHERE


@dataclass(frozen=True)
class AdapterInputs:
    """What a merge of adapters names, in the order written; the method of each layer where its parameters differ by layer, and the factors of
    each layer where the statement gives them by layer."""

    adapters: tuple[Loaded, ...]
    layers: tuple[tuple[Site, MergeMethod], ...] = ()
    factors: tuple[tuple[Site, tuple[float, ...]], ...] = ()


@dataclass(frozen=True)
class Here:
    """The parts of all adapters at one place, in the order in which the statement names them."""

    site: Site
    geometry: Geometry
    parts: tuple[Placed, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Joined:
    """What is attached at one place. ``share`` is an expression of what a smaller rank keeps of the change (kept, whole), None where nothing is lost."""

    method: DeltaMethod
    tensors: Mapping[str, Expr]
    share: Expr | None = None


def kind_of(method: MergeMethod) -> str:
    """What a method does with adapters: ``sum``, ``change`` or ``terms``."""
    return str(getattr(method, "adapters", ""))


def is_sum(method: MergeMethod) -> bool:
    """Whether the merge is the weighted sum of changes, up to the rank of its factors."""
    return (kind_of(method) == "sum" or bool(getattr(method, "thin", False))) and not getattr(method, "factorwise", False)


def listed(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def join(op: Resolved, method: MergeMethod, here: Here, prepared: tuple[Any, ...]) -> Joined:
    if kind_of(method) == "sum" and len(here.parts) == 1 and here.weights == (1.0,):
        part = here.parts[0]
        if part.direct or not part.method.rebase(part.geometry):  # type: ignore[arg-type]
            return Joined(part.method, part.tensors)
    if here.geometry.experts and (kind_of(method) != "sum" or getattr(method, "factorwise", False)):
        raise refuse(
            op,
            here,
            "it is a tensor of experts, whose changes are added and not merged otherwise",
            "`merge linear` and `merge cat` add them",
        )
    if getattr(method, "factorwise", False):
        return _factorwise(op, method, here)
    if kind_of(method) == "sum":
        return _sum(op, here)
    if kind_of(method) == "terms":
        return _terms(op, method, here)
    return _change(op, method, here, prepared)


def refuse(op: Resolved, here: Here, why: str, help: str) -> Exception:
    return fail(
        "S0786",
        f"merge {op.origin.method} cannot merge {listed(here.names)} exactly at {here.site.role}: {why}",
        op.origin.span,
        "merged here",
        help=help,
    )


FULL = "`merge svd(rank = full)` merges the changes themselves; or merge this adapter alone with factor 1 and fold it first"


def _lows(op: Resolved, here: Here) -> list[tuple[Expr, Expr, float]]:
    """``A``, ``B`` and scale of every part, the factors of the statement in the scales."""
    out = []
    for part, weight, name in zip(here.parts, here.weights, here.names, strict=True):
        low = part.low()
        if low is None:
            raise refuse(op, here, f"the change of {name} is no product of thin factors", FULL)
        out.append((low[0], low[1], weight * low[2]))
    return out


def _dropout(here: Here) -> float:
    """The adapters' dropout; the largest where they differ."""
    return max(float(getattr(p.method, "dropout", 0.0)) for p in here.parts)


def scaled(expr: Expr, factor: float) -> Expr:
    return expr if factor == 1.0 else Scale(expr.shape, "float32", expr, factor)


def _side(parts: Sequence[Expr], axis: int) -> Expr:
    if len(parts) == 1:
        return parts[0]
    shape = list(parts[0].shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    return Concat(tuple(shape), "float32", tuple(parts), axis)


def _sum(op: Resolved, here: Here) -> Joined:
    """The weighted sum: ``A = [w_i s_i A_i]``, ``B = [B_1, B_2, ...]``, scale 1."""
    lows = _lows(op, here)
    axis = 1 if here.geometry.experts else 0
    a = _side([scaled(a, s) for a, _, s in lows], axis)
    b = _side([b for _, b, _ in lows], axis + 1)
    return Joined(plain(a.shape[axis], 1.0, _dropout(here)), {"A": a, "B": b})


def _equal_ranks(op: Resolved, here: Here, lows: Sequence[tuple[Expr, Expr, float]]) -> int:
    ranks = [a.shape[0] for a, _, _ in lows]
    if len(set(ranks)) > 1:
        raise refuse(
            op,
            here,
            f"their ranks are {listed([str(r) for r in ranks])}, and factors are merged one by one",
            "leave `factorwise` out: changes may have any ranks",
        )
    return ranks[0]


def _factorwise(op: Resolved, method: MergeMethod, here: Here) -> Joined:
    if getattr(method, "trim", "tensor") == "global":
        raise refuse(op, here, "factors have no common scale to be trimmed by", "write `trim = tensor` beside `factorwise = true`")
    lows = _lows(op, here)
    rank = _equal_ranks(op, here, lows)
    params = _params(method)
    more = (("scales", tuple(s for _, _, s in lows)), ("number", attach.seed_of(op.seed, op.name, here.site.role)))
    args = tuple(e for a, b, _ in lows for e in (a, b))
    made = [
        Apply(args[i].shape, "float32", f"merge/{method.name}:each", args, (*params, *more), output=i) for i in (0, 1)
    ]  # fmt: skip
    return Joined(plain(rank, 1.0, _dropout(here)), {"A": made[0], "B": made[1]})


def _terms(op: Resolved, method: MergeMethod, here: Here) -> Joined:
    lows = _lows(op, here)
    rank = int(getattr(method, "rank", 0)) or max(1, round(sum(a.shape[0] for a, _, _ in lows) / len(lows)))
    total = sum(a.shape[0] for a, _, _ in lows)
    if rank > total:
        raise refuse(op, here, f"rank {rank} is more than the {total} terms there are", "ask for a smaller rank")
    args = tuple(e for a, b, _ in lows for e in (a, b))
    params = (
        *_params(method),
        ("scales", tuple(s for _, _, s in lows)),
        ("size", rank),
        ("number", attach.seed_of(op.seed, op.name, here.site.role) if op.seed else 0),
    )
    shapes = ((rank, *lows[0][0].shape[1:]), (lows[0][1].shape[0], rank, *lows[0][1].shape[2:]))
    a, b = (Apply(shape, "float32", f"merge/{method.name}:terms", args, params, output=i) for i, shape in enumerate(shapes))
    return Joined(plain(rank, 1.0, _dropout(here)), {"A": a, "B": b})


def _params(method: MergeMethod) -> tuple[tuple[str, Any], ...]:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in method.params().items() if k not in ("seed", "weights", "vocab"))


def arguments(here: Here) -> tuple[tuple[Expr, ...], tuple[Any, ...]]:
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


def _change(op: Resolved, method: MergeMethod, here: Here, prepared: tuple[Any, ...]) -> Joined:
    geometry = here.geometry
    args, parts = arguments(here)
    ranks = [a.shape[0] for p in here.parts for a in [p.tensors["A"]]]
    most = min(geometry.out, geometry.fan_in)
    lows = all(p[0] == "low" for p in parts)
    everything = min(most, sum(ranks)) if lows and getattr(method, "thin", False) else most
    asked = getattr(method, "rank", "largest")
    size = everything if asked == "full" else max(ranks) if asked == "largest" else int(asked)
    if size > most:
        raise refuse(op, here, f"rank {size} is more than the {most} that this weight can have", "ask for a smaller rank")
    params = (
        *_params(method), ("parts", parts), ("weights", here.weights), ("size", size), ("site", geometry.pairs()),
        ("number", attach.seed_of(op.seed, op.name, here.site.role)), *((("prepared", prepared),) if prepared else ()),
    )  # fmt: skip
    shapes = (*factor_shapes(geometry, size), (2,))
    a, b, share = (Apply(shape, "float32", f"merge/{method.name}:change", args, params, output=i) for i, shape in enumerate(shapes))
    lossy = size < everything or getattr(method, "clamp", None) is not None
    return Joined(plain(size, 1.0, _dropout(here)), {"A": a, "B": b}, share if lossy else None)


def prepared_facts(op: Resolved, method: MergeMethod, places: Sequence[Here]) -> dict[str, tuple[Any, ...]]:
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
    standing = {n: dict(zip(h.names, h.weights, strict=True)) for n, h in zip(names, places, strict=True)}
    factors = {n: [own.get(i.adapter.name, 0.0) for i in op.data.adapters] for n, own in standing.items()}
    found = method.prepare(op, operands, sources, factors)
    # a place has the facts of the adapters that stand there
    everyone = [i.adapter.name for i in op.data.adapters]
    for n, here in zip(names, places, strict=True):
        if n in found and len(here.names) < len(everyone):
            first, *rest = found[n]
            found[n] = (tuple(f for f, name in zip(first, everyone, strict=True) if name in here.names), *rest)
    return found


def _alone(method: MergeMethod, here: Here, item: Loaded) -> Expr:
    """The change that one adapter makes at a place, zero where it has no part there."""
    mine = [p for p, name in zip(here.parts, here.names, strict=True) if name == item.adapter.name]
    if not mine:
        return Init(here.geometry.canonical, "float32", "zeros")
    args, parts = arguments(replace(here, parts=tuple(mine[:1])))
    params = (("part", parts[0]), ("site", here.geometry.pairs()))
    return Apply(here.geometry.canonical, "float32", f"merge/{method.name}:alone", args, params)


def tell_shares(op: Resolved, shares: Sequence[tuple[str, Expr]]) -> None:
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
    op.tell(
        f"the factors keep {100 * math.sqrt(max(0.0, worst)):.4g}% of the merged change (Frobenius norm) at {where}, where they keep least"
    )
