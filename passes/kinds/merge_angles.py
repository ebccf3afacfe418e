"""Angles between the tensors of models, of whole tensors, of rows or of columns, and sums whose factors they decide.

Products are summed chunk by chunk, chunks in float64; nothing of a tensor's size is held beside its inputs and the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from surgery.model.pieces import Operand, flat, like
from surgery.passes.kinds.merge_math import Delta, chunks

Along = Literal["tensor", "row", "column"]


def wide_of(tensor: Operand) -> Delta:
    """A tensor as it is, chunk by chunk in float32."""
    source = flat(tensor)
    return lambda at: source[at].to(torch.float32, copy=True)


def gram(vectors: Sequence[Delta], shape: Sequence[int], along: Along) -> Tensor:
    """Inner products ``[n, n, groups]`` in float64; a group is the whole tensor, a row (along the last axis), or a column."""
    length = shape[-1]
    rows = math.prod(shape) // max(1, length)
    n = len(vectors)
    out = torch.zeros(n, n, {"tensor": 1, "row": rows, "column": length}[along], dtype=torch.float64)
    for at in chunks(shape):
        parts = [v(at).double() for v in vectors]
        for i in range(n):
            for j in range(i + 1):
                if along == "tensor":
                    out[i, j, 0] += torch.dot(parts[i], parts[j])
                    continue
                product = (parts[i] * parts[j]).view(-1, length)
                if along == "row":
                    out[i, j, at.start // length : at.stop // length] = product.sum(1)
                else:
                    out[i, j] += product.sum(0)
    lower = torch.arange(n)[:, None] >= torch.arange(n)[None]
    return torch.where(lower[..., None], out, out.transpose(0, 1))


def weave(
    vectors: Sequence[Delta],
    factors: Sequence[Tensor],
    shape: Sequence[int],
    along: Along,
    of: Operand,
    start: Operand | None = None,
) -> Tensor:
    """The sum of vectors times the factors of their groups ``[groups]``, in float32, on top of ``start``; rounded once to the type of ``of``."""
    length = shape[-1]
    out = like(of)
    into = out.view(-1)
    first = None if start is None else flat(start)
    narrow = [f.float() for f in factors]
    for at in chunks(shape):
        total: Tensor | None = None
        for vector, factor in zip(vectors, narrow, strict=True):
            own = factor[at.start // length : at.stop // length, None] if along == "row" else factor[None]
            term = vector(at).view(-1, length).mul_(own)
            total = term if total is None else total.add_(term)
        assert total is not None
        made = total.view(-1)
        into[at] = made if first is None else made.add_(first[at].to(torch.float32))
    return out


def products(left: Operand, right: Operand, exact: bool = False) -> tuple[float, float, float]:
    """``<left, left>``, ``<right, right>`` and ``<left, right>`` of two tensors of one shape, chunk by chunk. Products of two half-precision numbers
    are exact in float32, in which those of a chunk are added pair by pair; others, and with ``exact`` all, are multiplied and added in float64."""
    a, b = flat(left), flat(right)
    totals = [0.0, 0.0, 0.0]
    size = max((at.stop - at.start for at in chunks(left.shape)), default=0)
    half = not exact and max(left.dtype.itemsize, right.dtype.itemsize) < 4
    x, y, z = (torch.empty(size, dtype=torch.float32 if half else torch.float64) for _ in range(3))
    for at in chunks(left.shape):
        n = at.stop - at.start
        u, v = x[:n].copy_(a[at]), y[:n].copy_(b[at])
        for i, (p, q) in enumerate(((u, u), (v, v), (u, v))):
            # a dot product adds in a few long rows, whose rounding errors grow with their length
            totals[i] += float(torch.mul(p, q, out=z[:n]).sum() if half else torch.dot(p, q))
    if half and not math.isfinite(sum(totals)):  # beyond float32, or an element that is not finite
        return products(left, right, exact=True)
    return totals[0], totals[1], totals[2]


def arc(cosine: float, t: float) -> tuple[float, float]:
    """The two factors of spherical interpolation at ``t``; linear where the directions (nearly) agree or oppose."""
    cosine = max(-1.0, min(1.0, cosine))
    if abs(cosine) > 0.9995:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
