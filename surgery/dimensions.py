"""``show --dims``: the dimension classes of a model as text and as plain data.

Each stored axis is an expression over classes of units: ``(H*d)`` heads times the width of one, ``[F+F]`` two parts of one class side by
side. A class is a name that is the same wherever its units are, with what uses it (flags) and, where it cannot be cut, why.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from surgery.model.dims import Axis, Leaf
from surgery.model.program import Program


def chosen(program: Program, only: str) -> Iterator[tuple[str, tuple[Axis, ...]]]:
    """The parameters that the graph uses, in state-dict order, whose name a glob matches (all for an empty one)."""
    stored = program.dims.parameters
    for name in dict.fromkeys([n for n in program.weights if n in stored]):
        if not only or fnmatchcase(name, only):
            yield name, stored[name]


def _classes(program: Program, only: str) -> list[Leaf]:
    """The classes of the chosen parameters in order of appearance."""
    found: dict[Leaf, None] = {}
    for _, axes in chosen(program, only):
        found |= {leaf: None for axis in axes for leaf in program.dims.leaves(axis)}
    return list(found)


def dims_text(program: Program, only: str = "") -> str:
    """One row a parameter, then one a class: ``h.0.attn.c_attn.weight  [C0, ((H0*d0)+((H0*d1)+(H0*dv0)))]``."""
    dims = program.dims
    rows = [(name, ", ".join(dims.text(axis, unique=True) for axis in axes)) for name, axes in chosen(program, only)]
    if not rows:
        return "no parameter that the model uses has such a name\n" if only else "the model uses no parameters\n"
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  [{axes}]" for name, axes in rows]
    classes = _classes(program, only)
    lines += ["", "classes (name, units, what uses them):"]
    wide = max((len(leaf.name) for leaf in classes), default=0)
    for leaf in classes:
        about = ", ".join(sorted(leaf.flags))
        fixed = "" if leaf.free else f"fixed: {leaf.reason}"
        lines.append(f"  {leaf.name:<{wide}}  {leaf.size:>6}  {'; '.join(filter(None, (about, fixed)))}".rstrip())
    return "\n".join(lines) + "\n"


def dims_json(program: Program, only: str = "") -> dict[str, Any]:
    """The same in the shape of schema ``surgery.dims/1``."""
    dims = program.dims
    return {
        "schema": "surgery.dims/1",
        "parameters": [
            {
                "name": name,
                "axes": [
                    {"text": dims.text(a, unique=True), "size": dims.size(a), "classes": [leaf.name for leaf in dims.leaves(a)]}
                    for a in axes
                ],
            }
            for name, axes in chosen(program, only)
        ],
        "classes": [
            {"name": leaf.name, "size": leaf.size, "flags": sorted(leaf.flags), "fixed": leaf.reason or None}
            for leaf in _classes(program, only)
        ],
    }
