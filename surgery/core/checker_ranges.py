"""Index ranges of tables: which of them share an index."""

from __future__ import annotations

import math
from collections.abc import Sequence

from surgery.core import ast


def overlapping(keys: Sequence[ast.Range]) -> list[tuple[ast.Range, ast.Range, int]]:
    """The first pair of ranges that share an index, with the smallest shared index; empty when there is none.

    Indices from the front and from the end are compared among themselves only: the number of layers is not known here. A sweep
    in order of the starts, so plain ranges cost n log n.
    """
    for sign in (False, True):
        ordered = sorted((k for k in keys if (k.start < 0) == sign and k.step > 0), key=lambda k: k.start)
        active: list[ast.Range] = []
        for key in ordered:
            active = [a for a in active if _last(a) >= key.start]
            for other in active:
                shared = _shared(other, key)
                if shared is not None:
                    first, second = (other, key) if other.span.start <= key.span.start else (key, other)
                    return [(first, second, shared)]
            active.append(key)
    return []


def _last(key: ast.Range) -> float:
    return math.inf if key.stop is None or (key.start < 0 <= key.stop) else key.stop


def _shared(a: ast.Range, b: ast.Range) -> int | None:
    """Smallest common member of two progressions with ``a.start <= b.start``, searched among 100,000 candidates."""
    end = min(_last(a), _last(b))
    gap = math.gcd(a.step, b.step)
    if (b.start - a.start) % gap:
        return None
    at = b.start
    for _ in range(min(a.step // gap, 100_000)):
        if at > end:
            return None
        if (at - a.start) % a.step == 0:
            return at
        at += b.step
    return None
