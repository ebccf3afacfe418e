"""Arithmetic of merging, in chunks: no merge needs a full-size temporary in float32 beside its inputs and its output.

Tensors are read flat, in chunks of whole rows (a row runs along the last axis; a tensor of one axis is one row), so that elementwise
work stays in the cache and row-wise work sees whole rows. Every sum is accumulated in float64 in the order of the chunks, on one thread: results
do not depend on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
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


# ------------------------------------------------------------------ magnitudes


def keys_of(tau: Tensor) -> np.ndarray:
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
        keys = keys_of(tau)
        self.bins += np.bincount(keys >> 16, minlength=1 << 16)
        self.total += keys.size

    def settle(self, k: int) -> None:
        """``k`` >= 1: which bin the threshold lies in, and how many are to be taken from it."""
        above = np.cumsum(self.bins[::-1])
        at = int(np.searchsorted(above, k))
        self.bin = (1 << 16) - 1 - at
        self.rest = k - (int(above[at - 1]) if at else 0)

    def gather(self, tau: Tensor) -> None:
        keys = keys_of(tau)
        self.inside.append((keys[(keys >> 16) == self.bin] & 0xFFFF).astype(np.uint16))

    def threshold(self) -> tuple[int, int]:
        """The key of the last entry that is kept, and how many entries of exactly this key are kept."""
        low = np.concatenate(self.inside) if self.inside else np.zeros(0, np.uint16)
        counts = np.cumsum(np.bincount(low, minlength=1 << 16)[::-1])
        at = int(np.searchsorted(counts, self.rest))
        taken = self.rest - (int(counts[at - 1]) if at else 0)
        return (self.bin << 16) | ((1 << 16) - 1 - at), taken


INFINITE = 0x7F800000
"""The key of infinity: nothing finite has a larger one."""


class Top:
    """Keeps entries above a key, and the first ``ties`` of those equal to it."""

    def __init__(self, key: int, ties: int) -> None:
        self.key, self.ties = key, ties
        self.edge = float(np.array([max(key, 0)], np.int32).view(np.float32)[0])

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        if self.key < 0:
            return tau
        if self.key >= INFINITE:
            return tau.zero_()
        flat = tau.view(-1)
        equal = np.zeros(0, np.int64)
        if self.ties > 0:
            equal = np.flatnonzero(np.abs(flat.numpy()) == np.float32(self.edge))[: self.ties]
            self.ties -= equal.size
        stays = flat[torch.from_numpy(equal)] if equal.size else None
        kept = torch.nn.functional.hardshrink(flat, self.edge)
        if stays is not None:
            kept[torch.from_numpy(equal)] = stays
        return kept.view(tau.shape)


def nothing(tau: Tensor, at: slice) -> Tensor:
    return tau.zero_()


SAMPLE = 1 << 14


def top(delta: Delta, shape: Sequence[int], keep: int) -> Sparsifier:
    """Keeps exactly the ``keep`` entries of largest magnitude of one tensor; of equal ones the first.

    A sample says between which two magnitudes the last entry that stays lies; one pass counts what is above and gathers what is between, where
    the entry is then found exactly. Should the sample have been wrong, two passes over all entries find it.
    """
    count = math.prod(shape)
    if keep <= 0:
        return nothing
    if keep >= count:
        return keep_all
    limits = (0, 0x7FFFFFFF)
    if count > SAMPLE:
        limits = edges(keys_of(delta(slice(0, count, -(-count // SAMPLE)))), keep / count)
    above, parts, held, room = 0, [np.zeros(0, np.int32)], 0, max(4 * SAMPLE, count // 8)
    for at in chunks(shape):
        large, middle = between(delta(at), *limits)
        above += large
        held += middle.size
        if held > room:  # many equal entries: the two passes need no memory for them
            above = keep
            break
        parts.append(middle)
    inside = np.concatenate(parts)
    if above < keep <= above + inside.size:
        rest = keep - above
        key = int(np.partition(inside, inside.size - rest)[inside.size - rest])
        return Top(key, rest - int(np.count_nonzero(inside > key)))
    ranking = Ranking()
    for at in chunks(shape):
        ranking.count(delta(at))
    ranking.settle(keep)
    for at in chunks(shape):
        ranking.gather(delta(at))
    return Top(*ranking.threshold())


def edges(sample: np.ndarray, share: float) -> tuple[int, int]:
    """Two keys between which the last of a share of entries most likely is: four standard deviations of the sample on either side."""
    ordered = np.sort(sample)[::-1]
    middle, spread = share * ordered.size, 4 * math.sqrt(ordered.size * share * (1 - share)) + 8
    first, last = int(middle - spread), int(middle + spread)
    return (int(ordered[last]) if last < ordered.size else 0), (int(ordered[first]) if first >= 0 else 0x7FFFFFFF)


def between(tau: Tensor, low: int, high: int) -> tuple[int, np.ndarray]:
    """How many keys of a chunk are above ``high``, and those from ``low`` to ``high``."""
    keys = keys_of(tau)
    large = keys > high
    inside: np.ndarray = keys[(keys >= low) & ~large]
    return int(np.count_nonzero(large)), inside


class Band:
    """Keeps what ``outer`` keeps and ``inner`` does not: the largest magnitudes go, and the smallest."""

    def __init__(self, outer: Sparsifier, inner: Sparsifier) -> None:
        self.outer, self.inner = outer, inner

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        largest = self.inner(tau.clone(), at)
        return self.outer(tau, at).sub_(largest)


# ------------------------------------------------------------------ chance


class Chance:
    """A stream of numbers for one tensor: numpy's SFC64, Chris Doty-Humphrey's generator, whose bits are the same on every machine."""

    def __init__(self, seed: int) -> None:
        self.source = np.random.SFC64(seed)

    def below(self, count: int, probability: float) -> np.ndarray:
        """``count`` booleans, each true with ``probability`` to 32 bits. Most are settled by 16 bits, and only those that are not draw 16 more."""
        limit = round(probability * (1 << 32))
        if limit >= 1 << 32:
            return np.ones(count, bool)
        high, low = limit >> 16, limit & 0xFFFF
        drawn = self._words(count)
        out: np.ndarray = drawn < np.uint16(high)
        open_ = np.flatnonzero(drawn == np.uint16(high))
        if open_.size:
            out[open_] = self._words(open_.size) < np.uint16(low)
        return out

    def _words(self, count: int) -> np.ndarray:
        return self.source.random_raw(-(-count // 4)).view(np.uint16)[:count]


class Drop:
    """Keeps each entry with probability ``keep`` and multiplies what is kept by ``factor``."""

    def __init__(self, keep: float, factor: float, seed: int) -> None:
        self.keep, self.factor = keep, factor
        self.chance = Chance(seed)

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        flat = tau.view(-1).numpy()
        np.multiply(flat, self.chance.below(flat.size, self.keep), out=flat)  # a third of the time of torch's masked operations
        return tau if self.factor == 1.0 else tau.mul_(self.factor)


def norm_ratio(delta: Delta, shape: Sequence[int], make: Callable[[], Sparsifier]) -> float:
    """L1 norm of a task vector over that of what a sparsifier leaves; 1 where one of them vanishes (below 1e-7)."""
    before = after = 0.0
    sparsify = make()
    for at in chunks(shape):
        tau = delta(at)
        before += float(tau.abs().sum())
        after += float(sparsify(tau, at).abs_().sum())
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0


class Scaled:
    def __init__(self, inner: Sparsifier, factor: float) -> None:
        self.inner, self.factor = inner, factor

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        return self.inner(tau, at).mul_(self.factor)


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
    """The weighted sum over a divisor. With ``reuse`` the first part is used up."""
    total = parts[0].mul_(weights[0]) if reuse else parts[0] * weights[0]
    for p, w in zip(parts[1:], weights[1:], strict=True):
        total.add_(p, alpha=w)
    return total if divisor == 1.0 else total.div_(divisor)


def products(left: Tensor, right: Tensor) -> tuple[float, float, float]:
    """``<left, left>``, ``<right, right>`` and ``<left, right>`` of two tensors of one shape, in float64, chunk by chunk."""
    a, b = left.reshape(-1), right.reshape(-1)
    totals = [0.0, 0.0, 0.0]
    size = max((at.stop - at.start for at in chunks(left.shape)), default=0)
    x, y = torch.empty(size, dtype=torch.float64), torch.empty(size, dtype=torch.float64)
    for at in chunks(left.shape):
        n = at.stop - at.start
        u, v = x[:n].copy_(a[at]), y[:n].copy_(b[at])
        for i, (p, q) in enumerate(((u, u), (v, v), (u, v))):
            totals[i] += float(torch.dot(p, q))
    return totals[0], totals[1], totals[2]


def mix(left: Tensor, right: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """``a left + b right``, computed in float32 and rounded once to the type of ``like``."""
    return combination([left, right], [a, b], like)


def combination(tensors: Sequence[Tensor], factors: Sequence[float], like: Tensor) -> Tensor:
    """The sum of tensors times factors, added in order in float32 and rounded once to the type of ``like``."""
    out = room(like.shape, like.dtype)
    into, views = out.view(-1), [t.reshape(-1) for t in tensors]
    total, term = buffers(like.shape, 2)
    for at in chunks(like.shape):
        n = at.stop - at.start
        sum_ = total[:n].copy_(views[0][at]).mul_(factors[0])
        for view, factor in zip(views[1:], factors[1:], strict=True):
            sum_.add_(term[:n].copy_(view[at]), alpha=factor)
        into[at] = sum_
    return out


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
