"""Files are filled block by block: written, hashed and read back at the same time, with few pages of the system's cache.

A block is written by one thread, hashed by another, and compared by the first with what the file then holds. Storing begins at once, and a third
thread lets go of what is stored: a file of any size occupies a few blocks of the system's cache, which are used again and again, because memory
that nobody used before costs the system far more than the copy into it. What comes out does not depend on any of this.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import queue
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch

from surgery.core.diagnostics import fail
from surgery.model.atomic import storage_errors
from surgery.model.room import shared, spare

BLOCK = 4 << 20
"""Bytes that are written, hashed and compared at a time."""
LOOK = 1 << 18
"""Bytes that are compared at a time: both sides fit into a core's cache."""
WINDOW = 16 << 20
"""Bytes after which the system is told to store what was written."""
WINDOWS = 3
"""Windows that may be on their way to the storage."""
WAITING = 2
"""Parts that may be written and not hashed yet."""
_START_WRITING, _UNTIL_STORED = 2, 7

Done = Callable[[], None]


@dataclass
class _Open:
    """A file that is being filled. ``regular``: it can be read back, and the cache has pages of it."""

    path: Path
    file: Any
    digest: Any
    regular: bool
    written: int = 0
    flushed: int = 0
    storing: deque[Future[None]] = field(default_factory=deque)


@dataclass
class Writer:
    """Writes files one after the other, in threads of its own when ``threaded``; ``digests`` are their sha256 when ``hashing``.

    Everything between ``begin`` and the next ``begin`` goes into one file. With ``checking`` every byte is read back from the file and compared with
    what was to be written; ``checked`` counts those of each file. Faults of the threads are raised by the next call, or at the end of the ``with``
    block. When the block is left by an exception nothing more is written. Raises S0801, S0802, S0804.
    """

    threaded: bool = False
    hashing: bool = False
    checking: bool = False
    digests: dict[Path, str] = field(default_factory=dict)
    checked: dict[Path, int] = field(default_factory=dict)
    _current: _Open | None = None
    _fault: BaseException | None = None
    _stopped: bool = False

    def __enter__(self) -> Writer:
        pool = (lambda name: ThreadPoolExecutor(1, thread_name_prefix=name)) if self.threaded else lambda name: None
        self._hasher: ThreadPoolExecutor | None = pool("hashing outputs")
        self._storer: ThreadPoolExecutor | None = pool("storing weights")
        self._todo: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=3)
        self._thread = threading.Thread(target=self._work, name="writing weights", daemon=True) if self.threaded else None
        self._ending: deque[Future[None]] = deque()
        self._look = Look() if self.checking else None
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._stopped = kind is not None
        try:
            if kind is None:
                self._do(self._close)
        finally:
            if self._thread is not None:
                self._todo.put(None)
                self._thread.join()
            for pool in (self._hasher, self._storer):
                if pool is not None:
                    pool.shutdown(wait=True)
            if self._current is not None:
                self._current.file.close()
        if self.threaded:
            give_back()
        if kind is None:
            self.raise_fault()

    def begin(self, path: Path, header: bytes) -> None:
        def run() -> None:
            self._close()
            with storage_errors(path):
                file = open(path, "w+b" if self.checking else "wb", buffering=0)
                regular = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            self._current = _Open(path, file, hashlib.sha256() if self.hashing else None, regular)
            self._put(memoryview(header))

        self._do(run)

    def write(self, value: torch.Tensor, done: Done) -> None:
        """The bytes of a contiguous tensor; ``done`` is called, in another thread, when nobody reads them any more."""
        self.put(memoryview(value.reshape(-1).view(torch.uint8).numpy()) if value.numel() else memoryview(b""), done)

    def put(self, view: memoryview, done: Done) -> None:
        """Bytes that nobody changes until ``done`` is called, in another thread."""

        def run() -> None:
            self._put(view)
            if self._hasher is None:
                done()
                return
            self._ending.append(self._hasher.submit(done))  # behind the hashing of these bytes
            while len(self._ending) > WAITING:
                self._ending.popleft().result()

        self._do(run)

    def raise_fault(self) -> None:
        """Raises what stopped the thread, if something did."""
        if self._fault is not None:
            raise self._fault

    # ------------------------------------------------------------ the thread

    def _do(self, action: Callable[[], None]) -> None:
        if self._thread is None:
            action()
            return
        self._todo.put(action)
        self.raise_fault()

    def _work(self) -> None:
        while (action := self._todo.get()) is not None:
            if self._fault is None and not self._stopped:
                try:
                    action()
                except BaseException as exc:  # raised again in the thread that writes
                    self._fault = exc
            del action

    def _close(self) -> None:
        if self._current is None:
            return
        current, self._current = self._current, None
        for window in current.storing:
            window.result()
        with storage_errors(current.path):
            current.file.close()
        if current.digest is not None:
            last = current.digest.hexdigest if self._hasher is None else self._hasher.submit(current.digest.hexdigest).result
            self.digests[current.path] = last()
        if self.checking and current.regular:
            self.checked[current.path] = current.written

    def _put(self, view: memoryview) -> None:
        current = self._current
        assert current is not None
        for at in range(0, len(view), BLOCK):
            block = view[at : at + BLOCK]
            if current.digest is not None and self._hasher is not None:
                self._hasher.submit(current.digest.update, block)
            with storage_errors(current.path):
                done = 0
                while done < len(block):
                    done += current.file.write(block[done:])
                if self._look is not None and current.regular:
                    self._look.compare(current.path, current.file.fileno(), block, current.written)
            if current.digest is not None and self._hasher is None:
                current.digest.update(block)
            current.written += len(block)
            if current.written - current.flushed >= WINDOW and current.regular and self._storer is not None:
                self._store(current, self._storer)

    def _store(self, current: _Open, storer: ThreadPoolExecutor) -> None:
        """Storing begins now; pages that are stored go, a window at a time."""
        descriptor, start, size = current.file.fileno(), current.flushed, current.written - current.flushed
        current.flushed = current.written
        store_soon(descriptor, start, size)
        current.storing.append(storer.submit(until_stored, descriptor, start, size))
        while len(current.storing) > WINDOWS:
            current.storing.popleft().result()


