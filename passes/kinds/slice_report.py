"""What a cut says of itself: lines of the plan, warnings, parameters removed by site."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from surgery.core.plan import flops, group_roles, plural, size
from surgery.core.site import Site
from surgery.model import cost
from surgery.model.cut import CutResult
from surgery.model.cut_sizes import NewSizes
from surgery.model.dims.algebra import factors
from surgery.model.program import Program
from surgery.passes.kinds import slice_faults as faults
from surgery.passes.kinds.slice_choice import Counts
from surgery.passes.kinds.slice_scores import positions
from surgery.passes.kinds.slice_targets import Target, tensors
from surgery.passes.operation import Resolved, SiteChange, predicted

MULTIPLE = 8
"""Matrix kernels compute columns in blocks of at least this many, on processors and accelerators alike."""


@dataclass(frozen=True)
class Figures:
    """Bytes and operations per ``unit`` (token, image)."""

    bytes: int
    flops: int
    unit: str
    counted: cost.Cost
    names: tuple[str, ...]
    """The parameters, which a cut makes smaller and never fewer."""


class Costs:
    """The figures of a program as it is when this is made. Where the flat graph says everything (nothing is attached, no module is opaque) they are
    counted when they are asked for."""

    def __init__(self, program: Program) -> None:
        graph = cost.flat_graph(program)
        self.plain = graph is program.dims.graph and not program.attachments and not graph.find_nodes(op="call_module")
        self._program, self._graph = program, graph
        self._weights = dict(program.weights) if self.plain else program.weights
        if not self.plain:
            _ = self.figures  # later the modules are others

    @cached_property
    def figures(self) -> Figures:
        names = cost.parameter_names(self._program)
        counted = cost.count(self._program, graph=self._graph)
        return Figures(cost.bytes_in(self._weights, names), counted.per_token, counted.unit, counted, names)

    def after(self, program: Program, sizes: NewSizes) -> Callable[[], Figures]:
        """Those of the program now that the cut that left ``sizes`` is done."""
        if not self.plain:
            return lambda: Costs(program).figures
        weights = dict(program.weights)

        def made() -> Figures:
            before = self.figures
            return replace(before, bytes=cost.bytes_in(weights, before.names), flops=cost.foreseen(program, before.counted, sizes))

        return made


def tell(
    op: Resolved,
    method: Any,
    targets: Sequence[Target],
    counts: Counts,
    picked: list[list[int]] | None,
    before: Costs,
    after: Callable[[], Figures],
) -> None:
    """The lines of the plan: sizes, what is one decision, which units and who decides, costs before and after."""
    noun = method.noun
    sizes: dict[tuple[int, int], list[str]] = {}
    for target, count in zip(targets, counts, strict=True):
        sizes.setdefault((target.size, target.size - count * target.units.step), []).extend(s.role for s in target.sites)
    for (old, new), roles in list(sizes.items())[:6]:
        where = f" in {', '.join(group_roles(roles)[:4])}" if roles else ""
        op.tell(f"{old:,} -> {plural(new, noun)}{where}" if old != new else f"{plural(old, noun)}{where}, unchanged")
    if len(sizes) > 6:
        op.tell(f"and {len(sizes) - 6} more sizes")
    grouped = {t.units.step for t in targets if t.units.outer is not None}
    if grouped:
        op.tell(f"the same number in each of the {' or '.join(map(str, sorted(grouped)))} key-value groups")
    for target in [t for t in targets if len(t.sites) > 1][:4]:
        op.tell(f"{', '.join(group_roles([s.role for s in target.sites])[:4])} have the same {noun}s: one decision, their scores add up")
    if picked is None:
        op.tell(f"compile chooses which, by {method.score}; here the last ones stand for them")
        if method.scope == "global":
            op.tell("compile shares them out over the sites by score; here each site loses an even share")
    elif sum(map(len, picked)) <= 24:
        op.tell("removed: " + "; ".join(_units(t, gone) for t, gone in zip(targets, picked, strict=True) if gone))
    op.later(lambda: _saved(before.figures, after()))


def _saved(old: Figures, new: Figures) -> str:
    return (
        f"bytes {size(old.bytes)} -> {size(new.bytes)} ({_change(old.bytes, new.bytes)}), "
        f"flops per {old.unit} {flops(old.flops)} -> {flops(new.flops)} ({_change(old.flops, new.flops)})"
    )


def _units(target: Target, gone: Sequence[int]) -> str:
    return f"{', '.join(map(str, gone))} of {target.name}"


def _change(before: int, after: int) -> str:
    return f"{100 * (after - before) / before:+.3g}%" if before else "0%"


def unchanged(program: Program, targets: Sequence[Target]) -> list[SiteChange]:
    """Nothing goes: the sites as they are."""
    seen: set[str] = set()
    return [
        SiteChange(s.role, s.path, (), (t.size,), (t.size,), trainable=trains(program, s, seen)) for t in targets for s in t.sites
    ]  # fmt: skip


def trains(program: Program, site: Site, seen: set[str]) -> int:
    """How many parameters of a site train; those in ``seen`` belong to a site before and count there."""
    names = [n for n in own(program, site) if n not in seen]
    seen.update(names)
    return sum(math.prod(program.weights[n].shape) for n in names if n not in program.frozen)


def own(program: Program, site: Site) -> list[str]:
    """The parameters of a site by their first names."""
    names = site.parameters if site.is_region else [n for n in (site.weight, site.bias) if n]
    return [n for n in dict.fromkeys(program.aliases.get(n, n) for n in names) if n in program.weights]


def sizes_before(program: Program, targets: Sequence[Target]) -> dict[str, int]:
    """For each tensor that the cut may shrink the number of the target that it counts for: the first that holds it."""
    found: dict[str, int] = {}
    for number, target in enumerate(targets):
        for name in tensors(program.dims, target):
            found.setdefault(name, number)
    for a in program.attachments:
        if a.site.weight in found:
            for name in a.tensors:
                found.setdefault(name, found[a.site.weight])
    return found


def removed_by(targets: Sequence[Target], result: CutResult, owner: dict[str, int]) -> list[int]:
    """Parameters that each target lost; every lost parameter counts once."""
    totals = [0] * len(targets)
    for name, lost in result.removed.items():
        if name in result.parameters:
            totals[owner.get(name, 0)] += lost
    return totals


def widths(program: Program, op: Resolved, method: Any, targets: Sequence[Target], counts: Counts) -> dict[tuple[int, int], list[str]]:
    """Before the cut: matrices that were whole blocks of 8 columns and will not be, ``(columns before, after)`` to roles. Warns of outputs
    that shrink."""
    found: dict[tuple[int, int], list[str]] = {}
    if not method.columns:
        return found
    for target, count in zip(targets, counts, strict=True):
        if not count:
            continue
        after = target.size - count * target.units.step
        each = _width(program, target)
        if (target.size * each) % MULTIPLE == 0 and (after * each) % MULTIPLE:
            found.setdefault((target.size * each, after * each), []).extend(s.role for s in target.sites)
        if any("output" in leaf.flags for leaf in target.units.leaves):
            op.warn(faults.interface(op, method.noun, target.size, after))
    return found


def warn_widths(op: Resolved, method: Any, found: dict[tuple[int, int], list[str]], before: Costs, after: Callable[[], Figures]) -> None:
    """After the cut: a warning for each size in ``found``, with what the cut saves on paper."""
    if not found:
        return
    old, new = before.figures, after()
    saved = predicted(old.flops, new.flops, old.bytes, new.bytes, old.unit)
    for (wide, narrow), roles in found.items():
        blocks = -(-narrow // MULTIPLE) == -(-wide // MULTIPLE)
        op.warn(faults.no_faster(op, method.noun, roles or ["the model"], wide, narrow, MULTIPLE, blocks, saved))


def _width(program: Program, target: Target) -> int:
    """How many columns of one matrix a unit has: the dimension of a head, 1 for a hidden unit of a fused pair of projections."""
    dims = program.dims
    widest = 1
    for name in tensors(dims, target):
        for expression in dims.parameter(name):
            if dims.leaf(expression) is not None:
                continue  # one column a unit
            parts = [dims.leaf(part) for part in factors(expression)]
            if None not in parts and len({*parts}) == len(parts):  # a plain product: each unit has the same number of columns
                if set(target.units.leaves) <= {*parts}:
                    widest = max(widest, dims.size(expression) // math.prod(leaf.size for leaf in target.units.leaves))
                continue
            times = sum(leaf == target.units.inner for leaf, _ in dims.occurrences(expression))
            if times:
                widest = max(widest, int((positions(dims, expression, target.units) == 0).sum()) // times)
    return widest
