"""Outputs that appear whole or not at all.

An output is made in a temporary sibling (same folder, so same file system), flushed to the storage, and exchanged with what stood
there in one step of the kernel. A killed run leaves the old output and a temporary that the next run removes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.source import Span

try:
    import fcntl
except ImportError:  # pragma: no cover - not on Windows
    fcntl = None  # type: ignore[assignment]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
MARK = ".surgery-"


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn failures of the storage into diagnostics with exit code 2: S0801 no space, S0802 not writable, S0804 anything else."""
    try:
        yield
    except OSError as exc:
        raise _storage_error(Path(path), exc) from exc


def _storage_error(path: Path, exc: OSError) -> SurgeryError:
    what = exc.strerror or str(exc)
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return fail(
            "S0801",
            f"there is no space left to write {path}",
            exit_code=2,
            notes=(what,),
            help="free space there, or write to another place",
        )
    if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return fail("S0802", f"{path} cannot be written", exit_code=2, notes=(what,), help="choose a folder that you may write to")
    if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        return fail(
            "S0802",
            f"{path} cannot be written: its folder is not there or is a file",
            exit_code=2,
            notes=(what,),
            help="make the folder first, or correct the path",
        )
    return fail("S0804", f"writing {path} failed: {what}", exit_code=2, help="check the storage, and start again")


@dataclass
class _Group:
    """Outputs of one run that wait for each other, and what is to be done when they all stand."""

    opened: list[AtomicOutput] = field(default_factory=list)
    waiting: list[AtomicOutput] = field(default_factory=list)
    afterwards: list[Callable[[], None]] = field(default_factory=list)


_group: ContextVar[_Group | None] = ContextVar("surgery_outputs", default=None)


@contextmanager
def together() -> Iterator[None]:
    """Outputs that are made inside take their places when the block ends, all of them; on any exception none does.

    Everything is complete and flushed by then, so that only renames are left. Each is one step of the kernel; a kill between two of
    them leaves every single output whole.
    """
    group = _Group()
    token = _group.set(group)
    try:
        yield
        for output in group.waiting:
            output.commit()
        for action in group.afterwards:
            action()
    finally:
        _group.reset(token)
        for output in group.opened:
            output.close()


@contextmanager
def joined() -> Iterator[None]:
    """As :func:`together`, but a part of the block around it where there is one."""
    if _group.get() is not None:
        yield
        return
    with together():
        yield


def afterwards(action: Callable[[], None]) -> None:
    """Runs ``action`` when the outputs of the enclosing :func:`together` stand; at once where there is none."""
    group = _group.get()
    if group is None:
        action()
    else:
        group.afterwards.append(action)


def pending(path: str | Path) -> Path:
    """Where an output can be read now: outputs of the enclosing :func:`together` wait in a place beside their own."""
    group = _group.get()
    own = Path(os.path.abspath(path))
    return next((o.temporary for o in group.waiting if o.path == own), own) if group is not None else own


