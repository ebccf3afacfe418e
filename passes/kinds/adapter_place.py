"""Where the parts of an adapter stand in a program: by path, through cuts and new numbers of layers, and restricted by selectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from surgery.core.diagnostics import fail
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model.adapter import Adapter, Low, Rows
from surgery.model.cut_attached import Around
from surgery.model.dims.masks import to_ranges
from surgery.model.past import Ancestor
from surgery.model.program import Program
from surgery.model.weights import Apply, Concat, Expr, Reshape, Scale, Update, cast, select
from surgery.passes.kinds.adapter_frames import (
    Frame,
    bare_parameter,
    by_path,
    expert_sites,
    faults_of,
    fitted,
    frames_of,
    geometry_then,
    named_otherwise,
    refusal,
)
from surgery.passes.kinds.adapter_order import ordered
from surgery.passes.kinds.adapter_variant import Variant, plain, variant
from surgery.passes.kinds.adapter_whole import stuck, whole
from surgery.passes.kinds.delta_method import DeltaMethod
from surgery.passes.kinds.follow import follow_delta
from surgery.passes.kinds.geometry import Geometry


@dataclass(frozen=True)
class Placed:
    """One part of an adapter at one site: ``method`` computes its change from ``tensors`` (expressions, in the layout of the method).

    ``weight`` is the program's stored weight, ``origin`` the one that the part was trained on, where it is known, and ``direct`` says that the two
    are one.
    """

    site: Site
    geometry: Geometry
    method: DeltaMethod
    tensors: Mapping[str, Expr]
    weight: Expr
    shift: Expr | None = None
    origin: Expr | None = None
    direct: bool = True

    def low(self) -> tuple[Expr, Expr, float] | None:
        """``A``, ``B`` and scale of a plain low-rank change that equals this one, None where there is none (or the weight for it is not known)."""
        method: Any = self.method
        if method.wants_weight():
            return None
        a, b, scale = self.tensors["A"], self.tensors["B"], float(method.scale())
        rebase = method.rebase(self.geometry)
        if rebase is None:
            return a, b, scale
        if self.origin is None:
            return None
        params = (*((k, v) for k, v in method.params().items() if k not in ("seed", "shared")), ("site", self.geometry.pairs()))
        specs = {s.name: s for s in method.tensors(self.geometry)}
        first = {
            n: Apply(s.shape, "float32", f"{method.verb}/{method.name}:{s.init}", (self.origin,), params, s.output)
            for n, s in specs.items()
        }
        minus = Scale(first["B"].shape, "float32", first["B"], -1.0)
        return _beside((a, first["A"]), 0), _beside((b, minus), 1), scale


def _beside(parts: tuple[Expr, ...], axis: int) -> Expr:
    shape = list(parts[0].shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    return Concat(tuple(shape), "float32", parts, axis)


@dataclass
class Placement:
    """All of one adapter: its ``parts`` by path in the program, tensors of the base that it replaces by name, and what was ``dropped``:
    modules of the base that earlier statements took away. ``carried`` says that something was cut on the way, ``tied`` are those that stay one
    tensor with what they are tied to."""

    adapter: Adapter
    parts: dict[str, Placed] = field(default_factory=dict)
    whole: dict[str, Expr] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    carried: bool = False
    tied: set[str] = field(default_factory=set)


def place(program: Program, adapter: Adapter, span: Span) -> tuple[Placement, list[Any]]:
    """Every part at its site, and warnings.

    Raises S0783 (a layer that the config leaves out), S0784 (modules that the model does not have), S0785 (shapes that do not fit), S0789 (what cannot be carried over a cut).
    """
    adapter = ordered(program, adapter, span)
    sites = by_path(program)
    frames = frames_of(program, adapter)
    faults = [(faults_of(program, adapter, frame, sites), frame) for frame in frames]
    found = next((frame for problems, frame in faults if not problems), None)
    if found is None:
        problems, _ = min(faults, key=lambda f: len(f[0]))
        raise refusal(adapter, problems, span, list(sites))
    if adapter.left_out[0]:
        path, field_ = adapter.left_out
        raise fail(
            "S0783", f"{adapter.name} has tensors for `{path}`, and its config leaves that layer out (`{field_}`)", span, "merged here",
            notes=("peft puts nothing onto a layer that the config does not name",), help=f"correct `{field_}`",
        )  # fmt: skip
    out = Placement(adapter)
    for low in adapter.parts.values():
        if low.experts:
            _experts(program, adapter, low, found, out, span)
            continue
        here = found.find(f"{low.path}.weight")
        if here is None:
            out.dropped.append(low.path)
            continue
        name, was = here
        placed = _placed(program, adapter, low, sites[name.removesuffix(".weight")], was, span)
        out.parts[placed.site.path] = placed
        out.carried |= was.cut
    for part in adapter.dense.values():
        made = whole(program, adapter, part, found, sites, span)
        if made is None:
            out.dropped.append(part.path)
            continue
        out.whole |= made[0]
        out.carried |= made[1]
    for rows in adapter.rows.values():
        here = found.find(f"{rows.path}.weight")
        if here is None:
            out.dropped.append(rows.path)
            continue
        out.whole[here[0]] = _rows(program, adapter, rows, *here, span)
        out.tied.add(here[0])
        out.carried |= here[1].cut
    for key, load in adapter.whole.items():
        here = found.find(key)
        if here is None:
            out.dropped.append(key.rpartition(".")[0])
            continue
        name, was = here
        if was.why:
            raise stuck(adapter, key, was.why, span)
        expr: Expr = load
        for axis, mask in enumerate(was.kept):
            expr = expr if mask is None else select(expr, axis, to_ranges(mask))
        out.whole[name] = expr
        out.carried |= was.cut
    return out, named_otherwise(program, adapter, span)


def _experts(program: Program, adapter: Adapter, low: Low, frame: Frame, out: Placement, span: Span) -> None:
    """Factors of a tensor of experts, at every part of it: ``A [experts, r, in]``, ``B [experts, out, r]``. They lose the experts and features that the
    tensor lost."""
    here = bare_parameter(program, adapter, frame, low)
    assert here is not None
    name, was = here
    if was.why:
        raise stuck(adapter, low.path, was.why, span)
    e, r = low.experts, low.a.shape[0] // low.experts
    a: Expr = Reshape((e, r, low.a.shape[1]), low.a.dtype, low.a)
    rows = low.b.shape[0]
    b: Expr = Reshape((e, rows, r), low.b.dtype, Reshape((rows, r, e), low.b.dtype, low.b), (2, 0, 1))
    weight = program.weights[program.aliases.get(name, name)]
    for site in expert_sites(program, name):
        geometry = geometry_then(program, site, was.shape)
        first, second = a, b
        if low.a.shape[1] != geometry.inp:  # trained on the parameter as it is stored, inputs first
            first, second = Reshape((e, r, rows), b.dtype, b, (0, 2, 1)), Reshape((e, a.shape[2], r), a.dtype, a, (0, 2, 1))
        if was.cut:
            first = _kept(_kept(first, 0, was.kept[0]), 2, was.kept[site.in_axis])
            second = _kept(_kept(second, 0, was.kept[0]), 1, was.kept[site.out_axis])
            geometry = geometry_then(program, site, weight.shape)
            out.carried = True
        if site.rows:
            second = select(second, 1, tuple(site.rows))
        chosen = variant(adapter, replace(low, a=first, b=second), span)
        tensors = {n: cast(x, "float32") for n, x in chosen.tensors.items()}
        direct = was.source is weight and not was.cut
        out.parts[site.role] = Placed(site, geometry, chosen.method, tensors, weight, None, was.source, direct)


def _kept(expr: Expr, axis: int, mask: np.ndarray | None) -> Expr:
    return expr if mask is None else select(expr, axis, to_ranges(mask))


def _rows(program: Program, adapter: Adapter, rows: Rows, name: str, was: Ancestor, span: Span) -> Expr:
    """A table with some rows in the place of its own; those that were taken out of the table stay out."""
    if was.why:
        raise stuck(adapter, rows.path, was.why, span)
    left = was.kept[0] if was.kept else None
    where = {i: int(left[:i].sum()) if left is not None else i for i in rows.indices if left is None or left[i]}
    old = program.weights[program.aliases.get(name, name)]
    part: Expr = cast(rows.stored, "float32")
    if was.kept and was.kept[1] is not None:
        part = select(part, 1, to_ranges(was.kept[1]))
    order = sorted((n for n, i in enumerate(rows.indices) if i in where), key=rows.indices.__getitem__)
    if not order:
        return cast(old, "float32")
    if order != list(range(len(rows.indices))):
        part = select(part, 0, tuple((i, i + 1) for i in order))
    return Update(
        old.shape, "float32", cast(old, "float32"), part, 0, tuple((where[rows.indices[i]], where[rows.indices[i]] + 1) for i in order)
    )


# ------------------------------------------------------------------ one part


def _placed(program: Program, adapter: Adapter, low: Low, site: Site, was: Ancestor, span: Span) -> Placed:
    if was.why:
        raise stuck(adapter, low.path, was.why, span)
    weight = program.weights[program.aliases.get(site.weight, site.weight)]
    now = geometry_then(program, site, weight.shape)
    then = geometry_then(program, site, was.shape)
    chosen: Variant = variant(adapter, fitted(low, then), span)
    tensors = {n: cast(e, "float32") for n, e in chosen.tensors.items()}
    part = Placed(
        site,
        then,
        chosen.method,
        tensors,
        weight,
        None if low.shift is None else cast(low.shift, "float32"),
        was.source,
        was.source is weight,
    )
    if was.source is None and not was.cut:
        part = replace(part, origin=weight, direct=True)
    if not was.cut:
        return part
    if chosen.method.rebase(then):
        plain_ = part.low()
        if plain_ is None:
            raise stuck(adapter, low.path, "its start comes from the weight before the cut, which is not stored any more", span)
        a, b, scale = plain_
        part = replace(part, method=plain(a.shape[0], scale, adapter.dropout), tensors={"A": a, "B": b})
    follow = follow_delta(part.method, then, Around(was.kept, (), then.groups))
    if isinstance(follow, str):
        raise stuck(adapter, low.path, follow, span)
    given: dict[str, Expr] = dict(part.tensors)
    if follow.rewrite:
        if was.source is None:
            raise stuck(
                adapter,
                low.path,
                f"its {next(iter(follow.rewrite))} depends on the weight before the cut, which is not stored any more",
                span,
            )
        given |= {n: make({**part.tensors, "weight": was.source}) for n, make in follow.rewrite.items()}
    cut: dict[str, Expr] = {}
    for name, expr in given.items():
        for axis, mask in enumerate(follow.tensors.get(name, ())):
            expr = expr if mask is None else select(expr, axis, to_ranges(mask))
        cut[name] = expr
    shift = part.shift
    if shift is not None and was.kept[site.out_axis] is not None:
        shift = select(shift, 0, to_ranges(was.kept[site.out_axis]))  # type: ignore[arg-type]
    return replace(part, geometry=now, tensors=cut, shift=shift, direct=False)


# ------------------------------------------------------------------ selectors


def within_selection(program: Program, placed: Placed, sites: Iterable[Site]) -> list[Placed]:
    """The part itself where a selector names it whole, its slices where one names some of what it stands on, else nothing."""
    from surgery.passes.resolve import within

    chosen = list(sites)
    site = placed.site
    if any(
        site.role == s.role or within(site.role, s.role) or (s.path == site.path and s.weight == site.weight and not s.rows) for s in chosen
    ):
        return [placed]
    if site.rows:
        return []  # a slice itself
    slices = [s for s in program.anatomy.sites if s.weight == site.weight and s.rows and s.path == site.path]
    some = [s for s in slices if any(s.role == c.role or within(s.role, c.role) for c in chosen)]
    if not some:
        return [placed] if any(c.is_region and site.weight in c.parameters for c in chosen) and not slices else []
    return [placed] if len(some) == len(slices) else [_slice(program, placed, s) for s in some]


def _slice(program: Program, placed: Placed, site: Site) -> Placed:
    """The part for some rows of the weight that it stands on."""
    low = placed.low() if placed.method.rebase(placed.geometry) else None
    if low is not None:
        a, b, scale = low
        placed = replace(
            placed, method=plain(a.shape[0], scale, float(getattr(placed.method, "dropout", 0.0))), tensors={"A": a, "B": b}, direct=False
        )
    tensors = {n: e if n == "A" else select(e, 0, tuple(site.rows)) for n, e in placed.tensors.items()}
    shift = None if placed.shift is None else select(placed.shift, 0, tuple(site.rows))
    shape = program.weights[program.aliases.get(site.weight, site.weight)].shape
    return replace(placed, site=site, geometry=geometry_then(program, site, shape), tensors=tensors, shift=shift)
