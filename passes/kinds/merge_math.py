"""Arithmetic of merging, in chunks: no merge needs a full-size temporary in float32 beside its inputs and its output.

Tensors, and stored ones that are not in memory (:mod:`surgery.model.pieces`), are read flat, in chunks of whole rows (a row runs along the last axis; a tensor of one axis is one row), so that elementwise
work stays in the cache and row-wise work sees whole rows. Every sum is accumulated in float64 in the order of the chunks, on one thread: results
do not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from surgery.model.flows import Parts, gathered
from surgery.model.pieces import Operand, flat
from surgery.model.room import scratch

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


class Wide:
    """A tensor in float32, chunk by chunk, in one buffer: the chunk that was asked for last stands there for whoever asks for it again."""

    def __init__(self, tensor: Operand) -> None:
        self.flat = flat(tensor)
        self._last: slice | None = None
        self._place = self._now = torch.empty(0)

    def __call__(self, at: slice) -> Tensor:
        """Not to be changed, and valid until another chunk is asked for."""
        if at != self._last:
            source = self.flat[at]
            if self._place.numel() < source.numel():
                self._place = torch.empty(source.numel())
            self._now, self._last = self._place[: source.numel()].copy_(source), at
        return self._now


def delta_of(expert: Operand, base: Operand | Wide) -> Delta:
    """``expert - base``, chunk by chunk in float32, in one buffer: what it gives may be changed, and is valid until the next chunk is asked for."""
    left, right = flat(expert), base if isinstance(base, Wide) else Wide(base)
    place = torch.empty(0)

    def run(at: slice) -> Tensor:
        nonlocal place
        source = left[at]
        if place.numel() < source.numel():
            place = torch.empty(source.numel())
        return place[: source.numel()].copy_(source).sub_(right(at))

    return run


class Sparsifier(Protocol):
    """Zeroes (and scales) entries of one task vector; called once for each chunk, in order."""

    def __call__(self, tau: Tensor, at: slice) -> Tensor: ...


class Measured:
    """A sparsifier that has to see the whole task vector once, before it is called for the first chunk."""

    def measure(self, tau: Tensor, at: slice) -> None:
        """One chunk, in order; it may be used up."""
        raise NotImplementedError

    def settle(self) -> None:
        """All chunks were seen."""
        raise NotImplementedError


def keep_all(tau: Tensor, at: slice) -> Tensor:
    return tau


# ------------------------------------------------------------------ fusing

SIGN_BIT = -(1 << 31)


def elected(parts: Sequence[Tensor], weights: Sequence[float], when: str, divide: str, zero: float = 1.0) -> Tensor:
    """:func:`elect` by the words of the language, ``elect = before | weighted`` and ``divide = count | weight | none``; the parts are used up."""
    return elect(parts, weights, weighted=when == "weighted", by_weight=divide == "weight", mean=divide != "none", zero=zero, reuse=True)


def elect(
    parts: Sequence[Tensor],
    weights: Sequence[float],
    *,
    weighted: bool,
    by_weight: bool,
    zero: float,
    mean: bool = True,
    reuse: bool = False,
) -> Tensor:
    """Sign election of TIES (Yadav et al. 2023, arXiv:2306.01708, section 3): the mean of the entries that have the elected sign.

    ``weighted``: entries are multiplied by their model's weight before the election, else after it. ``by_weight``: the mean divides by
    the weights of the agreeing models, else by their number; without ``mean`` nothing is divided, which gives their sum.
    ``zero`` is the sign where the sum is zero. With ``reuse`` the parts are used up, and the result is valid until the next election of this thread.
    """
    parts = list(parts) if reuse else [p.clone() for p in parts]
    if weighted:
        parts = [p if w == 1 else p.mul_(w) for p, w in zip(parts, weights, strict=True)]
        inner = [1.0] * len(parts)
    else:
        inner = list(weights)
    first = parts[0]
    sign, summed, *more = scratch(first.shape, 4 if mean else 2)
    total = torch.add(first, parts[1], out=summed) if len(parts) > 1 else summed.copy_(first)
    for p in parts[2:]:
        total.add_(p)
    # the sign bit where the elected sign is minus: entries that agree are positive once it is turned in them. Adding zero makes every zero a
    # positive one, and so does what is turned twice
    signs = sign.view(torch.int32)
    torch.bitwise_and((total.add_(0.0) if zero > 0 else total.neg_().add_(0.0).neg_()).view(torch.int32), SIGN_BIT, out=signs)
    for i, (p, w, own) in enumerate(zip(parts, inner, weights, strict=True)):
        p.view(torch.int32).bitwise_xor_(signs)
        p.clamp_min_(0)
        if i:
            summed.add_(p, alpha=w)
        elif w == 1:
            torch.add(p, 0.0, out=summed)
        else:
            torch.mul(p, w, out=summed).add_(0.0)
        if mean:
            count, agree = more
            share = own if by_weight else 1.0
            if i:
                count.add_(torch.gt(p, 0, out=agree), alpha=share)
            else:
                torch.gt(p, 0, out=count)
                if share != 1:
                    count.mul_(share)
    summed.view(torch.int32).bitwise_xor_(signs)
    if mean:
        count, agree = more
        if not by_weight or min(weights) >= 1:
            count.clamp_min_(1.0)
        else:
            count.add_(torch.eq(count, 0, out=agree))
        summed.div_(count)
    return summed if reuse else summed.clone()


def add_up(parts: Sequence[Tensor], weights: Sequence[float], divisor: float = 1.0, reuse: bool = False) -> Tensor:
    """The weighted sum over a divisor: every product is rounded, then every sum. With ``reuse`` the parts are used up."""
    parts = list(parts) if reuse else [p.clone() for p in parts]
    terms = [p if w == 1 else p.mul_(w) for p, w in zip(parts, weights, strict=True)]
    total = terms[0]
    for term in terms[1:]:
        total.add_(term)
    return total if divisor == 1 else total.div_(divisor)


def combined(tensors: Sequence[Operand], factors: Sequence[float], of: Operand, divisor: float = 1.0) -> Parts:
    """The sum of tensors times factors over a divisor, added in order in float32, chunk by chunk."""
    views = [flat(t) for t in tensors]
    total, term = buffers(of.shape, 2)
    for at in chunks(of.shape):
        n = at.stop - at.start
        sum_ = total[:n].copy_(views[0][at])
        if factors[0] != 1:
            sum_.mul_(factors[0])
        for view, factor in zip(views[1:], factors[1:], strict=True):
            sum_.add_(term[:n].copy_(view[at]), alpha=factor)
        yield sum_ if divisor == 1 else sum_.div_(divisor)


def combination(tensors: Sequence[Operand], factors: Sequence[float], of: Operand, divisor: float = 1.0) -> Tensor:
    """What :func:`combined` gives, rounded once to the type of ``of``."""
    return gathered(combined(tensors, factors, of, divisor), of.shape, of.dtype)