ODD = {stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def refuse_odd(path: Path, span: Span | None = None, label: str = "") -> None:
    """S0803 for what is neither a file, a folder nor a link, forced or not: a device that a file took the place of is broken for everybody."""
    try:
        what = ODD.get(stat.S_IFMT(os.lstat(path).st_mode))
    except OSError:  # nothing is there, or whoever writes it will tell why it cannot be
        return
    if what is not None:
        raise fail("S0803", f"{path} is {what}", span, label, exit_code=2, help="choose another path; `--force` does not replace it")


class AtomicOutput:
    """Context manager for one output file or folder.

    ``with AtomicOutput(path) as temporary:`` gives a path to fill (an existing empty folder, or with ``folder=False`` a file that
    does not exist yet). On success it takes the place of ``path``; on any exception, Ctrl-C included, it is removed and what stood
    at ``path`` is as before. When ``path`` exists it is replaced only with ``force`` or when ``own(path)`` says that it is surgery's own
    output of the same spec.

    Raises SurgeryError S0801, S0802, S0804 (storage), S0803 (something stands there), S0805 (another run writes it now).
    """

    def __init__(self, path: str | Path, *, folder: bool = True, force: bool = False, own: Callable[[Path], bool] | None = None) -> None:
        self.path = Path(os.path.abspath(path))
        self.folder = folder
        self.force = force
        self.own = own
        self.temporary = self.path.parent / f".{self.path.name}{MARK}{os.getpid()}-{secrets.token_hex(4)}.tmp"
        self._lock: int | None = None
        self._held = False

    def __enter__(self) -> Path:
        group = _group.get()
        if group is not None:
            group.opened.append(self)
        with storage_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._take_lock()
                recover(self.path)
                self._check_target()
                if self.folder:
                    self.temporary.mkdir()
                else:
                    # Created at once, so that an unwritable place is found before the work and not after it.
                    self.temporary.touch()
            except BaseException:
                self.close()  # an interrupt may come between making the temporary and noting it
                raise
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        group = _group.get()
        waits = False
        try:
            if isinstance(exc, OSError) and self._is_own(exc):
                raise _storage_error(self.path, exc) from exc
            if kind is None:
                with storage_errors(self.path):
                    _sync_tree(self.temporary)
                if group is None:
                    self.commit()
                else:
                    group.waiting.append(self)
                    waits = True
        finally:
            if not waits:
                self.close()

    def _is_own(self, exc: OSError) -> bool:
        """Whether a fault came from filling the temporary; a file elsewhere that cannot be read is another matter."""
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if exc.errno is None or isinstance(exc, BlockingIOError | BrokenPipeError):
            return False
        return exc.filename is None or str(exc.filename).startswith(str(self.temporary))

    def commit(self) -> None:
        """Takes the place of what stands at ``path``."""
        with storage_errors(self.path):
            _replace(self.temporary, self.path)

    def close(self) -> None:
        """Removes what was not committed and lets other writers in."""
        with suppress(OSError):
            _remove(self.temporary)
        self._drop_lock()

    def _check_target(self) -> None:
        refuse_odd(self.path)
        if not os.path.lexists(self.path) or self.force:
            return
        if self.path.is_dir() and not self.path.is_symlink() and not any(self.path.iterdir()):
            return
        if self.own is not None and self.own(self.path):
            return
        raise fail(
            "S0803",
            f"{self.path} exists and is not this spec's own output",
            exit_code=2,
            help="choose another path, or replace it with `--force`",
        )

    def _take_lock(self) -> None:
        """One writer per target: a lock that the kernel drops with the process, so a killed run leaves none behind."""
        if fcntl is None:  # pragma: no cover
            return
        name = self.path.parent / f".{self.path.name}{MARK}lock"
        while True:
            self._lock = os.open(name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                self._lock = None
                raise fail("S0805", f"another run is writing {self.path}", exit_code=2, help="wait until it has finished") from None
            # The last holder removes the file: a lock on a removed file protects nothing, so take the one that stands there now.
            with suppress(FileNotFoundError):
                if os.fstat(self._lock).st_ino == os.stat(name).st_ino:
                    self._held = True
                    return
            os.close(self._lock)
            self._lock = None

    def _drop_lock(self) -> None:
        name = self.path.parent / f".{self.path.name}{MARK}lock"
        if self._lock is not None:
            if self._held:
                with suppress(OSError):
                    os.unlink(name)
            os.close(self._lock)
        if not self._held and fcntl is not None:
            # An interrupt may come between making the file and locking it: remove it if nobody holds it.
            with suppress(OSError):
                handle = os.open(name, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(handle).st_ino == os.stat(name).st_ino:
                        os.unlink(name)
                finally:
                    os.close(handle)
        self._lock, self._held = None, False


def leftovers(path: Path) -> list[Path]:
    """Temporaries that earlier runs left beside ``path``."""
    prefix = f".{path.name}{MARK}"
    with suppress(FileNotFoundError):
        return sorted(p for p in path.parent.iterdir() if p.name.startswith(prefix) and p.name.endswith((".tmp", ".old")))
    return []


def recover(path: Path) -> None:
    """Finish or undo what a killed run left: put back an output that was set aside, remove temporaries. Call only with the lock."""
    for rest in leftovers(path):
        if rest.name.endswith(".old") and not os.path.lexists(path):
            os.rename(rest, path)
        else:
            _remove(rest)


def _replace(new: Path, path: Path) -> None:
    if not os.path.lexists(path):
        os.rename(new, path)
    elif not new.is_dir() and (path.is_symlink() or not path.is_dir()):
        os.replace(new, path)
    elif exchange(new, path):
        _sync_folder(path.parent)
        _remove(new)
    else:
        # Without an exchange there is a moment with no output at all; `recover` puts the old one back after a kill in it.
        aside = new.with_suffix(".old")
        os.rename(path, aside)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(aside, path)
            raise
        _sync_folder(path.parent)
        _remove(aside)
    _sync_folder(path.parent)


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step (Linux ``renameat2``); False where kernel or file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    done = renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if done == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def _sync_tree(path: Path) -> None:
    if not path.is_dir():
        _sync_file(path)
        return
    for folder, _, files in os.walk(path):
        for name in sorted(files):
            _sync_file(Path(folder) / name)
        _sync_folder(Path(folder))


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sync_folder(path: Path) -> None:
    with suppress(OSError):  # some file systems cannot flush a folder
        _sync_file(path)
