"""Rules of operators that create tensors: their sizes are constants of the graph, their values say whether a cut is possible."""

from __future__ import annotations

from typing import Any

from torch import fx

from surgery.model.dims.context import Axes, Context, argument, rule, where
from surgery.model.dims.domains import lose_domain


def filled(position: int) -> Any:
    """A tensor whose values do not depend on the position: fresh axes, sizes patched with what they meet."""

    def run(cx: Context, node: fx.Node) -> Axes:
        sizes = argument(node, position, "size", ())
        out = cx.fresh()
        if isinstance(sizes, (list, tuple)) and len(sizes) == len(out):
            cx.size_list(where(node, position, "size"), sizes, out)
        return out

    return run


rule(*(f"aten.{n}" for n in ("zeros", "ones", "full", "empty", "rand", "randn", "empty_permuted")))(filled(0))
rule(*(f"aten.{n}" for n in ("new_zeros", "new_ones", "new_full", "new_empty")))(filled(1))


@rule("aten.new_tensor", "aten.scalar_tensor", "aten.tensor")
def scalar(cx: Context, node: fx.Node) -> Axes:
    return cx.fresh("a tensor of constants")


@rule(*(f"aten.{n}" for n in ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")))
def like(cx: Context, node: fx.Node) -> Axes:
    return cx.axes(node.args[0])


@rule("aten.arange", "aten.linspace", "aten.eye", "aten.tril_indices", "aten.triu_indices", "aten.randint", "aten.randperm")
def counted(cx: Context, node: fx.Node) -> Axes:
    return cx.fresh("a count of positions")


@rule(
    "aten.sym_size",
    "aten.sym_numel",
    "aten.item",
    "aten._local_scalar_dense",
    "aten.is_nonzero",
    "aten.sym_stride",
    "aten.sym_storage_offset",
)
def number(cx: Context, node: fx.Node) -> None:
    if "item" in str(node.target) or "scalar" in str(node.target):
        lose_domain(cx, node.args[0], "positions on it are read as numbers")
    return None


@rule(
    "aten._assert_tensor_metadata",
    "aten._assert_async",
    "aten._assert_scalar",
    "aten.sym_constrain_range",
    "aten.sym_constrain_range_for_size",
)
def assertion(cx: Context, node: fx.Node) -> None:
    return None
