"""Rules that enlarge axes or move positions along them: expansion, repetition, padding, rolling, grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from surgery.model.dims.algebra import ONE, Axis
from surgery.model.dims.context import Axes, Context, argument, dim_of, rule, where
from surgery.model.dims.domains import keep_domain


def expanded(cx: Context, axes: Axes, shape: Sequence[int]) -> Axes:
    lead = len(shape) - len(axes)
    out: list[Axis] = []
    for i, size in enumerate(shape):
        axis = axes[i - lead] if i >= lead else ONE
        out.append(cx.leaf(size) if axis.size == 1 else axis)
    return tuple(out)


@rule("aten.expand", "aten.broadcast_to", "aten.expand_copy")
def expand(cx: Context, node: fx.Node) -> Axes:
    sizes = argument(node, 1, "size")
    out = expanded(cx, cx.axes(node.args[0]), cx.shape())
    cx.size_list(where(node, 1, "size"), sizes, out)
    return keep_domain(cx, node, out)


@rule("aten.expand_as")
def expand_as(cx: Context, node: fx.Node) -> Axes:
    out = expanded(cx, cx.axes(node.args[0]), cx.shape())
    cx.same(out, cx.axes(node.args[1]))
    return keep_domain(cx, node, out)


@rule("aten.repeat", "aten.tile")
def repeat(cx: Context, node: fx.Node) -> Axes:
    axes, counts = cx.axes(node.args[0]), argument(node, 1, "repeats", argument(node, 1, "dims"))
    lead = len(cx.shape()) - len(axes)
    if lead < 0 or len(counts) != len(cx.shape()):
        cx.freeze(axes, "repeated by an unusual count")
        return cx.fresh("repeated by an unusual count")
    out: list[Axis] = []
    for i, size in enumerate(cx.shape()):
        axis = axes[i - lead] if i >= lead else ONE
        copies = cx.leaf(size // max(axis.size, 1))
        if copies is not ONE:
            cx.constant((*where(node, 1, "repeats"), i), "size", copies)
        out.append(cx.algebra.product([copies, axis]))
    return keep_domain(cx, node, tuple(out))


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(cx: Context, node: fx.Node) -> Axes:
    axes, dim = cx.axes(node.args[0]), argument(node, 2, "dim")
    if dim is None:
        axes, dim = (cx.algebra.product(axes),), 0
    dim = dim_of(dim, len(axes))
    copies = cx.leaf(cx.shape()[dim] // axes[dim].size)
    out = cx.algebra.product([axes[dim], copies])
    cx.constant(where(node, 1, "repeats"), "size", copies)
    if node.kwargs.get("output_size") is not None:
        cx.constant(("kwargs", "output_size"), "size", out)
    return keep_domain(cx, node, (*axes[:dim], out, *axes[dim + 1 :]))


@rule("aten.flip", "aten.roll")
def disorder(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    dims = argument(node, 2 if "roll" in str(node.target) else 1, "dims", ())
    for dim in dims if isinstance(dims, (list, tuple)) and dims else range(len(axes)):
        cx.freeze(axes[dim_of(dim, len(axes))], "positions are moved along it")
    return keep_domain(cx, node, axes)


@rule(
    "aten.constant_pad_nd", "aten.pad", "aten.reflection_pad1d", "aten.reflection_pad2d", "aten.replication_pad1d", "aten.replication_pad2d"
)
def pad(cx: Context, node: fx.Node) -> Axes:
    axes, shape = list(cx.axes(node.args[0])), cx.shape()
    amounts = argument(node, 1, "pad", argument(node, 1, "padding"))
    for i in range(len(amounts) // 2):
        dim = len(axes) - 1 - i
        if amounts[2 * i] == 0 and amounts[2 * i + 1] == 0:
            continue
        cx.freeze(axes[dim], "padded")
        if axes[dim].size != shape[dim]:
            axes[dim] = cx.frozen(shape[dim], "padded")
    return tuple(axes)


@rule("aten.diagonal", "aten.tril", "aten.triu", "aten.diag_embed")
def corner(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    name = str(node.target)
    if "tri" in name:
        cx.freeze(axes[-2:], "used by position in a triangle")
        return axes
    cx.freeze(axes, "used by position on a diagonal")
    return cx.fresh("used by position on a diagonal")


@rule("aten.meshgrid")
def meshgrid(cx: Context, node: fx.Node) -> list[Axes]:
    tensors: Any = node.args[0]
    axes = tuple(cx.axes(t)[0] if cx.axes(t) else ONE for t in tensors)
    if argument(node, 1, "indexing", node.kwargs.get("indexing")) == "xy" and len(axes) > 1:
        axes = (axes[1], axes[0], *axes[2:])
    return [axes] * len(tensors)
