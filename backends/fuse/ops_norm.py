"""Norms as one operation, alone and behind a sum, each with a body that runs and a form in ONNX.

A sum and its norm come in two forms, because a kernel writes the sum out only where somebody reads it: one gives the normalised value, the
other (``.._sum``) that and the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

RMS_OPSET = 23
"""The operator set from which ONNX has RMSNormalization."""


def _wide(x: Tensor) -> Tensor:
    """Half-precision values as float32, as the kernels compute."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = _wide(x)
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide if weight is None else wide * _wide(weight)).to(x.dtype)


def _added(x: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    total = x + skip if bias is None else x + bias + skip
    return total.contiguous()


def _layer(x: Tensor, weight: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(_wide(x), (x.shape[-1],), _wide(weight), None if shift is None else _wide(shift), eps).to(x.dtype)


@torch.library.custom_op("surgery::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``weight x / sqrt(mean(x^2) + eps)`` over the last axis, computed in float32 and given in the type of ``x``; ``weight`` [width]."""
    return _rms(x, weight, eps)


@rms_norm.register_fake
def _(x: Tensor, weight: Any, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("surgery::skip_rms_norm", mutates_args=())
def skip_rms_norm(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """:func:`rms_norm` of ``x + skip + bias``; ``skip`` has the shape of ``x`` or one batch, ``bias`` [width]."""
    return _rms(_added(x, skip, bias), weight, eps)


@torch.library.custom_op("surgery::skip_rms_norm_sum", mutates_args=())
def skip_rms_norm_sum(x: Tensor, skip: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """:func:`skip_rms_norm` and the sum."""
    total = _added(x, skip, bias)
    return _rms(total, weight, eps), total


@torch.library.custom_op("surgery::skip_layer_norm", mutates_args=())
def skip_layer_norm(x: Tensor, skip: Tensor, weight: Tensor, shift: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last axis of ``x + skip + bias``; ``weight`` and ``shift`` [width]."""
    return _layer(_added(x, skip, bias), weight, shift, eps)


@torch.library.custom_op("surgery::skip_layer_norm_sum", mutates_args=())
def skip_layer_norm_sum(
    x: Tensor, skip: Tensor, weight: Tensor, shift: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`skip_layer_norm` and the sum."""
    total = _added(x, skip, bias)
    return _layer(total, weight, shift, eps), total


def _one(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _two(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _one(x), _one(x)


skip_rms_norm.register_fake(_one)
skip_layer_norm.register_fake(_one)
skip_rms_norm_sum.register_fake(_two)
skip_layer_norm_sum.register_fake(_two)


# ------------------------------------------------------------------ ONNX


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """SkipLayerNormalization and SkipSimplifiedLayerNormalization of com.microsoft; an RMS norm alone in plain operators.

    The plain form divides by the root, which is how onnxruntime recognises the norm when it loads the graph; every other runtime and the
    checker know its operators.
    """
    from onnxscript import opset18 as op

    from surgery.backends.fuse.contrib import operator

    eps_of = {"epsilon": "float"}
    layer_in, rms_in = ["input", "skip", "gamma", "beta?", "bias?"], ["input", "skip", "gamma", "bias?"]
    unused = ["mean?", "inv_std_var?"]
    layer = operator("SkipLayerNormalization", layer_in, ["output"], eps_of)
    layer_sum = operator("SkipLayerNormalization", layer_in, ["output", *unused, "sum"], eps_of)
    simple = operator("SkipSimplifiedLayerNormalization", rms_in, ["output"], eps_of)
    simple_sum = operator("SkipSimplifiedLayerNormalization", rms_in, ["output", *unused, "sum"], eps_of)

    def rms(x, weight, eps: float):  # type: ignore[no-untyped-def]
        floating = x.dtype
        half = floating is not None and int(floating) in (10, 16)  # TensorProto.FLOAT16, BFLOAT16
        wide = op.Cast(x, to=1) if half else x
        root = op.Sqrt(op.Add(op.ReduceMean(op.Pow(wide, op.Constant(value_float=2.0)), op.Constant(value_ints=[-1]), keepdims=1), eps))
        found = op.Div(wide, root)
        if half:
            found = op.Cast(found, to=int(floating))
        return found if weight is None else op.Mul(found, weight)

    def both(made):  # type: ignore[no-untyped-def]
        for middle in made[1:3]:
            middle.name = ""  # an optional output that nobody wants has no name
        return made[0], made[3]

    def skip_layer(x, skip, weight, shift, bias, eps: float):  # type: ignore[no-untyped-def]
        return layer(x, skip, weight, shift, bias, epsilon=eps)

    def skip_layer_sum(x, skip, weight, shift, bias, eps: float):  # type: ignore[no-untyped-def]
        return both(layer_sum(x, skip, weight, shift, bias, epsilon=eps))

    def skip_rms(x, skip, weight, bias, eps: float):  # type: ignore[no-untyped-def]
        return simple(x, skip, weight, bias, epsilon=eps)

    def skip_rms_sum(x, skip, weight, bias, eps: float):  # type: ignore[no-untyped-def]
        return both(simple_sum(x, skip, weight, bias, epsilon=eps))

    ops = torch.ops.surgery
    return {
        ops.rms_norm.default: rms,
        ops.skip_layer_norm.default: skip_layer,
        ops.skip_layer_norm_sum.default: skip_layer_sum,
        ops.skip_rms_norm.default: skip_rms,
        ops.skip_rms_norm_sum.default: skip_rms_sum,
    }
