"""Memory for large tensors that are filled once and written or dropped soon.

The system hands out fresh memory page by page, at each first touch; with pages of 4 KiB this takes several times as long as filling the tensor does.
Such tensors are asked for in large pages, where the system has them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache
from mmap import PAGESIZE
from typing import Any

import torch

LARGE = 4 << 20
"""Bytes from which on it is worth asking: large pages are 2 MiB, mostly."""
_HUGE_PAGES = 14


def room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous CPU tensor."""
    made = torch.empty(tuple(shape), dtype=dtype)
    size = made.numel() * made.element_size()
    advise = _advise() if size >= LARGE else None
    if advise is not None:
        start = -(-made.data_ptr() // PAGESIZE) * PAGESIZE
        stop = (made.data_ptr() + size) // PAGESIZE * PAGESIZE
        advise(start, stop - start, _HUGE_PAGES)  # a request: whatever it answers, the memory is there
    return made


@cache
def _advise() -> Any:
    """``madvise`` of the C library; None where there is none."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        call = ctypes.CDLL(None, use_errno=True).madvise
    except (OSError, AttributeError):
        return None
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return call
