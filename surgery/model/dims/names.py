"""Short names for leaves and the printed form of expressions.

Names are a reading aid: nothing is decided by them. ``H`` heads, ``G``/``R`` key-value groups and query heads in each, ``d`` the
width of scores, ``r`` half of it where rotary positions pair it, ``dv`` the width of values, ``C`` a normalised stream, ``F`` a
width between two products, ``E`` experts, ``O`` an output, ``V`` the rows of a table, ``n`` anything else. A frozen leaf prints as its size and ``!``.
"""

from __future__ import annotations

from collections.abc import Iterable

from surgery.model.dims.algebra import CAT, LEAF, ONE, PROD, Axis, factors, find, leaves_below, segments
from surgery.model.dims.context import Context


def letters(cx: Context, leaves: Iterable[Axis], stored: Iterable[Axis]) -> dict[Axis, str]:
    """A letter for each leaf; ``stored`` are the axes of the parameters."""
    out: dict[Axis, str] = {}
    for axis in stored:
        _grouped_heads(axis, out)
    for axis in cx.inner:
        root = find(axis)
        parts = segments(root)
        paired = len(parts) > 1 and find(parts[0]) is find(parts[1])
        for leaf in leaves_below(root):
            if leaf.frozen is None:
                out.setdefault(leaf, "r" if paired else "d")
    for leaf in leaves:
        if leaf in out:
            continue
        flags = leaf.flags
        if leaf.frozen is not None:
            out[leaf] = "V" if "indexed" in flags else "n"
        elif "~batch" in flags:
            out[leaf] = "H"
        elif "~value" in flags:
            out[leaf] = "dv"
        elif "topk" in flags:
            out[leaf] = "E"
        elif "norm" in flags or "reduce:mean" in flags:
            out[leaf] = "C"
        elif "output" in flags:
            out[leaf] = "O"
        elif "contract" in flags:
            out[leaf] = "F"
        else:
            out[leaf] = "n"
    return out


def _grouped_heads(axis: Axis, out: dict[Axis, str]) -> None:
    """Key-value groups and the query heads of each: two head leaves side by side in a stored product."""
    root = find(axis)
    parts = [find(p) for p in root.parts] if root.kind == CAT else [root]
    while parts:
        part = parts.pop()
        if part.kind == CAT:
            parts.extend(find(p) for p in part.parts)
        elif part.kind == PROD:
            heads = [f for f in factors(part) if f.kind == LEAF and "~batch" in f.flags and f.frozen is None]
            if len(heads) == 2 and out.get(heads[0], "G") == "G":
                out.update({heads[0]: "G", heads[1]: "R"})


def numbered(letter: dict[Axis, str]) -> dict[Axis, str]:
    """Unique names: the letter and a count, in the order given."""
    counts: dict[str, int] = {}
    out: dict[Axis, str] = {}
    for leaf, name in letter.items():
        counts[name] = counts.get(name, -1) + 1
        out[leaf] = f"{name}{counts[name]}"
    return out


def text(axis: Axis, letter: dict[Axis, str], unique: dict[Axis, str]) -> str:
    """The printed expression; letters alone where they are unambiguous within it."""
    below = leaves_below(axis)
    short = {letter.get(leaf) for leaf in below if leaf.frozen is None}
    free = [leaf for leaf in below if leaf.frozen is None]
    names = letter if len(short) == len(free) else unique
    out: dict[Axis, str] = {}
    stack = [find(axis)]
    while stack:
        top = stack[-1]
        if top in out:
            stack.pop()
            continue
        if top.kind == LEAF:
            frozen = top.frozen is not None or top is ONE
            out[top] = "1" if top is ONE else f"{top.size}!" if frozen else names.get(top, f"n{top.size}")
            continue
        parts = [p for p in map(find, top.parts) if not (top.kind == PROD and p is ONE)]
        missing = [p for p in parts if p not in out]
        if missing:
            stack.extend(missing)
            continue
        body = [out[p] for p in parts]
        out[top] = f"[{'+'.join(body)}]" if top.kind == CAT else body[0] if len(body) == 1 else f"({'*'.join(body)})"
    return out[find(axis)]
