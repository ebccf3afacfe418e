"""Rules that move, split and join axes: views, permutations, slices, splits, concatenations, expansion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from surgery.model.dims.algebra import ONE, Axis, factors, find
from surgery.model.dims.context import END, Axes, Context, argument, dim_of, rule, where
from surgery.model.dims.domains import keep_domain


def regroup(cx: Context, ins: Axes, sizes: Sequence[int]) -> Axes:
    """Axes of a row-major reshape of ``ins`` to ``sizes``.

    The two shapes are cut into the smallest runs of equal product; each run is aligned by itself, so a run that does not
    align freezes alone.
    """
    old = [find(a) for a in ins if a.size != 1]
    new = [(i, s) for i, s in enumerate(sizes) if s != 1]
    out: list[Axis] = [ONE] * len(sizes)
    if any(a.size == 0 for a in old) or any(s == 0 for _, s in new):
        cx.freeze(ins, "a reshape of an empty tensor")
        return tuple(cx.frozen(s, "a reshape of an empty tensor") for s in sizes)
    a = b = 0
    while a < len(old) and b < len(new):
        a0, b0 = a, b
        left, right = old[a].size, new[b][1]
        a, b = a + 1, b + 1
        while left != right:
            if left < right and a < len(old):
                left *= old[a].size
                a += 1
            elif left > right and b < len(new):
                right *= new[b][1]
                b += 1
            else:
                break
        if left != right:
            a, b = a0, b0
            break
        if b - b0 == 1:
            out[new[b0][0]] = old[a0] if a - a0 == 1 else cx.algebra.product(old[a0:a])
            continue
        whole = old[a0] if a - a0 == 1 else cx.algebra.product(old[a0:a])
        chain = factors(whole)
        if [f.size for f in chain] == [s for _, s in new[b0:b]]:
            for (i, _), factor in zip(new[b0:b], chain, strict=True):
                out[i] = factor
            continue
        fresh = [cx.leaf(s) for _, s in new[b0:b]]
        for (i, _), axis in zip(new[b0:b], fresh, strict=True):
            out[i] = axis
        cx.unify(whole, cx.algebra.product(fresh))
    if a < len(old) or b < len(new):
        why = "a reshape whose sizes do not multiply out"
        cx.freeze(old[a:], why)
        for i, size in new[b:]:
            out[i] = cx.frozen(size, why)
    return tuple(find(x) for x in out)


@rule("aten.view", "aten.reshape", "aten._unsafe_view", "aten._reshape_alias", "aten.view_copy")
def reshape(cx: Context, node: fx.Node) -> Axes:
    sizes = argument(node, 1, "size", argument(node, 1, "shape", ()))
    out = regroup(cx, cx.axes(node.args[0]), cx.shape())
    if isinstance(sizes, (list, tuple)) and len(sizes) == len(out):
        cx.size_list(where(node, 1, "size" if "size" in node.kwargs else "shape"), sizes, out)
    return keep_domain(cx, node, out)


@rule("aten.view.dtype", "aten.view_as_complex", "aten.view_as_real")
def reinterpret(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    cx.freeze(axes[-1:], "its bytes are reinterpreted")
    out = cx.shape()
    return tuple(
        a if i < len(out) and a.size == out[i] else cx.frozen(s, "bytes reinterpreted")
        for i, (a, s) in enumerate(zip(axes, out, strict=False))
    ) + tuple(cx.frozen(s, "bytes reinterpreted") for s in out[len(axes) :])


@rule("aten.view_as", "aten.reshape_as")
def reshape_as(cx: Context, node: fx.Node) -> Axes:
    out = regroup(cx, cx.axes(node.args[0]), cx.shape())
    cx.same(out, cx.axes(node.args[1]))
    return keep_domain(cx, node, out)


@rule("aten.flatten")
def flatten(cx: Context, node: fx.Node) -> Axes:
    return keep_domain(cx, node, regroup(cx, cx.axes(node.args[0]), cx.shape()))


@rule("aten.unflatten")
def unflatten(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    dim = dim_of(cx.integer(node.args[1]) or 0, len(axes))
    sizes = argument(node, 2, "sizes")
    middle = regroup(cx, axes[dim : dim + 1], cx.shape()[dim : dim + len(sizes)])
    cx.size_list(where(node, 2, "sizes"), sizes, middle)
    return keep_domain(cx, node, axes[:dim] + middle + axes[dim + 1 :])


@rule("aten.unfold")
def unfold(cx: Context, node: fx.Node) -> Axes:
    """Windows of one axis: which window stands in its place, the positions within one come last."""
    axes = cx.axes(node.args[0])
    dim, why = dim_of(cx.integer(argument(node, 1, "dimension")) or 0, len(axes)), "cut into windows"
    cx.freeze(axes[dim], why)
    shape = cx.shape()
    return (*axes[:dim], cx.frozen(shape[dim], why), *axes[dim + 1 :], cx.frozen(shape[-1], why))


@rule("aten.unsqueeze")
def unsqueeze(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    dim = dim_of(argument(node, 1, "dim"), len(axes) + 1)
    return keep_domain(cx, node, (*axes[:dim], ONE, *axes[dim:]))


@rule("aten.squeeze")
def squeeze(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    dims = argument(node, 1, "dim")
    if dims is None:
        return keep_domain(cx, node, tuple(a for a in axes if a.size != 1))
    chosen = {dim_of(d, len(axes)) for d in (dims if isinstance(dims, (list, tuple)) else [dims])}
    return keep_domain(cx, node, tuple(a for i, a in enumerate(axes) if i not in chosen or a.size != 1))


@rule("aten.permute")
def permute(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    return keep_domain(cx, node, tuple(axes[dim_of(d, len(axes))] for d in argument(node, 1, "dims")))


@rule("aten.movedim.int", "aten.movedim.intlist", "aten.moveaxis.int", "aten.moveaxis.intlist")
def movedim(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    src, dst = argument(node, 1, "source"), argument(node, 2, "destination")
    sources = [dim_of(d, len(axes)) for d in (src if isinstance(src, (list, tuple)) else [src])]
    targets = [dim_of(d, len(axes)) for d in (dst if isinstance(dst, (list, tuple)) else [dst])]
    rest = iter([a for i, a in enumerate(axes) if i not in sources])
    place = dict(zip(targets, sources, strict=True))
    return keep_domain(cx, node, tuple(axes[place[i]] if i in place else next(rest) for i in range(len(axes))))


@rule("aten.transpose", "aten.swapaxes", "aten.swapdims")
def transpose(cx: Context, node: fx.Node) -> Axes:
    axes = list(cx.axes(node.args[0]))
    a, b = dim_of(node.args[1], len(axes)), dim_of(node.args[2], len(axes))
    axes[a], axes[b] = axes[b], axes[a]
    return keep_domain(cx, node, tuple(axes))


@rule("aten.t", "aten.numpy_T", "aten.adjoint", "aten.mT", "aten.mH", "aten.matrix_H")
def turn(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    whole = "numpy_T" in str(node.target) or len(axes) <= 2
    return axes[::-1] if whole else (*axes[:-2], axes[-1], axes[-2])


@rule("aten.slice", "aten.slice_copy")
def slice_(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    dim = dim_of(argument(node, 1, "dim", 0), len(axes))
    axis, size = axes[dim], cx.shape()[dim]
    step = argument(node, 4, "step", 1)
    first, last = argument(node, 2, "start"), argument(node, 3, "end")
    start = 0 if first is None else cx.integer(first)
    stop = axis.size if last is None or last == END else cx.integer(last)
    if start is not None and start < 0:
        start = max(0, start + axis.size)
    if stop is not None and stop < 0:
        stop += axis.size

    def done(part: Axis) -> Axes:
        return keep_domain(cx, node, (*axes[:dim], part, *axes[dim + 1 :]))

    if size == axis.size and step == 1:
        if last is not None and last != END:
            cx.constant(where(node, 3, "end"), "prefix", axis)
        return done(axis)
    if size == 0 and start is not None and start == axis.size:  # an empty rest: it stays empty
        cx.constant(where(node, 2, "start"), "prefix", axis)
        return done(cx.leaf(0))
    if start is None or stop is None or stop > axis.size or start >= stop or (step == 1 and stop - start != size) or axis is ONE:
        cx.freeze(axis, "a slice with a symbolic bound")
        return done(cx.frozen(size, "a slice with a symbolic bound"))
    if cx.symbolic(first) or cx.symbolic(last):  # the numbers are stand-ins: nobody knows which stored positions they are
        cx.freeze(axis, "a slice with a symbolic bound")
    source = node.args[0]
    if step == 1 and isinstance(source, fx.Node) and cx.open(source, dim):
        before = cx.windows.setdefault((source, dim, size), start)
        if 0 < abs(start - before) < size:  # windows that overlap: made one, every position would be the next one
            cx.freeze(axis, "windows that slide over it")
            return done(cx.frozen(size, "windows that slide over it"))
    cx.cut(axis, start, stop, step)
    if step != 1:
        if axis.size % step == 0 and start < step and stop == axis.size:
            outer, inner = regroup(cx, (axis,), (axis.size // step, step))
            cx.freeze(inner, "taken apart with a stride")
            return done(outer)
        cx.freeze(axis, "a slice with a step")
        return done(cx.frozen(size, "a slice with a step"))
    sizes = [start, stop - start, axis.size - stop]
    parts = cx.algebra.pieces(axis, sizes)
    if parts is None:
        cx.freeze(axis, "a slice through the middle of a unit")
        return done(cx.frozen(size, "a slice through the middle of a unit"))
    if start:
        cx.constant(where(node, 2, "start"), "prefix", parts[0])
    if last is not None and last != END:
        cx.constant(where(node, 3, "end"), "prefix", *([parts[0]] if start else []), parts[1])
    return done(parts[1])


@rule("aten.narrow")
def narrow(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    dim = dim_of(node.args[1], len(axes))
    start, size = cx.integer(node.args[2]), cx.shape()[dim]
    parts = None
    if start is not None and start >= 0:
        parts = cx.algebra.pieces(axes[dim], [start, size, axes[dim].size - start - size])
    if parts is None or start is None:
        cx.freeze(axes[dim], "a slice with a symbolic bound")
        return (*axes[:dim], cx.frozen(size, "a slice with a symbolic bound"), *axes[dim + 1 :])
    if cx.symbolic(node.args[2]) or cx.symbolic(node.args[3]):
        cx.freeze(axes[dim], "a slice with a symbolic bound")
    cx.cut(axes[dim], start, start + size)
    if start:
        cx.constant(("args", 2), "prefix", parts[0])
    cx.constant(("args", 3), "prefix", parts[1])
    return keep_domain(cx, node, (*axes[:dim], parts[1], *axes[dim + 1 :]))


@rule("aten.select")
def select(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    dim, index = dim_of(node.args[1], len(axes)), cx.integer(node.args[2])
    cx.freeze(axes[dim], "one position is selected")
    if index is not None:
        index += axes[dim].size if index < 0 else 0
        cx.cut(axes[dim], index, index + 1)
    return keep_domain(cx, node, axes[:dim] + axes[dim + 1 :])


@rule("aten.unbind")
def unbind(cx: Context, node: fx.Node) -> list[Axes]:
    axes = cx.axes(node.args[0])
    dim = dim_of(argument(node, 1, "dim", 0), len(axes))
    cx.freeze(axes[dim], "taken apart one by one")
    cx.handled.add(node.args[0])  # type: ignore[arg-type]
    return [axes[:dim] + axes[dim + 1 :]] * axes[dim].size


@rule(
    "aten.split",
    "aten.split_with_sizes",
    "aten.chunk",
    "aten.tensor_split",
    "aten.unsafe_split",
    "aten.unsafe_chunk",
    "aten.split_copy",
    "aten.split_with_sizes_copy",
)
def split(cx: Context, node: fx.Node) -> list[Axes]:
    axes = cx.axes(node.args[0])
    dim = dim_of(argument(node, 2, "dim", 0), len(axes))
    shapes: Any = cx.shape()
    sizes = [shape[dim] for shape in shapes]
    parts = cx.algebra.pieces(axes[dim], sizes)
    cx.handled.add(node.args[0])  # type: ignore[arg-type]
    if parts is None:
        cx.freeze(axes[dim], "a split through the middle of a unit")
        parts = [cx.frozen(s, "a split through the middle of a unit") for s in sizes]
    elif len(parts) > 1:
        cx.constant(("args", 1), "split", *parts, data=dim)
    return [(*axes[:dim], part, *axes[dim + 1 :]) for part in parts]


@rule("getitem")
def getitem(cx: Context, node: fx.Node) -> Any:
    source, index = node.args
    value = cx.values.get(source)  # type: ignore[arg-type]
    if not isinstance(value, list) or not isinstance(index, int):
        return None if value is None else cx.fresh("indexed from Python")
    if isinstance(source, fx.Node):
        name = str(source.target)
        if "split" in name or "chunk" in name or "unbind" in name:
            whole = cx.axes(source.args[0])
            unbound = "unbind" in name
            dim = dim_of(argument(source, 1 if unbound else 2, "dim", 0), len(whole))
            if unbound:
                cx.cut(whole[dim], index, index + 1)
            else:
                sizes = [part[dim].size for part in value]
                cx.cut(whole[dim], sum(sizes[:index]), sum(sizes[: index + 1]))
            if source.args[0] in cx.domains:
                cx.domains[node] = cx.domains[source.args[0]]  # type: ignore[index]
        elif (source, index) in cx.item_domains:
            cx.domains[node] = cx.item_domains[source, index]
    return value[index]


@rule("aten.cat", "aten.concat", "aten.concatenate")
def cat(cx: Context, node: fx.Node) -> Axes:
    arrays = [cx.axes(t) for t in node.args[0] if cx.axes(t)]  # type: ignore[union-attr]
    dim = dim_of(argument(node, 1, "dim", 0), len(arrays[0]))
    first = arrays[0]
    if any(len(a) != len(first) for a in arrays):  # the legacy empty 1-d tensor
        arrays = [a for a in arrays if len(a) == len(cx.shape())]
        first = arrays[0]
    for other in arrays[1:]:
        for i, (x, y) in enumerate(zip(first, other, strict=True)):
            if i != dim:
                cx.unify(x, y)
    _same_domain(cx, node)
    return (*first[:dim], cx.algebra.concat(a[dim] for a in arrays), *first[dim + 1 :])


def _same_domain(cx: Context, node: fx.Node) -> None:
    """Numbers of positions on one axis, side by side, are such numbers (experts that are chosen one after the other)."""
    parts = list(node.args[0])  # type: ignore[arg-type]
    found = [cx.domains[p] for p in parts if p in cx.domains]
    if len(found) < len(parts) or len({axis.size for axis in found}) != 1:
        return
    for axis in found[1:]:
        cx.unify(found[0], axis)
    cx.handled.update(parts)
    cx.domains[node] = found[0]


@rule("aten.stack")
def stack(cx: Context, node: fx.Node) -> Axes:
    arrays = [cx.axes(t) for t in node.args[0]]  # type: ignore[union-attr]
    dim = dim_of(argument(node, 1, "dim", 0), len(arrays[0]) + 1)
    for other in arrays[1:]:
        cx.same(arrays[0], other)
    return (*arrays[0][:dim], cx.frozen(len(arrays), "tensors stacked one by one"), *arrays[0][dim:])
