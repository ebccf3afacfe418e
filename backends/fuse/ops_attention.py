"""Attention as one operation, in the three forms that the rules use, each with a body that runs and a form in ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FILL = -1e9
"""What is added to the score of a key that is switched off. Finite, so that a query that may look at nothing gives a number and not NaN."""


def fill_of(dtype: torch.dtype) -> float:
    """:data:`FILL`, or less where the type cannot hold it."""
    return FILL if torch.finfo(dtype).max > -FILL else -1e4


@torch.library.custom_op("surgery::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, scores: Tensor | None, heads: int, scale: float,
    causal: bool,
) -> Tensor:  # fmt: skip
    """``softmax(scale q k^T + scores) v`` for every head.

    ``q`` [batch, queries, heads * width]; ``k`` and ``v`` [batch, keys, heads * width], or [batch, heads, keys, width] both; ``bias`` is
    added to q, k and v first [their widths together]; ``key_mask`` [batch, keys] is zero where a key is switched off; ``scores``
    [batch or 1, heads or 1, queries, keys] is added; ``causal`` lets query i of n see keys up to ``keys - n + i``. Gives
    [batch, queries, heads * width of v].
    """
    return _attend(q, k, v, bias, key_mask, scores, heads, scale, causal)


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Any, key_mask: Any, scores: Any, heads: int, scale: float, causal: bool) -> Tensor:
    width = v.shape[2] if v.ndim == 3 else v.shape[1] * v.shape[3]
    return q.new_empty(q.shape[0], q.shape[1], width)


@torch.library.custom_op("surgery::cached_attention", mutates_args=())
def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, scores: Tensor | None, past_key: Tensor,
    past_value: Tensor, heads: int, scale: float, causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """:func:`attention` over the keys and values of a cache [batch, heads, past, width] and the new ones behind them; also gives the
    grown cache. Masks and scores are over past and new keys together."""
    joined_k = torch.cat([past_key, _heads(_biased(k, bias, q.shape[2]), heads)], 2)
    joined_v = torch.cat([past_value, _heads(_biased(v, bias, q.shape[2] + k.shape[2]), heads)], 2)
    out = _attend(_biased(q, bias, 0), joined_k, joined_v, None, key_mask, scores, heads, scale, causal)
    return out, joined_k, joined_v


@cached_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Any, key_mask: Any, scores: Any, past_key: Tensor, past_value: Tensor, heads: int, scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    grown = [
        t.new_empty(t.shape[0], t.shape[1], t.shape[2] + new.shape[1], t.shape[3]) for t, new in ((past_key, k), (past_value, v))
    ]  # fmt: skip
    return out, grown[0], grown[1]


@torch.library.custom_op("surgery::grouped_attention", mutates_args=())
def grouped_attention(q: Tensor, k: Tensor, v: Tensor, scores: Tensor | None, heads: int, groups: int, scale: float) -> Tensor:
    """Attention whose ``heads`` share ``groups`` heads of keys and values, which are read once and not copied.

    ``q`` [batch, queries, heads * width], ``k`` and ``v`` [batch, groups, keys, width], ``scores`` [batch or 1, 1, queries, keys].
    Gives [batch, queries, heads * width of v].
    """
    wide = _heads(q, heads)
    found = F.scaled_dot_product_attention(wide, k, v, scores, scale=scale, enable_gqa=True)
    return found.transpose(1, 2).reshape(q.shape[0], q.shape[1], -1)


@grouped_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scores: Any, heads: int, groups: int, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], heads * v.shape[3])


@torch.library.custom_op("surgery::packed_attention", mutates_args=())
def packed_attention(
    x: Tensor, weight: Tensor, bias: Tensor, key_mask: Tensor | None, scores: Tensor | None, heads: int, sizes: Sequence[int],
    scale: float, causal: bool,
) -> Tensor:  # fmt: skip
    """:func:`attention` of ``x`` [batch, steps, in] with its projections: ``weight`` [in, q + k + v], ``bias`` [q + k + v] and the three
    widths ``sizes``, those of q and k equal."""
    q, k, v = torch.split(torch.matmul(x, weight) + bias, list(sizes), -1)
    return _attend(q, k, v, None, key_mask, scores, heads, scale, causal)


@packed_attention.register_fake
def _(x: Tensor, weight: Tensor, bias: Any, key_mask: Any, scores: Any, heads: int, sizes: Any, scale: float, causal: bool) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], sizes[2])


def _biased(x: Tensor, bias: Tensor | None, start: int) -> Tensor:
    return x if bias is None else x + bias[start : start + x.shape[2]]


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, scores: Tensor | None, heads: int, scale: float,
    causal: bool,
) -> Tensor:  # fmt: skip
    if k.ndim == 3:
        offset = q.shape[2]
        k, v = _heads(_biased(k, bias, offset), heads), _heads(_biased(v, bias, offset + k.shape[2]), heads)
        q = _biased(q, bias, 0)
    wide = _heads(q, heads)
    added = scores
    fill = fill_of(q.dtype)
    if key_mask is not None:
        off = torch.where(key_mask[:, None, None, :] != 0, 0.0, fill).to(q.dtype)
        added = off if added is None else added + off
    if causal and q.shape[1] > 1:
        queries, keys = q.shape[1], k.shape[2]
        later = torch.ones(queries, keys, dtype=torch.bool, device=q.device).triu_(keys - queries + 1)
        off = torch.where(later, fill, 0.0).to(q.dtype)
        added = off if added is None else added + off
    out = F.scaled_dot_product_attention(wide, k, v, added, scale=scale)
    return out.transpose(1, 2).reshape(q.shape[0], q.shape[1], -1)


# ------------------------------------------------------------------ ONNX


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """Each operation as com.microsoft MultiHeadAttention; grouped heads of queries become further queries of their key head."""
    from onnxscript import opset18 as op

    from surgery.backends.fuse.contrib import operator

    inputs = ["query", "key?", "value?", "bias?", "key_padding_mask:M?", "attention_bias?", "past_key?", "past_value?"]
    attributes = {"num_heads": "int", "scale": "float", "mask_filter_value": "float", "unidirectional": "int"}
    plain = operator("MultiHeadAttention", inputs, ["output"], attributes)
    growing = operator("MultiHeadAttention", inputs, ["output", "present_key", "present_value"], attributes)

    whole = operator(
        "Attention", ["input", "weights", "bias?", "mask_index:M?", "past?", "attention_bias?"], ["output"],
        {**attributes, "qkv_hidden_sizes": "ints"},
    )  # fmt: skip

    def fill(x):  # type: ignore[no-untyped-def]
        return fill_of(torch.float16 if int(x.dtype) == 10 else torch.float32)  # TensorProto.FLOAT16

    def attention(q, k, v, bias, key_mask, scores, heads: int, scale: float, causal: bool):  # type: ignore[no-untyped-def]
        return plain(
            q, k, v, bias, key_mask, scores, num_heads=heads, scale=scale, mask_filter_value=fill(q), unidirectional=int(causal)
        )  # fmt: skip

    def cached(q, k, v, bias, key_mask, scores, past_key, past_value, heads: int, scale: float, causal: bool):  # type: ignore[no-untyped-def]
        return growing(
            q, k, v, bias, key_mask, scores, past_key, past_value, num_heads=heads, scale=scale, mask_filter_value=fill(q),
            unidirectional=int(causal),
        )  # fmt: skip

    def packed(x, weight, bias, key_mask, scores, heads: int, sizes: Sequence[int], scale: float, causal: bool):  # type: ignore[no-untyped-def]
        return whole(
            x, weight, bias, key_mask, None, scores, num_heads=heads, qkv_hidden_sizes=list(sizes), scale=scale, mask_filter_value=fill(x),
            unidirectional=int(causal),
        )  # fmt: skip

    def grouped(q, k, v, scores, heads: int, groups: int, scale: float):  # type: ignore[no-untyped-def]
        each, width = heads // groups, int(v.shape[3])
        apart = op.Reshape(q, op.Constant(value_ints=[0, 0, groups, each, -1]))
        rows = op.Reshape(op.Transpose(apart, perm=[0, 3, 1, 2, 4]), op.Constant(value_ints=[0, 0, -1, groups * int(k.shape[3])]))
        rows = op.Reshape(rows, op.Constant(value_ints=[0, -1, groups * int(k.shape[3])]))
        if scores is not None:
            tiled = op.Expand(op.Unsqueeze(scores, op.Constant(value_ints=[2])), op.Constant(value_ints=[1, 1, each, 1, 1]))
            shape = op.Shape(scores)
            last = op.Slice(shape, op.Constant(value_ints=[3]), op.Constant(value_ints=[4]))
            first = op.Slice(shape, op.Constant(value_ints=[0]), op.Constant(value_ints=[1]))
            scores = op.Reshape(tiled, op.Concat(first, op.Constant(value_ints=[1, -1]), last, axis=0))
        out = plain(rows, k, v, None, None, scores, num_heads=groups, scale=scale, mask_filter_value=fill(q), unidirectional=0)
        wide = op.Reshape(out, op.Constant(value_ints=[0, each, -1, groups * width]))
        wide = op.Reshape(wide, op.Constant(value_ints=[0, each, -1, groups, width]))
        return op.Reshape(op.Transpose(wide, perm=[0, 2, 3, 1, 4]), op.Constant(value_ints=[0, 0, heads * width]))

    return {
        torch.ops.surgery.attention.default: attention,
        torch.ops.surgery.cached_attention.default: cached,
        torch.ops.surgery.grouped_attention.default: grouped,
        torch.ops.surgery.packed_attention.default: packed,
    }
