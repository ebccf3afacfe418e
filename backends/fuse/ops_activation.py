"""Activations as one operation, with the bias before them where the kernel takes it; each with a body that runs and a form in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.library.custom_op("surgery::bias_gelu", mutates_args=())
def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """``gelu(x + bias)``; ``bias`` [width], ``approximate`` as in ``torch.nn.functional.gelu``: ``none`` (with a bias only) or ``tanh``."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


@torch.library.custom_op("surgery::quick_gelu", mutates_args=())
def quick_gelu(x: Tensor, alpha: float) -> Tensor:
    """``x sigmoid(alpha x)``: with ``alpha`` 1 the SiLU, with 1.702 the quick approximation of GELU."""
    return x * torch.sigmoid(alpha * x)


def _like(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x)


bias_gelu.register_fake(_like)
quick_gelu.register_fake(_like)


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """BiasGelu, FastGelu and QuickGelu of com.microsoft."""
    from surgery.backends.fuse.contrib import operator

    exact = operator("BiasGelu", ["A", "B"], ["C"], {})
    fast = operator("FastGelu", ["X", "bias?"], ["Y"], {})
    quick = operator("QuickGelu", ["X"], ["Y"], {"alpha": "float"})

    def with_bias(x, bias, approximate: str):  # type: ignore[no-untyped-def]
        return fast(x, bias) if approximate == "tanh" else exact(x, bias)

    def scaled(x, alpha: float):  # type: ignore[no-untyped-def]
        return quick(x, alpha=alpha)

    return {torch.ops.surgery.bias_gelu.default: with_bias, torch.ops.surgery.quick_gelu.default: scaled}
