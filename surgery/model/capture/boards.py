"""Dictionaries in which layers leave tensors for later layers, beside what they return: keys and values shared between layers.

A layer is given such a board as one argument that no flat call can hold. Its tensors enter and leave each layer like those of a
cache, so that what one layer writes and another reads passes through the graph between them.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any

from torch import Tensor

Shape = tuple[tuple[Any, int], ...]
"""What a board holds: each key and the number of its tensors, in the order in which they were written."""


def is_board(value: Any) -> bool:
    """Whether ``value`` is a mapping, of a class that is no plain dict, from keys to tuples of tensors; it may be empty."""
    return isinstance(value, UserDict) and all(isinstance(v, tuple) and all(isinstance(t, Tensor) for t in v) for v in value.values())


def shape_of(board: Any) -> Shape:
    return tuple((key, len(value)) for key, value in board.items())


def tensors_of(board: Any) -> list[Tensor]:
    return [t for value in board.values() for t in value]


def fill(board: Any, shape: Shape, tensors: Iterator[Tensor]) -> None:
    """Replaces all that ``board`` holds by the next tensors, under the keys of ``shape``."""
    board.clear()
    for key, count in shape:
        board[key] = tuple(next(tensors) for _ in range(count))
