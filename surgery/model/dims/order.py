"""How the parts of an expression stand to each other."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.model.dims.algebra import CAT, PROD, Axis, factors, find


def has_run(parts: Sequence[Axis], inner: Sequence[Axis]) -> bool:
    """Whether ``inner`` stands in ``parts``, one beside the other."""
    n = len(inner)
    return any(list(parts[i : i + n]) == list(inner) for i in range(len(parts) - n + 1))


def follows(axis: Axis, outer: Axis, inner: Axis) -> bool:
    """Whether ``inner`` stands directly behind ``outer`` wherever it occurs in the expression."""
    stack = [find(axis)]
    while stack:
        top = stack.pop()
        if top is inner:
            return False
        if top.kind == PROD:
            previous: Axis | None = None
            for part in factors(top):
                if part is inner:
                    if previous is not outer:
                        return False
                else:
                    stack.append(part)
                previous = part
        elif top.kind == CAT:
            stack.extend(find(p) for p in top.parts)
    return True
