"""``show --dims``: the dimension classes of a model as text and as plain data.

Each stored axis is an expression over classes of units: ``(H*d)`` heads times the width of one, ``[F+F]`` two parts of one class side by
side. A class is a name that is the same wherever its units are, with what uses it (flags) and, where it cannot be cut, why.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from surgery.core.site import Site
from surgery.model.dims import Axis, Group, Leaf
from surgery.model.dims.groups import spans
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


# ------------------------------------------------------------------ groups of sites


def classes_of(program: Program, sites: Sequence[Site]) -> list[Leaf]:
    """The classes of the units that the sites' weights are made of, of slices those of their own rows, in order of appearance."""
    dims = program.dims
    found: dict[Leaf, None] = {}
    for site in sites:
        names = [site.weight] if site.weight else list(site.parameters)
        for name in names:
            first = program.aliases.get(name, name)
            if first not in dims.parameters:
                continue
            for i, axis in enumerate(dims.parameter(first)):
                rows = site.rows if name == site.weight and i == site.out_axis else ()
                for leaf, units in dims.occurrences(axis):
                    if not rows or any((units[a:b] >= 0).any() for a, b in rows):
                        found[leaf] = None
    return list(found)


def _unit(program: Program, leaf: Leaf) -> Group:
    """Everything that goes with the first unit of a class."""
    return program.dims.remove({leaf: [0]})


def _places(ranges: tuple[tuple[int, int], ...]) -> str:
    return spans(ranges) if len(ranges) <= 4 else f"{spans(ranges[:3])[:-1]}, ... {len(ranges)} ranges]"


LISTED = 12
"""Members of a group that the text shows."""


def groups_text(program: Program, sites: Sequence[Site]) -> str:
    """For each class of the sites what goes together with one of its units: parameters by axis and positions, constants of the graph."""
    lines: list[str] = []
    for leaf in classes_of(program, sites):
        about = ", ".join(sorted(leaf.flags))
        lines.append(f"{leaf.name}: {leaf.size} units" + (f"; {about}" if about else "") + ("" if leaf.free else f"; fixed: {leaf.reason}"))
        if not leaf.free:
            continue
        group = _unit(program, leaf)
        lines.append("  with its first unit go")
        lines += [f"    {m.parameter} axis {m.axis}: {_places(m.removed)}" for m in group.members[:LISTED]]
        if len(group.members) > LISTED:
            lines.append(f"    and {len(group.members) - LISTED} more")
        if group.constants:
            lines.append(f"  and {len(group.constants)} constants of the graph change")
        if group.refusal:
            lines.append(f"  refused: {group.refusal}")
    return "\n".join(lines) + "\n" if lines else "no dimension classes\n"


def groups_json(program: Program, sites: Sequence[Site]) -> list[dict[str, Any]]:
    """The same as plain data: part of schema ``surgery.select/1``."""
    out = []
    for leaf in classes_of(program, sites):
        group = _unit(program, leaf) if leaf.free else None
        members = [] if group is None else [{"parameter": m.parameter, "axis": m.axis, "removed": list(m.removed)} for m in group.members]
        constants = [] if group is None else [{"node": c.node.name, "path": list(c.path), "value": c.value} for c in group.constants]
        out.append(
            {
                "name": leaf.name, "size": leaf.size, "flags": sorted(leaf.flags), "fixed": leaf.reason or None,
                "unit": {"members": members, "constants": constants, "refusal": group.refusal if group else ""},
            }
        )  # fmt: skip
    return out
