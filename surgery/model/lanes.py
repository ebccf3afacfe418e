"""Tensors on their way into a file: made by a few threads, handed on in order, written by another thread.

Three things happen at once: the system reads what the next tensors need, workers compute, and one thread writes and hashes. What bounds them is
memory: a tensor is begun only when it fits beside those on the way, or when it is alone. Each tensor depends on its own inputs, and torch runs on
one thread in each worker, so the bytes do not depend on how many workers there are.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from surgery.model.atomic import storage_errors
from surgery.model.threads import one_thread

BUDGET = 256 << 20
"""Bytes of inputs and results that may be on the way at once, unless one tensor alone needs more."""
PIECE = 1 << 26
_START_WRITING = 2


class Ledger:
    """Bytes on the way. Taken by whoever begins a tensor, given back when it was written."""

    def __init__(self, budget: int | None = None) -> None:
        self.budget = BUDGET if budget is None else budget
        self.taken = 0
        self._lock = threading.Lock()

    def fits(self, size: int) -> bool:
        with self._lock:
            return self.taken == 0 or self.taken + size <= self.budget

    def take(self, size: int) -> None:
        with self._lock:
            self.taken += size

    def give(self, size: int) -> None:
        self.take(-size)


def in_order(
    names: Sequence[str],
    make: Callable[[str], torch.Tensor],
    workers: int,
    costs: Mapping[str, int],
    sizes: Mapping[str, int],
    ledger: Ledger,
    soon: Callable[[str], None] | None = None,
) -> Generator[torch.Tensor, None, None]:
    """The tensors in order, made by ``workers`` threads. ``costs`` are the bytes that making one needs, ``sizes`` those of its result.
    ``soon`` is told of each tensor a little before it is begun. The first error is raised where its tensor would come."""
    announced = 0

    def announce(upto: int) -> None:
        nonlocal announced
        while soon is not None and announced < min(upto, len(names)):
            soon(names[announced])
            announced += 1

    if workers < 1:
        for i, name in enumerate(names):
            announce(i + 2)
            yield make(name)
        return
    with one_thread(), ThreadPoolExecutor(workers, thread_name_prefix="weights") as pool:
        pending: deque[tuple[str, int, Future[torch.Tensor]]] = deque()
        at = 0
        try:
            while at < len(names) or pending:
                while at < len(names) and len(pending) < workers + 2:
                    size = max(costs.get(names[at], 0), sizes[names[at]])
                    if pending and not ledger.fits(size):
                        break
                    announce(at + workers + 3)
                    ledger.take(size)
                    pending.append((names[at], size, pool.submit(make, names[at])))
                    at += 1
                name, size, future = pending.popleft()
                value = future.result()
                ledger.give(size - sizes[name])  # the rest when it was written
                del future
                yield value
                del value
        finally:
            for _, _, future in pending:
                future.cancel()


@dataclass
class _Open:
    """A file that is being filled."""

    path: Path
    file: Any
    digest: Any = None
    written: int = 0
    flushed: int = 0


@dataclass
class Writer:
    """Writes files one after the other, in a thread of its own when ``threaded``; ``digests`` are their sha256 when ``hashing``.

    Everything between ``begin`` and the next ``begin`` goes into one file. Faults of the thread are raised by the next call, or at the end of
    the ``with`` block. When the block is left by an exception nothing more is written. Raises S0801, S0802, S0804.
    """

    threaded: bool = False
    hashing: bool = False
    digests: dict[Path, str] = field(default_factory=dict)
    _current: _Open | None = None
    _fault: BaseException | None = None
    _stopped: bool = False

    def __enter__(self) -> Writer:
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hashing outputs") if self.hashing and self.threaded else None
        self._todo: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=3)
        self._thread = threading.Thread(target=self._work, name="writing weights", daemon=True) if self.threaded else None
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
            if self._hasher is not None:
                self._hasher.shutdown(wait=True)
            if self._current is not None:
                self._current.file.close()
        if self.threaded:
            _give_back()
        if kind is None and self._fault is not None:
            raise self._fault

    def begin(self, path: Path, header: bytes) -> None:
        def run() -> None:
            self._close()
            with storage_errors(path):
                file = open(path, "wb", buffering=0)
            self._current = _Open(path, file, hashlib.sha256() if self.hashing else None)
            self._put(memoryview(header))

        self._do(run)

    def write(self, value: torch.Tensor, done: Callable[[], None]) -> None:
        """The bytes of a contiguous tensor; ``done`` is called when they are written, in the writer's thread."""

        def run() -> None:
            if value.numel():
                self._put(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
            done()

        self._do(run)

    # ------------------------------------------------------------ the thread

    def _do(self, action: Callable[[], None]) -> None:
        if self._thread is None:
            action()
            return
        self._todo.put(action)
        if self._fault is not None:
            raise self._fault

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
        with storage_errors(current.path):
            current.file.close()
        if current.digest is not None:
            self.digests[current.path] = current.digest.hexdigest()

    def _put(self, view: memoryview) -> None:
        current = self._current
        assert current is not None
        hashed = self._hasher.submit(current.digest.update, view) if self._hasher is not None else None
        with storage_errors(current.path):
            done = 0
            while done < len(view):
                done += current.file.write(view[done : done + PIECE])
        current.written += len(view)
        if current.written - current.flushed >= PIECE:
            _start_writing(current.file.fileno(), current.flushed, current.written - current.flushed)
            current.flushed = current.written
        if hashed is not None:
            hashed.result()
        elif current.digest is not None:
            current.digest.update(view)


def _start_writing(descriptor: int, offset: int, size: int) -> None:
    """Ask the system to begin storing a range now, beside the computing of what follows, so that the final flush finds little left to do."""
    call = _call("sync_file_range")
    if call is not None:
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(size), _START_WRITING)


@cache
def _call(name: str) -> Any:
    """A function of the C library; None where it has none of that name."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None, use_errno=True), name)
    except (OSError, AttributeError):
        return None


def _give_back() -> None:
    """Freed memory goes back to the system: the allocator keeps some for every thread that worked, and none of them lives on."""
    call = _call("malloc_trim")
    if call is not None:
        call(0)


def read_soon(path: str, start: int, stop: int) -> None:
    """Ask the system to read a range of a file into its cache; nothing happens where it cannot."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError:
        return
    try:
        os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)
    except (AttributeError, OSError):
        pass
    finally:
        os.close(descriptor)
