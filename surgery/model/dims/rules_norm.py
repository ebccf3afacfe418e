"""Rules of normalisation layers."""

from __future__ import annotations

from typing import Any

from torch import fx

from surgery.model.dims.context import Axes, Context, argument, rule, where


def _trailing(cx: Context, node: fx.Node, parameters: tuple[Any, ...]) -> Axes:
    x, shape = cx.axes(node.args[0]), argument(node, 1, "normalized_shape")
    tail = x[len(x) - len(shape) :]
    cx.mark(tail, "norm")
    for parameter in parameters:
        if cx.is_tensor(parameter):
            cx.same(tail, cx.axes(parameter))
    cx.size_list(where(node, 1, "normalized_shape"), shape, tail)
    return x


@rule("aten.layer_norm")
def layer_norm(cx: Context, node: fx.Node) -> Axes:
    return _trailing(cx, node, (argument(node, 2, "weight"), argument(node, 3, "bias")))


@rule("aten.native_layer_norm")
def native_layer_norm(cx: Context, node: fx.Node) -> list[Axes]:
    x = _trailing(cx, node, (argument(node, 2, "weight"), argument(node, 3, "bias")))
    statistics = tuple(cx.fresh(index=1))
    cx.same(x[: len(x) - len(argument(node, 1, "normalized_shape"))], statistics[: len(x) - len(argument(node, 1, "normalized_shape"))])
    return [x, statistics, statistics]


@rule("aten.rms_norm", "aten._fused_rms_norm")
def rms_norm(cx: Context, node: fx.Node) -> Any:
    x = _trailing(cx, node, (argument(node, 2, "weight"),))
    if "fused" in str(node.target):
        rank = len(x) - len(argument(node, 1, "normalized_shape"))
        statistics = tuple(cx.fresh(index=1))
        cx.same(x[:rank], statistics[:rank])
        return [x, statistics]
    return x


@rule("aten.group_norm")
def group_norm(cx: Context, node: fx.Node) -> Axes:
    x = cx.axes(node.args[0])
    groups = argument(node, 1, "num_groups")
    outer, inner = cx.leaf(groups), cx.leaf(x[1].size // groups)
    cx.unify(x[1], cx.algebra.product([outer, inner]))
    cx.mark(inner, "norm")
    cx.mark(x[2:], "norm")
    cx.constant(where(node, 1, "num_groups"), "size", outer)
    for position, name in ((2, "weight"), (3, "bias")):
        cx.same(cx.axes(argument(node, position, name)), x[1:2] if cx.is_tensor(argument(node, position, name)) else ())
    return x


@rule("aten.batch_norm", "aten.instance_norm")
def batch_norm(cx: Context, node: fx.Node) -> Axes:
    x = cx.axes(node.args[0])
    for parameter in node.args[1:5]:
        if cx.is_tensor(parameter):
            cx.unify(x[1], cx.axes(parameter)[0])
    return x


@rule(
    "aten._native_batch_norm_legit_no_training",
    "aten.native_batch_norm",
    "aten._native_batch_norm_legit",
    "aten._native_batch_norm_legit_functional",
)
def native_batch_norm(cx: Context, node: fx.Node) -> list[Axes]:
    x = batch_norm(cx, node)
    shapes: Any = cx.shape()
    return [x, *(tuple(x[1] if s == x[1].size else cx.leaf(s) for s in shape) for shape in shapes[1:])]


@rule("aten._weight_norm", "aten._weight_norm_interface")
def weight_norm(cx: Context, node: fx.Node) -> Any:
    v, g = cx.axes(node.args[0]), cx.axes(node.args[1])
    for x, y in zip(v, g, strict=True):
        if y.size == x.size:
            cx.unify(x, y)
        else:
            cx.mark(x, "norm")
    return [v, g] if "interface" in str(node.target) else v
