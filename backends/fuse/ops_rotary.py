"""Rotary position embedding as one operation on whole rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("surgery::rotary", mutates_args=())
def rotary(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, heads: int, pairs: str) -> Tensor:
    """Turns the first ``2 w`` features of every head of ``x`` [batch, steps, heads * width] in pairs by given angles.

    ``cos`` and ``sin`` [positions, w]; ``rows`` [batch, steps] says which row of them belongs to a step, without it step i has row i.
    ``pairs`` says what a pair is: ``halves`` (feature i and i + w) or ``neighbours`` (2 i and 2 i + 1). The rest of a head stays.
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021, arXiv:2104.09864, section 3.2.
    """
    split = x.view(x.shape[0], x.shape[1], heads, -1)
    wide = 2 * cos.shape[1]
    c, s = (t[: x.shape[1]][None] if rows is None else t[rows] for t in (cos, sin))
    c, s = c[:, :, None], s[:, :, None]
    turned = split[..., :wide]
    if pairs == "halves":
        a, b = turned.chunk(2, -1)
        new = torch.cat([a * c - b * s, b * c + a * s], -1)
    else:
        a, b = turned[..., ::2], turned[..., 1::2]
        new = torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)
    return torch.cat([new, split[..., wide:]], -1).reshape(x.shape)


@rotary.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, rows: Any, heads: int, pairs: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """com.microsoft RotaryEmbedding; where every step has the row of its own number, its position input is the offset 0."""
    from onnxscript import opset18 as op

    from surgery.backends.fuse.contrib import operator

    embed = operator(
        "RotaryEmbedding", ["input", "position_ids:M", "cos_cache", "sin_cache"], ["output"],
        {"interleaved": "int", "num_heads": "int", "rotary_embedding_dim": "int"},
    )  # fmt: skip

    def rotary(x, cos, sin, rows, heads: int, pairs: str):  # type: ignore[no-untyped-def]
        width, turned = int(x.shape[2]) // heads, 2 * int(cos.shape[1])
        if rows is None:
            rows = op.Constant(value_ints=[0])
        part = turned if turned < width else 0
        return embed(x, rows, cos, sin, interleaved=int(pairs != "halves"), num_heads=heads, rotary_embedding_dim=part)

    return {torch.ops.surgery.rotary.default: rotary}
