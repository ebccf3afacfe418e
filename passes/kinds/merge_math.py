"""Arithmetic of merging, in chunks: no merge needs a full-size temporary in float32 beside its inputs and its output.

Tensors are read flat, in chunks of whole rows (a row runs along the last axis; a tensor of one axis is one row), so that elementwise
work stays in the cache and row-wise work sees whole rows. Every sum is accumulated in float64 in the order of the chunks, on one thread: results
do not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from surgery.model.room import room

CHUNK = 1 << 17
"""Elements of a chunk, about: 512 KiB in float32, so that the few that a formula needs stay in a core's cache."""

Delta = Callable[[slice], Tensor]
"""A task vector: the float32 differences of a slice of flat positions."""


def rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """Number of rows and length of one."""
    if len(shape) < 2:
        return 1, math.prod(shape)
    return math.prod(shape[:-1]), shape[-1]


def chunks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of flat positions, whole rows each."""
    rows, length = rows_of(shape)
    total = rows * length
    step = max(1, CHUNK // max(1, length)) * length
    for start in range(0, total, max(1, step)):
        yield slice(start, min(total, start + step))


def buffers(shape: Sequence[int], count: int) -> list[Tensor]:
    """Float32 tensors that hold one chunk each, to be used again for every chunk."""
    size = max((at.stop - at.start for at in chunks(shape)), default=0)
    return [torch.empty(size) for _ in range(count)]


def delta_of(expert: Tensor, base: Tensor) -> Delta:
    """``expert - base``, chunk by chunk in float32."""
    left, right = expert.reshape(-1), base.reshape(-1)
    wide = torch.empty(0)

    def run(at: slice) -> Tensor:
        nonlocal wide
        tau, other = left[at].to(torch.float32, copy=True), right[at]
        if wide.numel() < tau.numel():
            wide = torch.empty(tau.numel())
        return tau.sub_(wide[: tau.numel()].copy_(other))

    return run


class Sparsifier(Protocol):
    """Zeroes (and scales) entries of one task vector; called once for each chunk, in order."""

    def __call__(self, tau: Tensor, at: slice) -> Tensor: ...


def keep_all(tau: Tensor, at: slice) -> Tensor:
    return tau


# ------------------------------------------------------------------ fusing


def elect(
    parts: Sequence[Tensor], weights: Sequence[float], *, weighted: bool, by_weight: bool, zero: float, reuse: bool = False
) -> Tensor:
    """Sign election of TIES (Yadav et al. 2023, arXiv:2306.01708, section 3): the mean of the entries that have the elected sign.

    ``weighted``: entries are multiplied by their model's weight before the election, else after it. ``by_weight``: the mean divides by
    the weights of the agreeing models, else by their number. ``zero`` is the sign where the sum is zero. With ``reuse`` the parts are
    used up.
    """
    parts = list(parts) if reuse else [p.clone() for p in parts]
    if weighted:
        parts = [p if w == 1 else p.mul_(w) for p, w in zip(parts, weights, strict=True)]
        inner = [1.0] * len(parts)
    else:
        inner = list(weights)
    total = parts[0].clone()
    for p in parts[1:]:
        total += p
    # plus one where the elected sign is plus, minus one where it is minus: entries that agree are positive once multiplied by it
    sign, agree = torch.ones_like(total), torch.empty_like(total)
    if zero > 0:
        torch.copysign(sign, total.add_(0.0), out=sign)  # adding zero makes every zero a positive one
    else:
        torch.copysign(sign, total.neg_().add_(0.0), out=sign).neg_()
    summed, count = total.zero_(), torch.zeros_like(total)
    for p, w, own in zip(parts, inner, weights, strict=True):
        p.mul_(sign).clamp_min_(0)
        summed.add_(p, alpha=w)
        count.add_(torch.gt(p, 0, out=agree), alpha=own if by_weight else 1.0)
    if by_weight:
        count.add_(torch.eq(count, 0, out=agree))
    else:
        count.clamp_min_(1.0)
    return summed.mul_(sign).div_(count)


def add_up(parts: Sequence[Tensor], weights: Sequence[float], divisor: float = 1.0, reuse: bool = False) -> Tensor:
    """The weighted sum over a divisor: every product is rounded, then every sum. With ``reuse`` the parts are used up."""
    parts = list(parts) if reuse else [p.clone() for p in parts]
    terms = [p if w == 1 else p.mul_(w) for p, w in zip(parts, weights, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total.add_(term)
    return total if divisor == 1 else total.div_(divisor)


def combination(tensors: Sequence[Tensor], factors: Sequence[float], like: Tensor, divisor: float = 1.0) -> Tensor:
    """The sum of tensors times factors over a divisor, added in order in float32 and rounded once to the type of ``like``."""
    out = room(like.shape, like.dtype)
    into, views = out.view(-1), [t.reshape(-1) for t in tensors]
    total, term = buffers(like.shape, 2)
    for at in chunks(like.shape):
        n = at.stop - at.start
        sum_ = total[:n].copy_(views[0][at])
        if factors[0] != 1:
            sum_.mul_(factors[0])
        for view, factor in zip(views[1:], factors[1:], strict=True):
            sum_.add_(term[:n].copy_(view[at]), alpha=factor)
        into[at] = sum_ if divisor == 1 else sum_.div_(divisor)
    return out