class Look:
    """A place into which files are read back, for one thread."""

    def __init__(self) -> None:
        self._place = np.empty(LOOK, np.uint8)
        self._view, self._start = memoryview(self._place), self._place.ctypes.data  # type: ignore[arg-type]

    def compare(self, path: Path, handle: int, block: memoryview, at: int) -> None:
        """What the file holds from byte ``at`` on is the block, bit by bit; raises S0804 where it is not."""
        meant = np.frombuffer(block, np.uint8)
        begin, step, call = meant.ctypes.data, len(self._place), _memcmp()
        for start in range(0, len(meant), step):
            size = min(step, len(meant) - start)
            same = os.preadv(handle, [self._view[:size]], at + start) == size and (
                np.array_equal(self._place[:size], meant[start : start + size])
                if call is None
                else not call(self._start, begin + start, size)
            )
            if not same:
                raise fail(
                    "S0804", f"writing {path} failed: it does not hold what was written at byte {at + start}", exit_code=2,
                    help="check the storage, and start again",
                )  # fmt: skip


@cache
def _memcmp() -> Any:
    """Compares two addresses beside the other threads, and without a place for what is equal; None where it is not there."""
    call = _call("memcmp")
    if call is not None:
        call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return call


def store_soon(descriptor: int, start: int, size: int) -> None:
    """The system begins to store a range, beside the computing of what follows, so that the final flush finds little left to do."""
    _sync_range(descriptor, start, size, _START_WRITING)


def until_stored(descriptor: int, start: int, size: int) -> None:
    """Waits until a range is stored; its pages leave the system's cache."""
    _sync_range(descriptor, start, size, _UNTIL_STORED)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


def _sync_range(descriptor: int, offset: int, size: int, flags: int) -> None:
    call = _call("sync_file_range")
    if call is not None:
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), flags)


@cache
def _call(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None


def give_back() -> None:
    """Freed memory goes back to the system: the allocator keeps some for every thread that worked, and none of them lives on; blocks that were
    held for the next tensors are not needed any more."""
    shared.clear()
    spare.clear()
    call = _call("malloc_trim")
    if call is not None:
        call(0)
