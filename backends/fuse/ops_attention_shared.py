"""Attention whose heads share keys and values as the operator of the ONNX standard (Attention, from operator set 23 on), with bodies that run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

STANDARD = 23
"""The operator set from which ONNX has Attention."""


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None, heads: int, scale: float) -> Tensor:
    found = F.scaled_dot_product_attention(_heads(q, heads), k, v, scores, scale=scale, enable_gqa=True)
    return found.transpose(1, 2).reshape(q.shape[0], q.shape[1], -1)


@torch.library.custom_op("surgery::shared_attention", mutates_args=())
def shared_attention(q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None, heads: int, groups: int, scale: float) -> Tensor:
    """``softmax(scale q k^T + scores) v`` of ``heads`` heads that share ``groups`` heads of keys and values, or have one each.

    ``q`` [batch, queries, heads * width], ``k`` and ``v`` [batch, keys, groups * width], ``scores`` [batch or 1, heads or 1, queries, keys]. Gives
    [batch, queries, heads * width of v].
    """
    return _attend(q, _heads(k, groups), _heads(v, groups), scores, heads, scale)


@shared_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scores: Any, heads: int, groups: int, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], heads * (v.shape[2] // groups))


@torch.library.custom_op("surgery::cached_shared_attention", mutates_args=())
def cached_shared_attention(
    q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None, past_key: Tensor, past_value: Tensor, heads: int, groups: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`shared_attention` over the keys and values of a cache [batch, groups, past, width] and the new ones behind them; also gives the
    grown cache."""
    keys, values = torch.cat([past_key, _heads(k, groups)], 2), torch.cat([past_value, _heads(v, groups)], 2)
    return _attend(q, keys, values, scores, heads, scale), keys, values


@cached_shared_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, scores: Any, past_key: Tensor, past_value: Tensor, heads: int, groups: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], heads * (v.shape[2] // groups))
    grown = [t.new_empty(t.shape[0], t.shape[1], t.shape[2] + q.shape[1], t.shape[3]) for t in (past_key, past_value)]
    return out, grown[0], grown[1]


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """Attention of the ONNX standard, which takes whole rows, a cache and any scores."""
    from onnxscript import opset23 as op

    def alone(q, k, v, scores, heads: int, groups: int, scale: float):  # type: ignore[no-untyped-def]
        made = op.Attention(q, k, v, scores, q_num_heads=heads, kv_num_heads=groups, scale=scale)
        for unused in made[1:]:
            unused.name = ""  # an optional output that nobody wants has no name
        return made[0]

    def growing(q, k, v, scores, past_key, past_value, heads: int, groups: int, scale: float):  # type: ignore[no-untyped-def]
        made = op.Attention(q, k, v, scores, past_key, past_value, q_num_heads=heads, kv_num_heads=groups, scale=scale)
        for unused in made[3:]:
            unused.name = ""
        return made[0], made[1], made[2]

    ops = torch.ops.surgery
    return {ops.shared_attention.default: alone, ops.cached_shared_attention.default: growing}
