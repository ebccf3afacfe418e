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

import numpy as np
import torch

LARGE = 4 << 20
"""Bytes from which on it is worth it."""
PAGE = 2 << 20
"""Bytes of a large page, mostly; blocks are a multiple of it."""
SPARE = 128 << 20
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
    if size < LARGE:
        return torch.empty(tuple(shape), dtype=dtype)
    whole, block = spare.take(-(-size // PAGE) * PAGE)
    start = np.frombuffer(block, np.uint8).ctypes.data
    place = np.frombuffer(block, np.uint8, size, -start % PAGE)
    back = weakref.finalize(place, spare.give, whole, block)
    back.atexit = False
    return torch.from_numpy(place).view(dtype).view(tuple(shape))
