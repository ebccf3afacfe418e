"""Hashes of weight files, made while something else is done.

The lock holds a hash of every byte of the weights. Tracing a model uses one core and no disk, so the files are hashed beside it:
when the first weight is computed the bytes were read once and, where memory allows, still are in the system's cache. Who waits for the
hashes has no other work, so that the files that are left are then shared out among all cores. A file that was hashed in this process and has not
changed (device, inode, size, times) is not read again; nor is one that an earlier process hashed, where there is a folder of captures
(:mod:`surgery.model.hashstore`).
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from surgery.core.diagnostics import fail
from surgery.core.progress import Bytes, report
from surgery.model import hashstore
from surgery.model.hashstore import Key

CHUNK = 1 << 22
HELPERS = 3
"""Most threads that help with what is left when somebody waits."""
KEPT = 4096
"""How many hashes a process remembers."""


def _key(path: Path) -> Key:
    found = os.stat(path)
    return os.path.realpath(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


_known: dict[Key, str] = {}
_lock = threading.Lock()


@dataclass
class _Work:
    """What the thread works on: it must not hold the :class:`Hashing`, whose end is the thread's."""

    files: list[Path]
    folder: Path | None = None
    began: int = 0
    done: int = 0
    total: int = 0
    keys: dict[Path, Key] = field(default_factory=dict)
    found: dict[Path, str] = field(default_factory=dict)
    fresh: dict[Path, str] = field(default_factory=dict)
    fault: tuple[Path, OSError] | None = None
    left: deque[Path] = field(default_factory=deque)
    running: int = 1  # the first thread, from the beginning
    guard: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)


class Hashing:
    """sha256 of some files, in order. Begins at once in a thread of its own, which ends when nobody holds this object any more. ``folder`` is where
    captures are kept."""

    def __init__(self, files: Iterable[Path], folder: Path | None = None) -> None:
        self._work = _Work(list(files), folder)
        threading.Thread(target=_run, args=(self._work,), name="hashing weights", daemon=True).start()

    def __del__(self) -> None:
        self._work.stopped.set()

    def result(self) -> dict[Path, str]:
        """Hex digests by file; waits for what is missing. Raises S0721 when a file cannot be read or changed meanwhile."""
        work = self._work
        for _ in range(min(HELPERS, (os.cpu_count() or 1) - 1, len(work.left))):
            threading.Thread(target=_help, args=(work,), name="hashing weights", daemon=True).start()
        while not work.finished.wait(0.1):
            report("hashing the weights", min(work.done, work.total), Bytes(work.total))
        if work.fault is not None:
            path, why = work.fault
            raise fail("S0721", f"cannot read {path}: {why.strerror or why}", help="check that the file is still there and may be read")
        for path, key in work.keys.items():
            if _key_or_none(path) != key:
                raise fail(
                    "S0721", f"{path} changed while it was read", help="leave the checkpoint alone while surgery runs, and start again"
                )  # fmt: skip
        if work.folder is not None:
            keys = {work.keys[path]: digest for path, digest in work.fresh.items()}
            hashstore.keep(work.folder, {key: digest for key, digest in keys.items() if hashstore.settled(key, work.began)})
            work.fresh.clear()
        return dict(work.found)


def _run(work: _Work) -> None:
    """Finds out what is missing and hashes it, with whoever helps."""
    path = Path()
    work.began = time.time_ns()
    try:
        for path in work.files:
            work.keys[path] = _key(path)
        kept = {} if work.folder is None else hashstore.known(work.folder)
        with _lock:
            known = {**kept, **_known}
        work.found |= {p: known[k] for p, k in work.keys.items() if k in known}
        missing = [p for p in work.files if p not in work.found]
        work.total = sum(work.keys[p][3] for p in missing)
        work.left.extend(dict.fromkeys(missing))
    except OSError as exc:
        work.fault = path, exc
    _rest(work)


def _help(work: _Work) -> None:
    with work.guard:
        if work.finished.is_set():
            return
        work.running += 1
    _rest(work)


def _rest(work: _Work) -> None:
    """One file after the other until none is left; the last to end says that all are done."""
    path = Path()
    try:
        while work.fault is None and not work.stopped.is_set():
            try:
                path = work.left.popleft()
            except IndexError:
                return
            digest = _hash(path, work)
            if work.stopped.is_set():
                return
            work.found[path] = work.fresh[path] = digest
            with _lock:
                if len(_known) >= KEPT:
                    _known.clear()
                _known[work.keys[path]] = digest
    except OSError as exc:
        work.fault = path, exc
    finally:
        with work.guard:
            work.running -= 1
            if not work.running:
                work.finished.set()


def _hash(path: Path, work: _Work) -> str:
    digest = hashlib.sha256()
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with open(path, "rb", buffering=0) as file:
        while not work.stopped.is_set() and (size := file.readinto(buffer)):
            digest.update(view[:size])
            with work.guard:
                work.done += size
    return digest.hexdigest()


def _key_or_none(path: Path) -> Key | None:
    try:
        return _key(path)
    except OSError:
        return None
