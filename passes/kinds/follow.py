"""How attached modules lose the units that their site loses.

A tensor of a method follows its site where a size of the site appears in its shape: that is found by asking the method for its tensors at
a slightly larger site, one size at a time. That the method's algebra allows it is then tried on a small instance with random numbers:
the change of the small weight without some units must equal the small change without them. A method may state what stays of its tensors
(``kept(site, masks)``, with masks of ``out``, ``in`` and ``experts``); one whose tensors must take other values to stay right says which
(``recut(site, masks)``, as in :class:`Follow`). Otherwise the cut is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.model.cut_attached import Around, Follow, Kept
from surgery.model.dims.masks import Mask
from surgery.passes.kinds.attach import TensorSpec

Shapes = Callable[[Any], Iterable[TensorSpec]]


def followed_axes(
    specs: Shapes, site: Any, sizes: Mapping[str, tuple[str, ...]], steps: Mapping[str, int]
) -> dict[str, tuple[str, ...]] | str:
    """For each tensor the name of the size that each of its axes follows ("" for none), or why that cannot be told.

    ``sizes`` maps a name to the fields of ``site`` that grow together for it, ``steps`` a name to how far. A spec that states ``follows`` is
    believed.
    """
    base = {s.name: s for s in specs(site)}
    out = {name: [""] * len(s.shape) for name, s in base.items()}
    for what, fields in sizes.items():
        grown = replace(site, **{f: getattr(site, f) + steps[what] for f in fields})
        try:
            now = {s.name: s.shape for s in specs(grown)}
        except (ValueError, ZeroDivisionError, AssertionError, RuntimeError):
            return f"its tensors have no shapes at {what} + {steps[what]}"
        for name, spec in base.items():
            if spec.follows is not None:
                out[name] = list(spec.follows)
                continue
            if name not in now or len(now[name]) != len(spec.shape):
                return f"the number of its tensors depends on {what}"
            for axis, (old, new) in enumerate(zip(spec.shape, now[name], strict=True)):
                if old != new:
                    if out[name][axis]:
                        return f"`{name}` depends on {out[name][axis]} and {what} together"
                    out[name][axis] = what
    return {name: tuple(axes) for name, axes in out.items()}


def kept_of(
    axes: Mapping[str, tuple[str, ...]], masks: Mapping[str, Mask | None], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Kept] | str:
    """What stays of each tensor's axes, given what stays of the sizes they follow; a text where a size does not fit."""
    out: dict[str, Kept] = {}
    for name, follows in axes.items():
        kept = tuple(masks.get(what) if what else None for what in follows)
        for axis, mask in enumerate(kept):
            if mask is not None and len(mask) != shapes[name][axis]:
                return f"axis {axis} of `{name}` has {shapes[name][axis]} positions for {len(mask)} units"
        out[name] = kept
    return out


def fits(specs: Iterable[TensorSpec], shapes: Mapping[str, tuple[int, ...]], kept: Mapping[str, Kept]) -> str:
    """Whether a method at the smaller site wants what is left of its tensors; a text says what does not fit."""
    for spec in specs:
        left = tuple(n if m is None else int(m.sum()) for n, m in zip(shapes[spec.name], kept[spec.name], strict=True))
        if left != tuple(spec.shape):
            return f"`{spec.name}` would be {list(left)} and the smaller site wants {list(spec.shape)}"
    return ""


def take_all(t: Tensor, kept: Kept) -> Tensor:
    """A tensor without the removed positions of its axes."""
    for axis, mask in enumerate(kept):
        if mask is not None:
            t = t.index_select(axis, torch.from_numpy(np.flatnonzero(mask)))
    return t


# ---------------------------------------------------------------- delta


def follow_delta(method: Any, site: Any, around: Around) -> Follow | str:
    """How a change of a weight follows its site's rows and columns."""
    if not around.weight:
        return "the analysis does not see its weight"
    into = _in_axis(site, len(around.weight))
    whole, inner = around.weight[site.out_axis], around.weight[into]
    experts = around.weight[0] if site.experts else None
    member = site.member
    if member >= 0 and experts is not None:
        if not experts[member]:
            return "the one expert that it changes would go"
        member, experts = int(experts[:member].sum()), None
    if any(m is not None for i, m in enumerate(around.weight) if i not in (site.out_axis, into) and not (site.experts and i == 0)):
        return "its kernel positions would go"
    own, rows = _rows(site.rows, whole)
    full = site.full_out if whole is None else int(whole.sum())
    out = full if not site.rows and whole is not None else site.out if own is None else int(own.sum())
    own = whole if not site.rows else own
    width = site.inp // site.groups if inner is None else int(inner.sum())
    new = replace(
        site, out=out, inp=width * around.groups if site.op == "conv" else width, full_out=full, rows=rows,
        experts=int(experts.sum()) if experts is not None else site.experts, groups=around.groups if site.op == "conv" else site.groups,
        padding_idx=_padding(site.padding_idx, inner), member=member,
    )  # fmt: skip
    masks = {"out": own, "in": inner, "experts": experts}
    shapes = {s.name: tuple(s.shape) for s in method.tensors(site)}
    stated = getattr(method, "kept", None)
    kept = stated(site, masks) if stated is not None else _found(method, site, masks, shapes)
    if isinstance(kept, str):
        return kept
    after = None
    if new.groups != site.groups:
        fewer = _fewer_groups(method, site, own, new.groups, shapes)
        if isinstance(fewer, str):
            return fewer
        if fewer is not None:
            ranks, after = fewer
            kept = {**kept, "A": (ranks, *kept["A"][1:])}
    wrong = fits((after or method).tensors(new), shapes, kept)
    if wrong:
        return wrong
    lost = tuple(what for what, mask in masks.items() if mask is not None)
    trusted = stated is not None or not lost or all(s.follows is not None for s in method.tensors(site))
    if trusted or delta_commutes(method, site.op, site.transposed, site.groups, lost):
        return Follow(new, kept, method=after)
    recut = getattr(method, "recut", None)
    if recut is None or after is not None:
        return f"{method.name} mixes {' and '.join(lost)} units"
    return Follow(new, kept, recut(site, masks))


