"""Which positions of an expression a chain of cuts leaves, where some of the cuts are of other axes (positions, batch)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from surgery.model.dims.algebra import CAT, ONE, PROD, Axis, factors, find
from surgery.model.dims.constants import Cut
from surgery.model.dims.groups import Leaf
from surgery.model.dims.masks import Ranges
from surgery.model.dims.result import Dims


def inside(axis: Axis) -> set[Axis]:
    """The roots of an expression and of everything that it is made of."""
    found: set[Axis] = set()
    stack = [find(axis)]
    while stack:
        top = stack.pop()
        if top not in found and top is not ONE:
            found.add(top)
            stack.extend(find(p) for p in top.parts)
    return found


def cuts_within(cut: Cut, parts: set[Axis]) -> list[Cut]:
    """A cut in terms of ``parts`` (of :func:`inside`); empty when it is of something else."""
    found: list[Cut] = []
    stack = [cut]  # no recursion: where windows slide over positions, a concatenation may be thousands of steps deep
    while stack:
        cut = stack.pop()
        root = find(cut.axis)
        if root in parts:
            found.append(cut)
        elif root.kind == PROD:  # a run of factors of a longer product
            found += [cut] if all(f in parts for f in factors(root)) else []
        elif root.kind == CAT and cut.step == 1:
            start = 0
            inner: list[Cut] = []
            for part in map(find, root.parts):
                low, high = max(cut.start - start, 0), min(cut.stop - start, part.size)
                inner.append(Cut(part, min(low, high), high if high > low else min(low, high)))
                start += part.size
            stack += reversed(inner)
    return found


def survivors(dims: Dims, axis: Axis, cuts: Iterable[Cut]) -> Ranges:
    """Positions of ``axis`` that cuts leave, those of other axes left out (:meth:`Dims.rows` refuses them)."""
    parts = inside(axis)
    own = [c for cut in cuts for c in cuts_within(cut, parts)]
    return dims.rows(axis, own)


def leaves_at(dims: Dims, axis: Axis, positions: np.ndarray[Any, Any]) -> dict[Leaf, int]:
    """The leaves that an expression has at some positions, each with the number of its units there.

    ``[((G*R)*d)+(G*d)]`` has ``G`` and ``d`` but not ``R`` in its second half.
    """
    found: dict[Leaf, np.ndarray[Any, Any]] = {}
    for leaf, units in dims.occurrences(axis):
        there = units[positions]
        seen = found.setdefault(leaf, np.zeros(leaf.size, bool))
        seen[there[there >= 0]] = True
    return {leaf: int(seen.sum()) for leaf, seen in found.items() if seen.any()}
