"""Matrices that expressions stand for, some rows at a time: for whoever looks at each row once and needs no tensor of full size.

A matrix of full size in float32 goes to memory and comes back at every step of its making; a few rows stay in a core's cache from the file to the last
use. The numbers are those of :mod:`surgery.model.realise`. A function of expressions takes part when it is marked with :func:`by_rows`; an expression
with any other function, or of another kind, has no rows of its own and is computed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from surgery.model.pieces import Pieces
from surgery.model.stored import torch_dtype
from surgery.model.weights import Add, Apply, Cast, Expr, Load, Scale

Rows = Callable[[int, int], Tensor]
"""Rows ``[start, stop)`` of a matrix; valid, and free to be changed, until the next ones are asked for."""
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Operand:
    """An argument of a function: ``whole()`` is its value, ``rows()`` its rows, None where it has none."""

    expr: Expr
    whole: Callable[[], Tensor]
    rows: Callable[[], Rows | None]


def by_rows(maker: Callable[..., Rows | None]) -> Callable[[F], F]:
    """Marks a function of expressions whose rows ``maker`` gives: it is called with :class:`Operand` in place of tensors, and may say None."""

    def mark(function: F) -> F:
        function.rows = maker  # type: ignore[attr-defined]
        return function

    return mark


def rows_of(expr: Expr, value: Callable[[Expr], Tensor], functions: Callable[[str], Callable[..., Any]], files: ExitStack) -> Rows | None:
    """The rows of a matrix; None where they cannot be had by themselves. ``value`` computes what is needed whole, ``files`` holds what is opened."""
    if len(expr.shape) != 2 or not expr.shape[0]:
        return None
    again = partial(rows_of, value=value, functions=functions, files=files)
    match expr:
        case Load():
            stored = files.enter_context(Pieces(expr))
            width = expr.shape[1]
            return lambda start, stop: stored[start * width : stop * width].view(-1, width)
        case Cast():
            inner = again(expr.source)
            return None if inner is None or expr.dtype == expr.source.dtype else _into(expr, inner)
        case Scale():
            inner = again(expr.source)
            return None if inner is None or expr.dtype != "float32" else _scaled(_into(expr, inner), expr.factor)
        case Add():
            parts = [again(part) if part.shape == expr.shape else None for part in expr.parts]
            known = [part for part in parts if part is not None]
            return _added(_into(expr, known[0]), known[1:]) if len(known) == len(parts) and expr.dtype == "float32" else None
        case Apply(output=None):
            function = functions(expr.function)
            maker = getattr(getattr(function, "func", function), "rows", None)
            if maker is None or expr.dtype != "float32":
                return None
            found: Rows | None = maker(*getattr(function, "args", ()), *_operands(expr.args, value, again), **dict(expr.params))
            return found
    return None


def _operands(args: Sequence[Expr], value: Callable[[Expr], Tensor], rows: Callable[[Expr], Rows | None]) -> list[Operand]:
    return [Operand(arg, partial(value, arg), partial(rows, arg)) for arg in args]


def _into(expr: Expr, inner: Rows) -> Rows:
    """The rows in the type of ``expr``, in memory of their own."""
    place = Place(expr.shape[1], torch_dtype(expr.dtype))
    return lambda start, stop: place(stop - start).copy_(inner(start, stop))


def _scaled(inner: Rows, factor: float) -> Rows:
    return lambda start, stop: inner(start, stop).mul_(factor)


def _added(first: Rows, others: Sequence[Rows]) -> Rows:
    def rows(start: int, stop: int) -> Tensor:
        total = first(start, stop)
        for other in others:
            total += other(start, stop)
        return total

    return rows


class Place:
    """Memory for some rows, used again each time."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        self._place = torch.empty(0, width, dtype=dtype)

    def __call__(self, rows: int) -> Tensor:
        have, width = self._place.shape
        if have == rows:
            return self._place
        if have < rows:
            self._place = torch.empty(rows, width, dtype=self._place.dtype)
        return self._place[:rows]
