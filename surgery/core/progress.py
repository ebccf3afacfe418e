"""Where long work says how far it is. Whoever runs a command decides whether anybody hears it.

Work that is deep inside (tracing a layer, hashing a file, computing a weight) calls :func:`report`; a command line that shows
bars, or a caller from Python with a ``progress`` of its own, listens with :func:`listening`. Without a listener nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Progress = Callable[..., None]
"""Called with a text, and with ``(text, done, total)`` where the amount of work is known."""


class Bytes(int):
    """A total that counts bytes: ``report("writing weights", done, Bytes(total))`` is shown in KiB, MiB or GiB."""


def silent(text: str, done: float = 0, total: float = 0) -> None:
    """Nobody listens."""


_listener: ContextVar[Progress] = ContextVar("surgery_progress", default=silent)


def report(text: str, done: float = 0, total: float = 0) -> None:
    """Says what happens now; with a ``total`` also how much of it is done. Threads other than the listener's are not heard."""
    _listener.get()(text, done, total)


@contextmanager
def listening(progress: Progress | None) -> Iterator[None]:
    """``progress`` hears everything that is reported inside; with None, whoever listens already."""
    if progress is None:
        yield
        return
    token = _listener.set(progress)
    try:
        yield
    finally:
        _listener.reset(token)
