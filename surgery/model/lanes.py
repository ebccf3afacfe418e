"""Tensors on their way into a file: made by a few threads, handed on in order, written by others (:mod:`surgery.model.writer`).

Three things happen at once: the system reads what the next tensors need, workers compute, and the writer writes and hashes. What bounds them is
memory: a tensor is begun only when it fits beside those on the way, or when it is alone. Each tensor depends on its own inputs, and torch runs on
one thread in each worker, so the bytes do not depend on how many workers there are.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

from surgery.model.threads import alone, one_thread

BUDGET = 256 << 20
"""Bytes of inputs and results that may be on the way at once, unless one tensor alone needs more."""


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
    with one_thread(), ThreadPoolExecutor(workers, thread_name_prefix="weights", initializer=alone) as pool:
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


class Buffers:
    """A few buffers that are used again and again."""

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self._free: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._unmade = count

    def take(self, alive: Callable[[], None]) -> memoryview:
        """A free buffer; ``alive`` is called while there is none, and raises when whoever has them will not give them back."""
        while True:
            try:
                return self._free.get(block=False)
            except queue.Empty:
                pass
            if self._unmade:
                self._unmade -= 1
                return memoryview(bytearray(self.size))
            alive()
            with suppress(queue.Empty):
                return self._free.get(timeout=0.1)

    def give(self, buffer: memoryview) -> None:
        self._free.put(buffer)


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
