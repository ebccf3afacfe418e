"""Attention that looks at its mask before it uses it, as live models do.

A recorded graph always states its mask. At run time a boolean mask often says nothing (no padding) or only what ``is_causal``
says; then the kernel needs no mask, keeps none for backward and may skip half of its work. What is left is turned into the
numbers that the kernel wants once, not once a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

OPEN, CAUSAL = "open", "causal"


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """``scaled_dot_product_attention`` with the same arguments; ``mask`` broadcastable to (batch, heads, queries, keys)."""
    if mask is not None and not is_causal and _readable(mask):
        found = _look(mask, q, k)
        if isinstance(found, str):
            mask, is_causal = None, found == CAUSAL
        else:
            mask = found
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _readable(mask: Tensor) -> bool:
    """A boolean mask with values, outside every trace: what depends on values can be no part of one."""
    return (
        type(mask) is Tensor
        and mask.dtype == torch.bool
        and mask.device.type != "meta"
        and not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _look(mask: Tensor, q: Tensor, k: Tensor) -> Any:
    """OPEN, CAUSAL or the mask to use. Layers are given one mask: what was found stands on it until it is changed in place."""
    if mask.is_inference():
        return _judge(mask, q, k)
    key = (mask._version, q.dtype, q.shape[-2], k.shape[-2])
    known = getattr(mask, "_surgery_seen", None)
    if known is None or known[0] != key:
        known = (key, _judge(mask, q, k))
        mask._surgery_seen = known  # type: ignore[attr-defined]
    return known[1]


def _judge(mask: Tensor, q: Tensor, k: Tensor) -> Any:
    if bool(mask.all()):
        return OPEN
    length = q.shape[-2]
    if length == k.shape[-2] and mask.shape[-2:] == (length, length):
        triangle = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril_()
        if bool((mask == triangle).all()):
            return CAUSAL
    if mask.device.type != "cpu":
        return mask
    return torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
