"""Stored tensors that are read where they are asked for: a function that goes through its inputs chunk by chunk needs no copy of them in memory.

A function says so by the mark :func:`by_pieces`. It is then given :class:`Pieces` in place of tensors that stand in files as they are; everything else
that it is given are tensors, and :func:`flat` reads either.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Protocol, TypeAlias, TypeVar

import torch

from surgery.model.room import room
from surgery.model.stored import gone, read, torch_dtype
from surgery.model.weights import Apply, Expr, Load

SMALL = 1 << 16
"""Bytes below which a tensor is read as a whole."""
AT_ONCE = 1 << 18
"""Bytes that are read at a time where single elements are picked: they fit into a core's cache."""

F = TypeVar("F", bound=Callable[..., Any])


Operand: TypeAlias = "torch.Tensor | Pieces"


class Flat(Protocol):
    """The elements of a tensor in order: ``flat[start:stop]`` and ``flat[start:stop:step]``, valid until the next ones are asked for."""

    def __getitem__(self, at: slice, /) -> torch.Tensor: ...


class Pieces:
    """A stored tensor of ``shape`` and ``dtype``, for one thread. Raises S0721 when the file cannot be read any more."""

    def __init__(self, load: Load) -> None:
        self.load, self.shape, self.dtype, self._count = load, load.shape, torch_dtype(load.dtype), math.prod(load.shape)
        self._place = torch.empty(0, dtype=self.dtype)
        self._view = memoryview(b"")
        try:
            self._file = open(load.file, "rb", buffering=0)
        except OSError as exc:
            raise gone(load, exc.strerror or str(exc)) from None

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self._count

    def whole(self) -> torch.Tensor:
        """All of it, in memory of its own."""
        return read(self.load)

    def __getitem__(self, at: slice) -> torch.Tensor:
        if at.step is None and at.start is not None and at.stop is not None and 0 <= at.start <= at.stop <= self._count:
            return self._read(at.start, at.stop)  # as nearly everybody asks, for every block
        start, stop, step = at.indices(self._count)
        if step == 1:
            return self._read(start, max(start, stop))
        count = len(range(start, stop, step))
        picked = torch.empty(count, dtype=self.dtype)
        many = max(1, AT_ONCE // (step * self.dtype.itemsize))  # picked from one reading
        for first in range(0, count, many):
            last = min(count, first + many)
            picked[first:last] = self._read(start + first * step, start + (last - 1) * step + 1)[::step]
        return picked

    def _read(self, start: int, stop: int) -> torch.Tensor:
        size = self.dtype.itemsize
        if self._place.numel() < stop - start:
            self._place = torch.empty(stop - start, dtype=self.dtype)
            self._view = memoryview(self._place.view(torch.uint8).numpy())
        done, wanted, at = 0, (stop - start) * size, self.load.span[0] + start * size
        try:
            while done < wanted:
                count = os.preadv(self._file.fileno(), [self._view[done:wanted]], at + done)
                if count == 0:
                    raise gone(self.load, "the file is shorter than when it was opened")
                done += count
        except OSError as exc:
            raise gone(self.load, exc.strerror or str(exc)) from None
        return self._place[: stop - start]


def flat(value: Operand) -> Flat:
    """The elements in order."""
    return value if isinstance(value, Pieces) else value.reshape(-1)


def whole(value: Operand) -> torch.Tensor:
    """The tensor in memory; where it is stored a copy."""
    return value.whole() if isinstance(value, Pieces) else value


def by_pieces(function: F) -> F:
    """Marks a function of expressions that takes :class:`Pieces` for any of its tensors."""
    function.by_pieces = True  # type: ignore[attr-defined]
    return function


def takes_pieces(function: Callable[..., Any]) -> bool:
    """Whether a function is marked, or the one that it binds a class to; the class may say ``by_pieces = False``."""
    bound = getattr(function, "args", ())
    return bool(getattr(getattr(function, "func", function), "by_pieces", False)) and all(getattr(b, "by_pieces", True) for b in bound)


def in_pieces(arg: Expr) -> bool:
    """Whether an argument of such a function is not read as a whole."""
    return isinstance(arg, Load) and arg.nbytes >= SMALL


def arguments(args: Sequence[Expr], value: Callable[[Expr], torch.Tensor], files: ExitStack) -> list[Operand]:
    """What a marked function is called with; ``files`` holds what was opened for it."""
    return [files.enter_context(Pieces(a)) if in_pieces(a) and isinstance(a, Load) else value(a) for a in args]


def held_by(expr: Expr, functions: Callable[[str], Callable[..., Any]]) -> int | None:
    """Bytes that computing a call of a marked function needs besides its result and single chunks; None for every other expression."""
    if not isinstance(expr, Apply) or not takes_pieces(functions(expr.function)):
        return None
    return sum(arg.nbytes for arg in expr.args if not in_pieces(arg))


def like(value: Operand) -> torch.Tensor:
    """Memory for a result of the same shape and type."""
    return room(value.shape, value.dtype)
