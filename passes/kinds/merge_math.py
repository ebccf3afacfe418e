"""Arithmetic of merging, in chunks: no merge needs a full-size temporary in float32 beside its inputs and its output.

Tensors are read flat, in chunks of whole rows (a row runs along the last axis; a tensor of one axis is one row), so that elementwise
work stays in the cache and row-wise work sees whole rows. Every sum is accumulated in float64 in the order of the chunks: results do
not depend on threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 18
"""Elements of a chunk, about: 1 MiB in float32."""

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


def delta_of(expert: Tensor, base: Tensor) -> Delta:
    """``expert - base``, chunk by chunk in float32."""
    left, right = expert.reshape(-1), base.reshape(-1)

    def run(at: slice) -> Tensor:
        return left[at].to(torch.float32, copy=True).sub_(right[at].to(torch.float32))

    return run


class Sparsifier(Protocol):
    """Zeroes (and scales) entries of one task vector; called once for each chunk, in order."""

    def __call__(self, tau: Tensor, at: slice) -> Tensor: ...


def keep_all(tau: Tensor, at: slice) -> Tensor:
    return tau


# ------------------------------------------------------------------ magnitudes


def _keys(tau: Tensor) -> np.ndarray:
    """Magnitudes as integers of the same order: the bits of a non-negative float count up with its value."""
    return tau.abs().contiguous().view(torch.int32).numpy()  # type: ignore[no-any-return]


class Ranking:
    """Finds the ``k``-th largest magnitude of any number of chunks exactly, in two passes and little memory.

    First pass :meth:`count`, then :meth:`settle`, second pass :meth:`gather`, then :meth:`threshold`.
    """

    def __init__(self) -> None:
        self.bins = np.zeros(1 << 16, np.int64)
        self.total = 0
        self.bin = 0
        self.rest = 0
        self.inside: list[np.ndarray] = []

    def count(self, tau: Tensor) -> None:
        keys = _keys(tau)
        self.bins += np.bincount(keys >> 16, minlength=1 << 16)
        self.total += keys.size

    def settle(self, k: int) -> None:
        """``k`` >= 1: which bin the threshold lies in, and how many are to be taken from it."""
        above = np.cumsum(self.bins[::-1])
        at = int(np.searchsorted(above, k))
        self.bin = (1 << 16) - 1 - at
        self.rest = k - (int(above[at - 1]) if at else 0)

    def gather(self, tau: Tensor) -> None:
        keys = _keys(tau)
        self.inside.append((keys[(keys >> 16) == self.bin] & 0xFFFF).astype(np.uint16))

    def threshold(self) -> tuple[int, int]:
        """The key of the last entry that is kept, and how many entries of exactly this key are kept."""
        low = np.concatenate(self.inside) if self.inside else np.zeros(0, np.uint16)
        counts = np.cumsum(np.bincount(low, minlength=1 << 16)[::-1])
        at = int(np.searchsorted(counts, self.rest))
        taken = self.rest - (int(counts[at - 1]) if at else 0)
        return (self.bin << 16) | ((1 << 16) - 1 - at), taken


class Top:
    """Keeps entries above a key, and the first ``ties`` of those equal to it."""

    def __init__(self, key: int, ties: int) -> None:
        self.key, self.ties = key, ties

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        keys = _keys(tau)
        keep = keys > self.key
        equal = np.flatnonzero(keys == self.key)
        keep[equal[: self.ties]] = True
        self.ties = max(0, self.ties - equal.size)
        return tau.mul_(torch.from_numpy(keep))


def nothing(tau: Tensor, at: slice) -> Tensor:
    return tau.zero_()


def top(delta: Delta, shape: Sequence[int], keep: int) -> Sparsifier:
    """Keeps exactly the ``keep`` entries of largest magnitude of one tensor; of equal ones the first."""
    if keep <= 0:
        return nothing
    if keep >= math.prod(shape):
        return keep_all
    ranking = Ranking()
    for at in chunks(shape):
        ranking.count(delta(at))
    ranking.settle(keep)
    for at in chunks(shape):
        ranking.gather(delta(at))
    return Top(*ranking.threshold())


class Band:
    """Keeps what ``outer`` keeps and ``inner`` does not: the largest magnitudes go, and the smallest."""

    def __init__(self, outer: Sparsifier, inner: Sparsifier) -> None:
        self.outer, self.inner = outer, inner

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        largest = self.inner(tau.clone(), at)
        return self.outer(tau, at).sub_(largest)


# ------------------------------------------------------------------ chance


class Drop:
    """Keeps each entry with probability ``keep`` and multiplies what is kept by ``factor``."""

    def __init__(self, keep: float, factor: float, seed: int) -> None:
        self.keep, self.factor = keep, factor
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        drawn = torch.rand(tau.shape, generator=self.generator) < self.keep
        return tau.mul_(drawn).mul_(self.factor)


def norm_ratio(delta: Delta, shape: Sequence[int], make: Callable[[], Sparsifier]) -> float:
    """L1 norm of a task vector over that of what a sparsifier leaves; 1 where one of them vanishes (below 1e-7)."""
    before = after = 0.0
    sparsify = make()
    for at in chunks(shape):
        tau = delta(at)
        before += float(tau.abs().sum(dtype=torch.float64))
        after += float(sparsify(tau, at).abs().sum(dtype=torch.float64))
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0


class Scaled:
    def __init__(self, inner: Sparsifier, factor: float) -> None:
        self.inner, self.factor = inner, factor

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        return self.inner(tau, at).mul_(self.factor)


# ------------------------------------------------------------------ fusing


def elect(parts: Sequence[Tensor], weights: Sequence[float], *, weighted: bool, by_weight: bool, zero: float) -> Tensor:
    """Sign election of TIES (Yadav et al. 2023, arXiv:2306.01708, section 3): the mean of the entries that have the elected sign.

    ``weighted``: entries are multiplied by their model's weight before the election, else after it. ``by_weight``: the mean divides by
    the weights of the agreeing models, else by their number. ``zero`` is the sign where the sum is zero.
    """
    scaled = [p * w for p, w in zip(parts, weights, strict=True)]
    total = torch.zeros_like(parts[0])
    for p in scaled if weighted else parts:
        total += p
    sign = torch.sign(total)
    sign[sign == 0] = zero
    summed, count = torch.zeros_like(total), torch.zeros_like(total)
    for part, p, w in zip(parts, scaled, weights, strict=True):
        mine = p if weighted else part
        agree = (torch.sign(mine) == sign) & (mine != 0)
        summed += torch.where(agree, p, torch.zeros((), dtype=p.dtype))
        count += agree * (w if by_weight else 1.0)
    count[count == 0] = 1.0
    return summed.div_(count)


def add_up(parts: Sequence[Tensor], weights: Sequence[float], divisor: float = 1.0) -> Tensor:
    total = parts[0] * weights[0]
    for p, w in zip(parts[1:], weights[1:], strict=True):
        total.add_(p, alpha=w)
    return total if divisor == 1.0 else total.div_(divisor)


def dot(left: Callable[[slice], Tensor], right: Callable[[slice], Tensor], shape: Sequence[int]) -> float:
    """Inner product, accumulated in float64 chunk by chunk."""
    total = 0.0
    for at in chunks(shape):
        total += float((left(at).double() * right(at).double()).sum())
    return total


def flat(tensor: Tensor) -> Callable[[slice], Tensor]:
    """A tensor read like a task vector: float32 chunks of its flat positions."""
    view = tensor.reshape(-1)
    return lambda at: view[at].to(torch.float32)


def arc(cosine: float, t: float) -> tuple[float, float]:
    """The two factors of spherical interpolation at ``t``; linear where the directions (nearly) agree or oppose."""
    cosine = max(-1.0, min(1.0, cosine))
    if abs(cosine) > 0.9995:
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def dropped(delta: Delta, shape: Sequence[int], density: float, rescale: str, seed: int) -> Sparsifier:
    """DARE's sparsifier (Yu et al. 2024, arXiv:2311.03099): ``inverse`` divides by the density, ``l1`` restores the tensor's L1 norm."""
    if density >= 1:
        return keep_all
    if density <= 0:
        return nothing
    if rescale == "l1":
        return Drop(density, norm_ratio(delta, shape, lambda: Drop(density, 1.0, seed)), seed)
    return Drop(density, 1.0 / density if rescale == "inverse" else 1.0, seed)


def ranks(rows: Tensor) -> Tensor:
    """Rank of each entry in its row by magnitude, 0 the smallest; of equal ones the first is the larger."""
    length = rows.shape[1]
    order = length - 1 - torch.argsort(rows.abs().flip(1), dim=1, stable=True)  # smallest first; of equal ones the later position
    out = torch.empty_like(order)
    out.scatter_(1, order, torch.arange(length).expand_as(order))
    return out


class RowBand:
    """In each row the ``gone`` largest magnitudes go, and what is not among the ``kept`` largest."""

    def __init__(self, length: int, gone: int, kept: int) -> None:
        self.length, self.gone, self.kept = length, gone, kept

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        rows = tau.view(-1, self.length)
        place = self.length - 1 - ranks(rows)  # 0 the largest
        return tau.mul_(((place >= self.gone) & (place < self.kept)).view(-1))


class RankedDrop:
    """DELLA's: the probability of staying grows with the rank of an entry in its row."""

    def __init__(self, length: int, density: float, epsilon: float, inverse: bool, seed: int) -> None:
        self.length, self.density, self.epsilon, self.inverse = length, density, epsilon, inverse
        self.generator = torch.Generator().manual_seed(seed)

    def probabilities(self, rows: Tensor) -> Tensor:
        if self.length < 2:
            return torch.full_like(rows, self.density)
        return (self.density - self.epsilon) + 2 * self.epsilon * ranks(rows).to(torch.float32) / (self.length - 1)

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        rows = tau.view(-1, self.length)
        keep = self.probabilities(rows)
        drawn = torch.rand(rows.shape, generator=self.generator) < keep
        rows.mul_(drawn)
        return tau.div_(keep.view(-1)) if self.inverse else tau
