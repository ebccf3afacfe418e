"""Rules that see several values of an axis at once: sums, means, softmax, sorting, selection of the largest."""

from __future__ import annotations

from typing import Any

from torch import fx

from surgery.model.dims.algebra import ONE, Axis
from surgery.model.dims.context import Axes, Context, argument, dim_of, rule
from surgery.model.dims.domains import keep_domain, lose_domain


def reduced(cx: Context, axes: Axes, dims: Any, keep: bool, flag: str) -> Axes:
    rank = len(axes)
    if dims is None or (isinstance(dims, (list, tuple)) and not dims):
        chosen = set(range(rank))
    else:
        chosen = {dim_of(d, rank) for d in (dims if isinstance(dims, (list, tuple)) else [dims])} if rank else set()
    out: list[Axis] = []
    for i, axis in enumerate(axes):
        if i in chosen:
            cx.mark(axis, flag)
            if keep:
                out.append(ONE)
        else:
            out.append(axis)
    return tuple(out)


def _reduction(flag: str, keep_at: int = 2) -> Any:
    def run(cx: Context, node: fx.Node) -> Axes:
        lose_domain(cx, node.args[0], "positions on it are reduced as numbers")
        dims = argument(node, 1, "dim")
        keep = bool(argument(node, keep_at, "keepdim", False))
        return reduced(cx, cx.axes(node.args[0]), dims, keep, flag)

    return run


for _name in (
    "sum.dim_IntList",
    "sum",
    "sum.default",
    "logsumexp",
    "any.dim",
    "any.dims",
    "any",
    "all.dim",
    "all.dims",
    "all",
    "amax",
    "amin",
    "nansum",
):
    rule(f"aten.{_name}")(_reduction("reduce:" + _name.split(".")[0]))
for _name in ("mean.dim", "mean", "prod.dim_int", "prod", "nanmean"):
    rule(f"aten.{_name}")(_reduction("reduce:" + _name.split(".")[0]))
for _name in ("std", "var", "std.dim", "var.dim"):
    rule(f"aten.{_name}")(_reduction("reduce:" + _name.split(".")[0], 3))
for _name in ("std.correction", "var.correction"):
    rule(f"aten.{_name}")(_reduction("reduce:" + _name.split(".")[0], 99))


@rule("aten.linalg_vector_norm", "aten.norm.ScalarOpt_dim", "aten.norm.Scalar")
def vector_norm(cx: Context, node: fx.Node) -> Axes:
    return reduced(cx, cx.axes(node.args[0]), argument(node, 2, "dim"), bool(argument(node, 3, "keepdim", False)), "reduce:norm")


@rule("aten.var_mean.correction", "aten.std_mean.correction", "aten.var_mean.dim")
def var_mean(cx: Context, node: fx.Node) -> list[Axes]:
    out = reduced(cx, cx.axes(node.args[0]), argument(node, 1, "dim"), bool(node.kwargs.get("keepdim", False)), "reduce:var")
    return [out, out]


@rule("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax", "aten._safe_softmax")
def softmax(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    if axes:
        cx.mark(axes[dim_of(argument(node, 1, "dim"), len(axes))], "softmax")
    return axes


@rule("aten.cumsum", "aten.cumsum_", "aten.cumprod", "aten.logcumsumexp")
def scan(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    lose_domain(cx, node.args[0], "positions on it are summed as numbers")
    cx.mark(axes[dim_of(argument(node, 1, "dim"), len(axes))], "scan")
    return axes


@rule("surgery.recurrence", "surgery.running_maximum")
def recurrence(cx: Context, node: fx.Node) -> Axes:
    axes = cx.broadcast([cx.axes(node.args[0]), cx.axes(node.args[1])])
    cx.mark(axes[dim_of(argument(node, 2, "dim"), len(axes))], "scan")
    return axes


def chosen(cx: Context, node: fx.Node, axis: Axis, values: Axes, flag: str) -> list[Axes]:
    """(values, indices) of an operation that picks positions on ``axis``."""
    cx.mark(axis, flag)
    cx.item_domains[node, 1] = axis
    source: Any = node.args[0]
    if source in cx.domains:
        cx.handled.add(source)
        cx.item_domains[node, 0] = cx.domains[source]
    return [values, values]


@rule("aten.topk")
def topk(cx: Context, node: fx.Node) -> list[Axes]:
    axes = cx.axes(node.args[0])
    dim = dim_of(argument(node, 2, "dim", -1), len(axes))
    kept = cx.frozen(cx.shape(index=0)[dim], "the number of picks is a constant")
    cx.limits.append((axes[dim], kept.size, node))
    return chosen(cx, node, axes[dim], (*axes[:dim], kept, *axes[dim + 1 :]), "topk")


@rule("aten.sort", "aten.sort.stable")
def sort(cx: Context, node: fx.Node) -> list[Axes]:
    axes = cx.axes(node.args[0])
    position = 2 if str(node.target).endswith("stable") else 1
    dim = dim_of(argument(node, position, "dim", -1), len(axes))
    return chosen(cx, node, axes[dim], axes, "sort")


@rule("aten.argsort", "aten.argsort.stable")
def argsort(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    position = 2 if str(node.target).endswith("stable") else 1
    axis = axes[dim_of(argument(node, position, "dim", -1), len(axes))]
    cx.mark(axis, "sort")
    cx.domains[node] = axis
    return axes


@rule("aten.argmax", "aten.argmin")
def argmax(cx: Context, node: fx.Node) -> Axes:
    axes, dim = cx.axes(node.args[0]), argument(node, 1, "dim")
    if dim is None:
        cx.freeze(axes, "the largest of all values is picked")
        return cx.fresh("the largest of all values is picked")
    picked = axes[dim_of(dim, len(axes))]
    cx.domains[node] = picked
    cx.limits.append((picked, 1, node))
    return reduced(cx, axes, dim, bool(argument(node, 2, "keepdim", False)), "topk")


@rule("aten.max.dim", "aten.min.dim", "aten.kthvalue", "aten.median.dim", "aten.mode", "aten.cummax", "aten.cummin")
def max_dim(cx: Context, node: fx.Node) -> list[Axes]:
    axes, dim = cx.axes(node.args[0]), argument(node, 1, "dim", -1)
    if "cum" in str(node.target):
        return chosen(cx, node, axes[dim_of(dim, len(axes))], axes, "scan")
    out = reduced(cx, axes, dim, bool(argument(node, 2, "keepdim", False)), "reduce:max")
    return chosen(cx, node, axes[dim_of(dim, len(axes))], out, "reduce:max")


@rule("aten.max", "aten.min")
def max_all(cx: Context, node: fx.Node) -> Axes:
    return reduced(cx, cx.axes(node.args[0]), None, False, "reduce:max")


@rule("aten.max.other", "aten.min.other")
def max_other(cx: Context, node: fx.Node) -> Axes:
    return cx.broadcast([cx.axes(node.args[0]), cx.axes(node.args[1])])


@rule("aten.diff")
def diff(cx: Context, node: fx.Node) -> Axes:
    axes, dim = cx.axes(node.args[0]), argument(node, 2, "dim", -1)
    dim = dim_of(dim, len(axes))
    cx.freeze(axes[dim], "neighbours are subtracted along it")
    return keep_domain(cx, node, (*axes[:dim], cx.frozen(cx.shape()[dim], "neighbours are subtracted along it"), *axes[dim + 1 :]))
