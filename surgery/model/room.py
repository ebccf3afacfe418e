"""Memory for large tensors that are filled once and written or dropped soon.

The system hands out fresh memory page by page, at each first touch, and clears it first; this takes as long as filling the tensor does, and with
pages of 4 KiB several times as long. So such tensors are asked for in large pages, where the system has them, and what one tensor gave back the
next one gets.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch

LARGE = 4 << 20
"""Bytes from which on a tensor gets a block of its own."""
SMALL = 64 << 10
"""Bytes from which on it is worth it: tensors between the two share blocks."""
SHARED = 16 << 20
"""Bytes of a block that several tensors share: it is used again when none of them is left."""
PAGE = 2 << 20
"""Bytes of a large page, mostly; blocks are a multiple of it."""
SPARE = 256 << 20
"""Bytes that are held for the next tensors, at most."""


class Spare:
    """Blocks that nobody uses now, up to ``limit`` bytes. Several threads may take and give."""

    def __init__(self, limit: int = SPARE) -> None:
        self.limit = limit
        self.held = 0
        self._blocks: list[tuple[int, mmap.mmap]] = []
        self._lock = threading.RLock()  # a block may come back while one is taken, when memory is collected

    def take(self, size: int) -> tuple[int, mmap.mmap]:
        """The smallest block that has ``size`` bytes and is not twice as large, else a new one."""
        with self._lock:
            fitting = [i for i, (have, _) in enumerate(self._blocks) if size <= have <= 2 * size]
            if fitting:
                block = self._blocks.pop(min(fitting, key=lambda i: self._blocks[i][0]))
                self.held -= block[0]
                return block
        return size, _block(size + PAGE)  # room to begin where a page does

    def give(self, size: int, block: mmap.mmap) -> None:
        """Holds a block; older ones go where there are too many bytes."""
        with self._lock:
            self._blocks.append((size, block))
            self.held += size
            while self.held > self.limit:
                self.held -= self._blocks.pop(0)[0]

    def clear(self) -> None:
        """What is held goes back to the system."""
        with self._lock:
            self._blocks.clear()
            self.held = 0


def _block(size: int) -> mmap.mmap:
    if not sys.platform.startswith("linux"):
        return mmap.mmap(-1, size)
    made = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a request: whatever the answer, the memory is there
        made.madvise(mmap.MADV_HUGEPAGE)
    return made


spare = Spare()


def widened(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The value in another type; itself where it has that type."""
    return value if value.dtype == dtype else room(value.shape, dtype).copy_(value)


def room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous CPU tensor; its memory is used again when nothing refers to it any more."""
    size = math.prod(shape) * dtype.itemsize
    if size < SMALL:
        return torch.empty(tuple(shape), dtype=dtype)
    place = _place(size) if size >= LARGE else shared.take(size)
    return torch.from_numpy(place).view(dtype).view(tuple(shape))


def copied(value: torch.Tensor) -> torch.Tensor:
    """A contiguous copy."""
    return room(value.shape, value.dtype).copy_(value)


_scratch = threading.local()


def scratch(shape: Sequence[int], count: int) -> list[torch.Tensor]:
    """Uninitialised float32 tensors, in each thread the same memory each time: nobody holds them longer than one chunk or block takes."""
    size = math.prod(shape)
    if getattr(_scratch, "size", 0) < size or len(_scratch.places) < count:
        _scratch.size = max(size, getattr(_scratch, "size", 0))
        _scratch.places = [torch.empty(_scratch.size) for _ in range(max(count, len(getattr(_scratch, "places", ()))))]
    return [place[:size].view(tuple(shape)) for place in _scratch.places[:count]]


def _place(size: int) -> np.ndarray[Any, Any]:
    whole, block = spare.take(-(-size // PAGE) * PAGE)
    start = np.frombuffer(block, np.uint8).ctypes.data
    place = np.frombuffer(block, np.uint8, size, -start % PAGE)
    back = weakref.finalize(place, spare.give, whole, block)
    back.atexit = False
    return place


class Shared:
    """Gives out one block piece by piece, then the next. A piece keeps its block."""

    def __init__(self) -> None:
        self._block: np.ndarray[Any, Any] | None = None
        self._at = 0
        self._lock = threading.RLock()

    def take(self, size: int) -> np.ndarray[Any, Any]:
        with self._lock:
            if self._block is None or self._at + size > len(self._block):
                self._block, self._at = None, 0  # may come back at once
                self._block = _place(SHARED)
            piece = self._block[self._at : self._at + size]
            self._at += -(-size // 64) * 64  # vector units read whole lines
            return piece

    def clear(self) -> None:
        """The block that is begun goes back when nothing uses it."""
        with self._lock:
            self._block, self._at = None, 0


shared = Shared()
