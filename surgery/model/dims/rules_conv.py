"""Rules of convolution, pooling and resampling. Kernel and spatial axes are always frozen."""

from __future__ import annotations

from typing import Any

from torch import fx

from surgery.model.dims.algebra import find
from surgery.model.dims.context import Axes, Context, argument, rule, where

SPATIAL = "spatial positions"


def convolve(cx: Context, node: fx.Node, groups: int, group_path: tuple[Any, ...], transposed: bool) -> Axes:
    x, w = cx.axes(node.args[0]), cx.axes(node.args[1])
    bias = cx.axes(argument(node, 2, "bias"))
    cx.freeze(w[2:], "kernel positions")
    spatial = len(w) - 2
    cx.freeze(x[len(x) - spatial :], SPATIAL)
    channels = x[len(x) - spatial - 1]
    lead = x[: len(x) - spatial - 1]
    shape = cx.shape()
    out_size = shape[len(lead)]
    into, outof = (w[0], w[1]) if transposed else (w[1], w[0])
    if groups == 1:
        cx.unify(channels, into)
        cx.mark(channels, "contract")
        out = outof
    else:
        group = cx.leaf(groups)
        width_in, width_out = cx.leaf(channels.size // groups), cx.leaf(out_size // groups)
        cx.unify(channels, cx.algebra.product([group, width_in]))
        if transposed:
            cx.unify(into, cx.algebra.product([group, width_in]))
            cx.unify(outof, width_out)
            out = cx.algebra.product([group, width_out])
        else:
            cx.unify(into, width_in)
            cx.unify(outof, cx.algebra.product([group, width_out]))
            out = outof
        cx.mark(width_in, "contract")
        cx.constant(group_path, "size", group)
    if bias:
        cx.unify(out, bias[0])
    return (*lead, find(out), *(cx.frozen(s, SPATIAL) for s in shape[len(lead) + 1 :]))


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d")
def conv(cx: Context, node: fx.Node) -> Axes:
    return convolve(cx, node, argument(node, 6, "groups", 1), where(node, 6, "groups"), False)


@rule("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
def conv_transpose(cx: Context, node: fx.Node) -> Axes:
    return convolve(cx, node, argument(node, 6, "groups", 1), where(node, 6, "groups"), True)


@rule("aten.convolution", "aten._convolution")
def convolution(cx: Context, node: fx.Node) -> Axes:
    return convolve(cx, node, argument(node, 8, "groups", 1), where(node, 8, "groups"), bool(argument(node, 6, "transposed")))


def pooled(cx: Context, node: fx.Node, spatial: int) -> Axes:
    x, shape = cx.axes(node.args[0]), cx.shape()
    keep = len(x) - spatial
    cx.freeze(x[keep:], SPATIAL)
    return (*x[:keep], *(cx.frozen(s, SPATIAL) for s in shape[keep:]))


def _pool(spatial: int) -> Any:
    return lambda cx, node: pooled(cx, node, spatial)


RESAMPLE = {
    1: ("upsample_nearest1d", "upsample_linear1d"),
    2: ("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
    3: ("upsample_nearest3d", "upsample_trilinear3d"),
}
for _d in (1, 2, 3):
    _pools = tuple(f"{n}{_d}d" for n in ("max_pool", "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool"))
    rule(*(f"aten.{n}" for n in _pools + RESAMPLE[_d]))(_pool(_d))


@rule(
    "aten.max_pool1d_with_indices",
    "aten.max_pool2d_with_indices",
    "aten.max_pool3d_with_indices",
    "aten.adaptive_max_pool1d",
    "aten.adaptive_max_pool2d",
)
def max_pool_indices(cx: Context, node: fx.Node) -> list[Axes]:
    x: Any = cx.axes(node.args[0])
    spatial = int(next(c for c in str(node.target) if c.isdigit()))
    keep = len(x) - spatial
    cx.freeze(x[keep:], SPATIAL)
    out = (*x[:keep], *(cx.frozen(s, SPATIAL) for s in cx.shape(index=0)[keep:]))
    return [out, out]
