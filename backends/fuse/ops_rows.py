"""Products that add a value to their result, and rows that become sequences again; each with a body that runs and a form in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("surgery::product_sum", mutates_args=())
def product_sum(x: Tensor, weight: Tensor, added: Tensor) -> Tensor:
    """``x W^T + added``: ``x`` [..., in], ``weight`` [out, in], ``added`` [..., out] with the leading axes of ``x``."""
    return (F.linear(x, weight) + added).contiguous()


@product_sum.register_fake
def _(x: Tensor, weight: Tensor, added: Tensor) -> Tensor:
    return torch.empty_like(added, memory_format=torch.contiguous_format)


@torch.library.custom_op("surgery::sequences", mutates_args=())
def sequences(rows: Tensor, like: Tensor) -> Tensor:
    """``rows`` [batch * steps, width] as [batch, steps, width], batch and steps being the first two axes of ``like``."""
    return rows.reshape(like.shape[0], like.shape[1], rows.shape[1]).clone()


@sequences.register_fake
def _(rows: Tensor, like: Tensor) -> Tensor:
    return rows.new_empty(like.shape[0], like.shape[1], rows.shape[1])


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """Gemm, whose third input is added while the product is summed up, and Reshape. Gemm knows matrices only: sequences are rows around it."""
    from onnxscript import opset18 as op

    def whole(rows, like):  # type: ignore[no-untyped-def]
        width = rows.shape[1]
        last = op.Constant(value_ints=[width if isinstance(width, int) else -1])
        return op.Reshape(rows, op.Concat(op.Shape(like, start=0, end=2), last, axis=0))

    def product(x, weight, added):  # type: ignore[no-untyped-def]
        if len(x.shape) == 2:
            return op.Gemm(x, weight, added, transB=1)
        rows = op.Gemm(
            op.Reshape(x, op.Constant(value_ints=[-1, int(weight.shape[1])])), weight,
            op.Reshape(added, op.Constant(value_ints=[-1, int(weight.shape[0])])), transB=1,
        )  # fmt: skip
        return op.Reshape(rows, op.Shape(added))

    ops = torch.ops.surgery
    return {ops.product_sum.default: product, ops.sequences.default: whole}
