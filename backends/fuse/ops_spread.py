"""Norms as sums and products of whole rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("surgery::spread_norm", mutates_args=())
def spread_norm(x: Tensor, weight: Tensor | None, shift: Tensor | None, eps: float, centred: bool) -> Tensor:
    """``weight c / sqrt(mean(c^2) + eps) + shift`` over the last axis, with ``c = x - mean(x)`` when ``centred`` (layer norm: Ba et al.,
    "Layer Normalization", 2016, arXiv:1607.06450) and ``c = x`` otherwise (RMS norm: Zhang and Sennrich, "Root Mean Square Layer
    Normalization", 2019, arXiv:1910.07467)."""
    c = x - x.mean(-1, keepdim=True) if centred else x
    out = c * torch.rsqrt(c.square().mean(-1, keepdim=True) + eps)
    out = out if weight is None else out * weight
    return (out if shift is None else out + shift).contiguous()


@spread_norm.register_fake
def _(x: Tensor, weight: Any, shift: Any, eps: float, centred: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("surgery::total", mutates_args=())
def total(x: Tensor, y: Tensor) -> Tensor:
    """``x + y`` in front of a norm; the shapes are those of a sum."""
    return (x + y).contiguous()


@total.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return (x + y).contiguous()


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """Operators in the spelling for which onnxruntime has kernels on vector units: LayerNormalization, and for RMS norms plain operators in which
    it finds its own kernel when it opens a graph. A sum before a norm is a Sum and not an Add: from that and the norm the runtime would make
    SkipLayerNormalization, which adds the numbers of a row one after another. Without a gain there is no operator to name."""
    from onnxscript import opset18 as op

    def added(x, y):  # type: ignore[no-untyped-def]
        return op.Sum(x, y)

    def spread(x, weight, shift, eps: float, centred: bool):  # type: ignore[no-untyped-def]
        if centred and weight is not None:
            made, mean, spread_ = op.LayerNormalization(x, weight, shift, axis=-1, epsilon=eps)
            mean.name = spread_.name = ""  # optional outputs that nobody wants have no name
            return made
        last = op.Constant(value_ints=[-1])
        c = op.Sum(x, op.Neg(op.ReduceMean(x, last, keepdims=1))) if centred else x
        mean = op.ReduceMean(op.Pow(c, op.Constant(value_float=2.0)), last, keepdims=1)
        # one axis for eps: the exporter's rules take the scalar 1e-12 for a zero that need not be added
        out = op.Div(c, op.Sqrt(op.Add(mean, op.Constant(value_floats=[eps]))))
        out = out if weight is None else op.Mul(out, weight)
        return out if shift is None else op.Add(out, shift)

    return {torch.ops.surgery.spread_norm.default: spread, torch.ops.surgery.total.default: added}
