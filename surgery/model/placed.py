"""Files whose tensors are put in their places by those who make them, several at a time.

The header says where each tensor stands, so nobody has to wait for the one before. A block is written and, where a certificate rests on it, read back
and compared by the thread that made it, while a core's cache still holds it; storing begins as soon as enough of a file is there without a gap, and what
is stored leaves the system's cache, as in :mod:`surgery.model.writer`, which does the same for files that have to be filled in order (to be hashed).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from surgery.model import writer
from surgery.model.atomic import storage_errors
from surgery.model.flows import Parts

BLOCK = 1 << 20
"""Bytes that are made, written and compared at a time: they fit into a core's cache."""


def placeable(paths: Iterable[Path]) -> bool:
    """Whether files of these names can be written in any order."""
    return hasattr(os, "pwrite") and all(not os.path.lexists(path) or path.is_file() for path in paths)


@dataclass
class _File:
    """One file: ``waiting`` tensors are not written yet, everything before ``frontier`` is written, before ``flushed`` it is being stored."""

    path: Path
    handle: int
    waiting: int
    storing: ThreadPoolExecutor
    size: int = 0
    frontier: int = 0
    flushed: int = 0
    apart: dict[int, int] = field(default_factory=dict)
    windows: deque[tuple[int, int]] = field(default_factory=deque)
    jobs: deque[Future[None]] = field(default_factory=deque)
    guard: threading.Lock = field(default_factory=threading.Lock)

    def put(self, view: memoryview, at: int, look: writer.Look | None) -> None:
        """Writes ``view`` at a byte, and compares through ``look``, if that is given, what the file then holds. Raises S0801, S0802, S0804."""
        with storage_errors(self.path):
            done = 0
            while done < len(view):
                done += os.pwrite(self.handle, view[done:], at + done)
            if look is not None:
                look.compare(self.path, self.handle, view, at)
        self._written(at, at + len(view))

    def _written(self, start: int, stop: int) -> None:
        with self.guard:
            self.size += stop - start
            self.apart[start] = stop
            while self.frontier in self.apart:
                self.frontier = self.apart.pop(self.frontier)
            if self.frontier - self.flushed < writer.WINDOW:
                return
            self.jobs.append(self.storing.submit(self._store, self.flushed, self.frontier - self.flushed))
            self.flushed = self.frontier
            late = self.jobs.popleft() if len(self.jobs) > writer.WINDOWS else None
        if late is not None:
            late.result()  # the storage is slower than we are: its cache is not filled further

    def _store(self, start: int, size: int) -> None:
        """Storing of a window begins; an earlier one is waited for and leaves the system's cache."""
        writer.store_soon(self.handle, start, size)
        self.windows.append((start, size))
        while len(self.windows) > writer.WINDOWS:
            writer.until_stored(self.handle, *self.windows.popleft())

    def close(self) -> None:
        """In the thread that stores, when everything is written."""
        try:
            while self.windows:
                writer.until_stored(self.handle, *self.windows.popleft())
        finally:
            handle, self.handle = self.handle, -1
            with storage_errors(self.path):
                os.close(handle)


class Placed:
    """Files with their headers and the number of tensors that each waits for; ``checked`` counts the bytes of each that were compared.

    A file is opened when the first of its tensors comes and closed after the last. Threads may put tensors at once, each through a :class:`Pen`.
    """

    def __init__(self, headers: dict[Path, bytes], counts: dict[Path, int], checking: bool) -> None:
        self.headers, self.counts, self.checking = headers, counts, checking
        self.checked: dict[Path, int] = {}
        self._open: dict[Path, _File] = {}
        self._ends: list[Future[None]] = []
        self._guard = threading.Lock()
        self._own = threading.local()

    def __enter__(self) -> Placed:
        self._storing = ThreadPoolExecutor(1, thread_name_prefix="storing weights")
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                for path in [p for p, count in self.counts.items() if not count]:
                    self._finish(self._file(path))
        finally:
            self._storing.shutdown(wait=True)
            for file in self._open.values():
                if file.handle >= 0:
                    os.close(file.handle)
            writer.give_back()
        if kind is None:
            for end in self._ends:
                end.result()

    def pen(self, path: Path, at: int) -> Pen:
        """For a tensor that begins at byte ``at`` behind the header; for the thread that calls."""
        if not hasattr(self._own, "block"):
            self._own.block, self._own.look = memoryview(bytearray(BLOCK)), self._look()
        return Pen(self._file(path), len(self.headers[path]) + at, self._own.block, self._own.look)

    def done(self, path: Path) -> None:
        """One tensor of a file is in its place."""
        file = self._file(path)
        with file.guard:
            file.waiting -= 1
            last = not file.waiting
        if last:
            self._finish(file)

    def _look(self) -> writer.Look | None:
        return writer.Look() if self.checking else None

    def _file(self, path: Path) -> _File:
        with self._guard:
            if path not in self._open:
                with storage_errors(path):
                    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0), 0o666)
                file = self._open[path] = _File(path, handle, self.counts[path], self._storing)
                file.put(memoryview(self.headers[path]), 0, self._look())
            return self._open[path]

    def _finish(self, file: _File) -> None:
        if self.checking:
            self.checked[file.path] = file.size
        self._ends.append(self._storing.submit(file.close))


class Pen:
    """Writes one tensor from its first byte to its last. ``block`` is the thread's: what fills it is written before anything else does."""

    def __init__(self, file: _File, at: int, block: memoryview, look: writer.Look | None) -> None:
        self.file, self.at, self.block, self.look = file, at, block, look

    def put(self, view: memoryview) -> None:
        """The next bytes."""
        for start in range(0, len(view), BLOCK):
            piece = view[start : start + BLOCK]
            self.file.put(piece, self.at, self.look)
            self.at += len(piece)

    def tensor(self, value: Tensor) -> None:
        """The bytes of a contiguous tensor."""
        if value.numel():
            self.put(memoryview(value.reshape(-1).view(torch.uint8).numpy()))

    def parts(self, parts: Parts, dtype: torch.dtype) -> None:
        """A tensor that comes in parts, each rounded to ``dtype`` where it is written from."""
        place, at = torch.frombuffer(self.block, dtype=dtype), 0
        room = len(place)
        for part in parts:
            size = part.numel()
            if at + size > room:
                self.put(self.block[: at * dtype.itemsize])
                at = 0
            if size > room:
                self.tensor(part.to(dtype))
                continue
            place[at : at + size] = part.view(-1)
            at += size
        self.put(self.block[: at * dtype.itemsize])