def _fewer_groups(
    method: Any, site: Any, own: Mask | None, groups: int, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Mask, Any] | str | None:
    """What stays of the rank when whole groups of a convolution go, which share it, and the method with the rank that is left and the same scale;
    None where its tensors are not divided among groups.

    Factors are those of low-rank changes, ``A [rank, ..]`` and ``B [out, rank / groups, ..]``: each group has its own rows of ``A``.
    """
    rank = getattr(method, "rank", None)
    if not isinstance(rank, int) or not hasattr(method, "scale") or own is None:
        return None
    if shapes.get("A", (0,))[0] != rank or shapes.get("B", (0, 0))[1] * site.groups != rank:
        return None
    left = own.reshape(site.groups, -1).any(axis=1)
    if int(left.sum()) != groups:
        return f"{int(left.sum())} of its groups have outputs left, and there will be {groups}"
    after = replace(method, rank=rank // site.groups * groups)
    return np.repeat(left, rank // site.groups), replace(after, alpha=after.alpha * method.scale() / after.scale())


def _found(method: Any, site: Any, masks: Mapping[str, Mask | None], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Kept] | str:
    """What stays of a method's tensors, by the sizes of the site in their shapes."""
    sizes = {"out": ("out", "full_out"), "in": ("inp",)} | ({"experts": ("experts",)} if site.experts else {})
    axes = followed_axes(method.tensors, site, sizes, {"out": site.groups, "in": site.groups, "experts": 1})
    return axes if isinstance(axes, str) else kept_of(axes, masks, shapes)


def _in_axis(site: Any, rank: int) -> int:
    if site.op == "conv":
        return 1
    first = 1 if site.experts else 0
    return first if site.out_axis == first + 1 else first + 1


def _rows(rows: tuple[tuple[int, int], ...], whole: Mask | None) -> tuple[Mask | None, tuple[tuple[int, int], ...]]:
    """What stays of a slice's own rows, and its ranges in the new numbering."""
    if not rows or whole is None:
        return None, rows
    before = np.concatenate(([0], np.cumsum(whole)))
    moved = [(int(before[a]), int(before[b])) for a, b in rows]
    return np.concatenate([whole[a:b] for a, b in rows]), tuple((a, b) for a, b in moved if b > a)


def _padding(index: int | None, kept: Mask | None) -> int | None:
    if index is None or index < 0 or kept is None:
        return index
    return int(kept[:index].sum()) if kept[index] else None


@lru_cache(maxsize=256)
def delta_commutes(method: Any, op: str, transposed: bool, groups: int, lost: tuple[str, ...]) -> bool:
    """Whether removing units and computing the change may be exchanged, tried on a small instance in float64."""
    from surgery.passes.kinds.geometry import Geometry

    small = Geometry(
        op, 6 * groups, 5 * groups, 6 * groups, experts=3 if op == "experts" else 0, transposed=transposed, groups=groups,
        kernel=(2,) if op == "conv" else (), stride=(1,) if op == "conv" else (), padding=(0,) if op == "conv" else (),
        dilation=(1,) if op == "conv" else (),
    )  # fmt: skip
    masks = {"out": _some(6 * groups, groups), "in": _some(5, 1), "experts": _some(3, 1)}
    masks = {what: masks[what] for what in lost}
    count = {what: int(m.sum()) for what, m in masks.items()}
    new = replace(
        small, out=count.get("out", small.out), full_out=count.get("out", small.out), inp=count.get("in", 5) * groups,
        experts=count.get("experts", small.experts),
    )  # fmt: skip
    steps = {"out": groups, "in": groups, "experts": 1}
    sizes = {"out": ("out", "full_out"), "in": ("inp",)} | ({"experts": ("experts",)} if small.experts else {})
    axes = followed_axes(method.tensors, small, sizes, steps)
    if isinstance(axes, str):
        return False
    tensors = _random(method.tensors(small))
    kept = kept_of(axes, masks, {n: tuple(t.shape) for n, t in tensors.items()})
    if isinstance(kept, str) or fits(method.tensors(new), {n: tuple(t.shape) for n, t in tensors.items()}, kept):
        return False
    weight = torch.randn(small.canonical, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    try:
        whole = method.fold(small, tensors, weight)
        part = method.fold(new, {n: take_all(t, kept[n]) for n, t in tensors.items()}, _canonical(weight, small, masks))
    except (RuntimeError, ValueError, IndexError):
        return False
    return bool(torch.allclose(_canonical(whole, small, masks), part, rtol=1e-9, atol=1e-9))


def _canonical(weight: Tensor, site: Any, masks: Mapping[str, Mask]) -> Tensor:
    """A canonical weight without the removed units (of a convolution every kernel position of a removed channel)."""
    kept: list[Mask | None] = [masks.get("out"), masks.get("in")]
    if site.op == "conv":
        return take_all(weight.reshape(site.out, site.inp // site.groups, *site.kernel), tuple(kept)).reshape(
            int(masks["out"].sum()) if "out" in masks else site.out, -1
        )
    return take_all(weight, (masks.get("experts"), *kept) if site.experts else tuple(kept))


def _some(size: int, groups: int) -> Mask:
    """A mask that removes one position of each group."""
    mask = np.ones(size, bool)
    mask[1 :: size // groups] = False
    return mask


def _random(specs: Iterable[TensorSpec]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {s.name: torch.rand(s.shape, dtype=torch.float64, generator=generator) + 0.5 for s in specs}


# ---------------------------------------------------------------- insert


def follow_insert(method: Any, site: Any, around: Around) -> Follow | str:
    """How an inserted module follows the features of the value it reads and of the value it edits."""
    entry, edited = around.inputs[0], around.inputs[-1]
    masks = {"inp": _at(entry, site.inp_axis), "out": _at(edited, site.out_axis)}
    new = replace(site, **{what: getattr(site, what) if m is None else int(m.sum()) for what, m in masks.items()})
    axes = followed_axes(method.tensors, site, {"inp": ("inp",), "out": ("out",)}, {"inp": 1, "out": 1})
    if isinstance(axes, str):
        return axes
    shapes = {s.name: tuple(s.shape) for s in method.tensors(site)}
    kept = kept_of(axes, masks, shapes)
    if isinstance(kept, str):
        return kept
    wrong = fits(method.tensors(new), shapes, kept)
    if wrong:
        return wrong
    lost = tuple(what for what, mask in masks.items() if mask is not None)
    if not lost or all(s.follows is not None for s in method.tensors(site)) or insert_commutes(method, site.place, lost):
        return Follow(new, kept)
    return f"{method.name} mixes the features of its value"


def _at(kept: Kept, axis: int) -> Mask | None:
    return kept[axis] if kept else None


@lru_cache(maxsize=256)
def insert_commutes(method: Any, place: str, lost: tuple[str, ...]) -> bool:
    """Whether removing features of the values around an inserted module is removing them from its tensors, on a small instance."""
    from surgery.passes.kinds.insert import Stream

    inp, out = (5, 7) if place == "beside" else (6, 6)
    small = Stream(place, inp, out)
    masks = {"inp": _some(inp, 1), "out": _some(out, 1)}
    masks = {what: masks[what] for what in lost}
    count = {what: int(m.sum()) for what, m in masks.items()}
    new = replace(small, inp=count.get("inp", inp), out=count.get("out", out))
    axes = followed_axes(method.tensors, small, {"inp": ("inp",), "out": ("out",)}, {"inp": 1, "out": 1})
    if isinstance(axes, str):
        return False
    tensors = _random(method.tensors(small))
    kept = kept_of(axes, masks, {n: tuple(t.shape) for n, t in tensors.items()})
    if isinstance(kept, str):
        return False
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(3, inp, dtype=torch.float64, generator=generator)
    y = z if place != "beside" else torch.randn(3, out, dtype=torch.float64, generator=generator)

    def without(value: Tensor, what: str, *, zero: bool) -> Tensor:
        if what not in masks:
            return value
        keep = torch.from_numpy(masks[what])
        return torch.where(keep, value, torch.zeros((), dtype=value.dtype)) if zero else value[..., keep]

    try:
        z0 = without(z, "inp", zero=True)
        whole = method.forward(small, tensors, z0, z0 if place != "beside" else without(y, "out", zero=True), False)
        z1 = without(z, "inp", zero=False)
        cut = {n: take_all(t, kept[n]) for n, t in tensors.items()}
        part = method.forward(new, cut, z1, z1 if place != "beside" else without(y, "out", zero=False), False)
    except (RuntimeError, ValueError, IndexError):
        return False
    whole = without(whole, "out", zero=False)
    return part.shape == whole.shape and bool(torch.allclose(whole, part, rtol=1e-9, atol=1e-9))
