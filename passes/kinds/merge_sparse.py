"""Which entries of a task vector stay: by magnitude, exactly, and by chance, repeatably.

Sparsifiers are called once for each chunk of a tensor, in order (see :mod:`surgery.passes.kinds.merge_math`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from surgery.passes.kinds.merge_math import Delta, Measured, Sparsifier, chunks, keep_all

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
        self.low = np.zeros(1 << 16, np.int64)

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
        self.low += np.bincount(keys[(keys >> 16) == self.bin] & 0xFFFF, minlength=1 << 16)

    def threshold(self) -> tuple[int, int]:
        """The key of the last entry that is kept, and how many entries of exactly this key are kept."""
        counts = np.cumsum(self.low[::-1])
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
    the entry is then found exactly. Should the sample have been wrong, two passes over all entries find it. Where no more than ``keep`` entries
    differ from zero all stay.
    """
    count = math.prod(shape)
    if keep <= 0:
        return nothing
    if keep >= count:
        return keep_all
    limits = (0, 0x7FFFFFFF)
    if count > SAMPLE:
        limits = edges(keys_of(delta(slice(0, count, -(-count // SAMPLE)))), keep / count)
    if limits[0] == 0:  # most entries did not change at all: that these stay or go is the same
        if sum(int(torch.count_nonzero(delta(at))) for at in chunks(shape)) <= keep:
            return keep_all
        limits = (1, limits[1])
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
    """Which entries of one tensor stay, each with ``probability`` to 32 bits: drawn by numpy's SFC64, Chris Doty-Humphrey's generator, whose bits are
    the same on every machine, ``BLOCK`` entries at a time, whatever range of them is asked for.

    A number below the probability is found for 64 entries at once: the binary digits of theirs are drawn one after the other, and an entry is
    settled by the first that differs from the probability's. A half takes one bit of an entry; after ``DIGITS`` digits the few entries that are
    still open draw the rest by themselves. With ``again`` ranges may be asked for a second time, which takes one bit of memory an entry.
    """

    BLOCK = 1 << 17
    DIGITS = 12

    def __init__(self, seed: int, probability: float, again: bool = False) -> None:
        self.source, self.again = np.random.SFC64(seed), again
        self.limit = min(1 << 32, max(0, round(probability * (1 << 32))))
        self._drawn = 0
        self._blocks: dict[int, np.ndarray] = {}

    def __call__(self, at: slice) -> np.ndarray:
        """Ones and zeros, one byte each, for flat positions; ranges come in order."""
        first = at.start // self.BLOCK
        if not self.again:
            for old in [b for b in self._blocks if b < first]:
                del self._blocks[old]
        parts = []
        for block in range(first, -(-at.stop // self.BLOCK)):
            while self._drawn <= block:
                self._blocks[self._drawn] = self._draw()
                self._drawn += 1
            start, stop = (min(max(p - block * self.BLOCK, 0), self.BLOCK) for p in (at.start, at.stop))
            bits = np.unpackbits(self._blocks[block][start // 8 : -(-stop // 8)], bitorder="little")
            parts.append(bits[start % 8 : start % 8 + stop - start])
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, np.uint8)

    def _draw(self) -> np.ndarray:
        """One bit for each entry of the next block, packed."""
        words = self.BLOCK // 64
        stays, limit = np.zeros(words, np.uint64), self.limit
        if limit >> 32:
            return (~stays).view(np.uint8)
        open_ = ~stays
        for _ in range(self.DIGITS):
            if not limit:  # all digits that follow are zeros: nothing is below them
                return stays.view(np.uint8)
            limit <<= 1
            digit = self.source.random_raw(words)
            if limit >> 32:
                same = open_ & digit
                stays |= open_ ^ same
                open_ = same
            else:
                open_ &= ~digit
            limit &= (1 << 32) - 1
        left = np.flatnonzero(open_)
        entries = np.flatnonzero(np.unpackbits(open_[left].view(np.uint8), bitorder="little"))
        drawn = self.source.random_raw(-(-entries.size // 2)).view(np.uint32)[: entries.size]
        below = np.zeros(64 * left.size, np.uint8)
        below[entries] = drawn < limit
        stays[left] |= np.packbits(below, bitorder="little").view(np.uint64)
        return stays.view(np.uint8)


class Drop:
    """Keeps each entry with probability ``keep`` and multiplies what is kept by ``factor``."""

    def __init__(self, keep: float, factor: float, seed: int, again: bool = False) -> None:
        self.factor = factor
        self.chance = Chance(seed, keep, again)
        self._place = torch.empty(0)

    def _mask(self, at: slice) -> Tensor:
        size = at.stop - at.start
        if self._place.numel() < size:
            self._place = torch.empty(size)
        return self._place[:size].copy_(torch.from_numpy(self.chance(at)))

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        flat = tau.view(-1)
        flat.mul_(self._mask(at))
        return tau if self.factor == 1.0 else tau.mul_(self.factor)


class Restored(Drop, Measured):
    """The same with the factor that gives a whole task vector its L1 norm back. What was drawn to find it is kept, one bit an entry."""

    def __init__(self, keep: float, seed: int) -> None:
        super().__init__(keep, 1.0, seed, again=True)
        self._before = self._after = 0.0

    def measure(self, tau: Tensor, at: slice) -> None:
        size = tau.view(-1).abs_()
        self._before += float(size.sum())
        self._after += float(size.mul_(self._mask(at)).sum())

    def settle(self) -> None:
        self.factor = ratio(self._before, self._after)


def norm_ratio(delta: Delta, shape: Sequence[int], make: Callable[[], Sparsifier]) -> float:
    """L1 norm of a task vector over that of what a sparsifier leaves; 1 where one of them vanishes (below 1e-7)."""
    before = after = 0.0
    sparsify = make()
    for at in chunks(shape):
        tau = delta(at)
        before += float(tau.abs().sum())
        after += float(sparsify(tau, at).abs_().sum())
    return ratio(before, after)


def ratio(before: float, after: float) -> float:
    """What scales a norm back; 1 where one of the two vanishes (below 1e-7)."""
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0


class Scaled:
    def __init__(self, inner: Sparsifier, factor: float) -> None:
        self.inner, self.factor = inner, factor

    def __call__(self, tau: Tensor, at: slice) -> Tensor:
        return self.inner(tau, at).mul_(self.factor)


def dropped(density: float, rescale: str, seed: int) -> Sparsifier:
    """DARE's sparsifier (Yu et al. 2024, arXiv:2311.03099): ``inverse`` divides by the density, ``l1`` restores the tensor's L1 norm."""
    if density >= 1:
        return keep_all
    if density <= 0:
        return nothing
    if rescale == "l1":
        return Restored(density, seed)
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
        return tau.div_(keep.view(-1).clamp_min_(torch.finfo(torch.float32).tiny)) if self.inverse else tau  # what never stays is zero
