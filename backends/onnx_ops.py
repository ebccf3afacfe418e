"""Operations that torch's exporter cannot take: a stand-in that can be traced, and what it is in ONNX."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx


@torch.library.custom_op("surgery::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows ``offsets[e - 1] : offsets[e]`` of ``x [rows, in]`` times ``weight[e] [in, out]``: ``[rows, out]``.

    The tracer only lets torch's own operation pass in bfloat16, so an export in any other precision goes through this one.
    """
    bounds = [0, *offsets.tolist()]
    parts = [x[a:b] @ weight[e] for e, (a, b) in enumerate(itertools.pairwise(bounds))]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - bounds[-1], weight.shape[-1])])


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[-1])


def prepare(root: fx.GraphModule) -> None:
    """Puts the stand-ins in place, in the root and all graphs below it. The graphs compute what they computed."""
    for module in root.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        nodes = [n for n in module.graph.nodes if n.op == "call_function" and n.target is torch.ops.aten._grouped_mm.default]
        for node in nodes:
            offsets = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
            left, right = node.args[:2]
            if offsets is None or len(node.args) > 3 or set(node.kwargs) - {"offs"}:
                continue  # batched products or a bias: left to the exporter
            node.target, node.args, node.kwargs = torch.ops.surgery.grouped_mm.default, (left, right, offsets), {}
        if nodes:
            module.recompile()


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """For ``custom_translation_table``: the ONNX form of each stand-in."""
    from onnxscript import FLOAT, INT32
    from onnxscript import opset18 as op

    def products(x: FLOAT, weight: FLOAT, offsets: INT32) -> FLOAT:
        """One slice and one product for each expert: the work is that of the rows, not of rows times experts."""
        ends = op.Cast(offsets, to=7)
        zero, parts = op.Constant(value_ints=[0]), []
        start = zero
        for e in range(int(weight.shape[0])):
            at, after = op.Constant(value_ints=[e]), op.Constant(value_ints=[e + 1])
            end = op.Slice(ends, at, after, zero)
            own = op.Squeeze(op.Slice(weight, at, after, zero), zero)
            parts.append(op.MatMul(op.Slice(x, start, end, zero), own))
            start = end
        return op.Concat(*parts, axis=0)

    return {torch.ops.surgery.grouped_mm.default: products}
