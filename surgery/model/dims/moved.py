"""Sequences that meet themselves some positions further on, as those of a model that predicts from shifted inputs do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.model.dims.algebra import Axis


def moved(xs: Sequence[Axis], ys: Sequence[Axis]) -> bool:
    """Whether two concatenations hold a segment at places that overlap without being one: a sequence that meets itself some positions further on. Made
    one, every unit would be the next one, and each would be a segment of its own."""
    places: dict[int, int] = {}
    at = 0
    for x in xs:
        places.setdefault(id(x), at)
        at += x.size
    at = 0
    for y in ys:
        before = places.get(id(y), at)
        if 0 < abs(at - before) < y.size:
            return True
        at += y.size
    return False
