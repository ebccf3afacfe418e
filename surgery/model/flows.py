"""Results of functions in parts: what is computed row by row or chunk by chunk goes into its file while a core's cache holds it.

A function of expressions that makes its result in flat order says so by the mark :func:`by_parts`: beside the function that gives the whole tensor stands
one that gives its parts, from which the whole is made by :func:`gathered`. So both have the same bits, and a tensor of full size is only in memory where
somebody asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from surgery.model.room import room

Parts = Iterator[Tensor]
"""Consecutive elements of a result in flat order; each is valid until the next is asked for, and rounded once to the result's type by whoever takes it."""
F = TypeVar("F", bound=Callable[..., Any])


def by_parts(maker: Callable[..., Parts | None]) -> Callable[[F], F]:
    """Marks a function of expressions whose parts ``maker`` gives: it is called as the function is, and says None where the result has to be made whole."""

    def mark(function: F) -> F:
        function.parts = maker  # type: ignore[attr-defined]
        return function

    return mark


def parts_of(function: Callable[..., Any], args: Sequence[Any], params: dict[str, Any]) -> Parts | None:
    """The parts of one call; None where the function has none."""
    maker = getattr(getattr(function, "func", function), "parts", None)
    if maker is None:
        return None
    found: Parts | None = maker(*getattr(function, "args", ()), *args, **params)
    return found


def has_parts(function: Callable[..., Any]) -> bool:
    """Whether a function is marked."""
    return getattr(getattr(function, "func", function), "parts", None) is not None


def gathered(parts: Parts, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The whole result."""
    out = room(shape, dtype)
    into, at = out.view(-1), 0
    for part in parts:
        into[at : at + part.numel()] = part.view(-1)
        at += part.numel()
    return out
