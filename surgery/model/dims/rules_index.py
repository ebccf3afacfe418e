"""Rules where the values of one tensor choose positions of another: embedding, gather, scatter, one-hot, histogram."""

from __future__ import annotations

from torch import fx

from surgery.model.dims.algebra import ONE
from surgery.model.dims.context import Axes, Context, argument, dim_of, rule, where
from surgery.model.dims.domains import indexed_by, lose_domain


@rule("aten.embedding")
def embedding(cx: Context, node: fx.Node) -> Axes:
    w, index = cx.axes(node.args[0]), cx.axes(node.args[1])
    indexed_by(cx, w[0], node.args[1], "its rows are looked up by number")
    return (*index, *w[1:])


@rule("aten.index", "aten._unsafe_index")
def index(cx: Context, node: fx.Node) -> Axes:
    axes, indices = cx.axes(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    boolean = any(isinstance(i, fx.Node) and _dtype(i) == "bool" for i in indices)
    if boolean or any(i is not None and not cx.is_tensor(i) for i in indices):
        why = "picked by a mask" if boolean else "picked by constant numbers"
        cx.freeze(axes, why)
        for i in indices:
            cx.freeze(cx.axes(i), why)
        return cx.fresh(why)
    used = [i for i, ix in enumerate(indices) if ix is not None]
    for i in used:
        indexed_by(cx, axes[i], indices[i], "picked by numbers")
    picked = cx.broadcast([cx.axes(indices[i]) for i in used])
    if used == list(range(used[0], used[-1] + 1)):
        return (*axes[: used[0]], *picked, *axes[used[-1] + 1 :])
    return (*picked, *(a for i, a in enumerate(axes) if i not in used))


def _dtype(node: fx.Node) -> str:
    spec = node.meta.get("spec")
    return getattr(spec, "dtype", "")


@rule("aten.index_put", "aten.index_put_", "aten._unsafe_index_put")
def index_put(cx: Context, node: fx.Node) -> Axes:
    axes, indices = cx.axes(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    values = cx.axes(node.args[2])
    mask = indices[0] if len(indices) == 1 and isinstance(indices[0], fx.Node) and _dtype(indices[0]) == "bool" else None
    if mask is not None and not values:  # one number wherever the mask says so: value by value
        cx.same(cx.axes(mask), axes[: len(cx.axes(mask))])
        return axes
    if any(i is not None and (not cx.is_tensor(i) or _dtype(i) == "bool") for i in indices):
        cx.freeze([*axes, *values], "written by a mask")
        return axes
    used = [i for i, ix in enumerate(indices) if ix is not None]
    for i in used:
        indexed_by(cx, axes[i], indices[i], "written by numbers")
    picked = cx.broadcast([cx.axes(indices[i]) for i in used])
    if used == list(range(used[0], used[-1] + 1)):
        region = (*axes[: used[0]], *picked, *axes[used[-1] + 1 :])
    else:
        region = (*picked, *(a for i, a in enumerate(axes) if i not in used))
    cx.broadcast([region, values])
    return axes


@rule("aten.index_select")
def index_select(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    dim = dim_of(node.args[1], len(axes))
    indexed_by(cx, axes[dim], node.args[2], "picked by numbers")
    return (*axes[:dim], *(cx.axes(node.args[2]) or (ONE,)), *axes[dim + 1 :])


@rule("aten.index_add", "aten.index_add_", "aten.index_copy", "aten.index_copy_")
def index_add(cx: Context, node: fx.Node) -> Axes:
    axes, source = cx.axes(node.args[0]), cx.axes(node.args[3])
    dim = dim_of(node.args[1], len(axes))
    indexed_by(cx, axes[dim], node.args[2], "written by numbers")
    cx.same(cx.axes(node.args[2]), source[dim : dim + 1])
    for i, (x, y) in enumerate(zip(axes, source, strict=True)):
        if i != dim:
            cx.unify(x, y)
    return axes


def _beside(cx: Context, axes: Axes, others: Axes, dim: int) -> None:
    """All axes but ``dim`` are one with the index's; where only a part is read, both are frozen."""
    for i, (x, y) in enumerate(zip(axes, others, strict=True)):
        if i == dim:
            continue
        if x.size == y.size:
            cx.unify(x, y)
        else:
            cx.freeze((x, y), "only a part of it is picked")


@rule("aten.gather", "aten.take_along_dim")
def gather(cx: Context, node: fx.Node) -> Axes:
    axes, dim, index_node = cx.axes(node.args[0]), node.args[1], node.args[2]
    if "take_along" in str(node.target):
        dim, index_node = node.args[2], node.args[1]
    picked = cx.axes(index_node)
    at = dim_of(dim, len(axes))
    indexed_by(cx, axes[at], index_node, "picked by numbers")
    _beside(cx, axes, picked, at)
    if node.args[0] in cx.domains:
        cx.handled.add(node.args[0])  # type: ignore[arg-type]
        cx.domains[node] = cx.domains[node.args[0]]  # type: ignore[index]
    return picked


@rule("aten.scatter", "aten.scatter_", "aten.scatter_add", "aten.scatter_add_", "aten.scatter_reduce", "aten.scatter_reduce_")
def scatter(cx: Context, node: fx.Node) -> Axes:
    axes, picked = cx.axes(node.args[0]), cx.axes(node.args[2])
    dim = dim_of(node.args[1], len(axes))
    indexed_by(cx, axes[dim], node.args[2], "written by numbers")
    _beside(cx, axes, picked, dim)
    source = cx.axes(argument(node, 3, "src"))
    if source:
        for x, y in zip(source, picked, strict=True):
            cx.unify(x, y)
    return axes


@rule("aten.one_hot")
def one_hot(cx: Context, node: fx.Node) -> Axes:
    axes, number = cx.axes(node.args[0]), cx.shape()[-1]
    domain = cx.domains.get(node.args[0])  # type: ignore[arg-type]
    if domain is not None and domain.size + 1 == number:  # a class more than there are positions: the last, which nothing is
        cx.handled.add(node.args[0])  # type: ignore[arg-type]
        cx.mark(domain, "indexed")
        classes = cx.algebra.concat((domain, ONE))
    else:
        classes = cx.leaf(number)
        indexed_by(cx, classes, node.args[0], "counts numbers of unknown meaning")
    if argument(node, 1, "num_classes", -1) != -1:
        cx.constant(where(node, 1, "num_classes"), "size", classes)
    return (*axes, classes)


@rule("aten.histc", "aten.bincount")
def histc(cx: Context, node: fx.Node) -> Axes:
    bins = cx.leaf(cx.shape()[0])
    indexed_by(cx, bins, node.args[0], "counts numbers of unknown meaning")
    if "histc" in str(node.target):
        cx.constant(where(node, 1, "bins"), "size", bins)
        low, high = argument(node, 2, "min", 0), argument(node, 3, "max", 0)
        if low == 0 and high == bins.size - 1:
            cx.constant(where(node, 3, "max"), "size", bins, data=1)
        else:
            cx.freeze(bins, "a histogram of unusual range")
    else:
        cx.freeze(bins, "a histogram of unknown length")
    return (bins,)


@rule("aten.searchsorted", "aten.bucketize")
def search(cx: Context, node: fx.Node) -> Axes:
    first = "search" in str(node.target)
    table, values = (node.args[0], node.args[1]) if first else (node.args[1], node.args[0])
    cx.freeze(cx.axes(table), "values are looked up along it")
    lose_domain(cx, values, "positions on it are used as numbers")
    return cx.axes(values)


@rule("aten.masked_select", "aten.nonzero", "aten.take")
def data_dependent(cx: Context, node: fx.Node) -> Axes:
    for arg in node.args:
        cx.freeze(cx.axes(arg), "values decide what is picked")
        lose_domain(cx, arg, "values decide what is picked")
    return cx.fresh("values decide what is picked")
