"""The evidence of an exact merge: the model with the merged adapter computes what the base does with the weighted changes in its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.core.source import Span
from surgery.model import masked
from surgery.model.claims import Claim
from surgery.model.program import Program
from surgery.model.running import is_small, outputs_of
from surgery.model.weights import Add, Apply, Expr, Reshape, Scale, Update, cast
from surgery.passes.kinds import attach
from surgery.passes.kinds.adapter_join import Here, arguments
from surgery.passes.kinds.calls import ties_outside, weight_names
from surgery.passes.kinds.delta_method import DeltaMethod
from surgery.passes.kinds.delta_probe import computed, probes, sites
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.kinds.parts import part_of, untie

TOLERANCE = 1e-4


def kept(program: Program, places: Sequence[Here], whole: Mapping[str, Any]) -> Program:
    """What :func:`sum_claim` needs of a program that adapters are about to be attached to: a copy, without a graph of its own where single weights
    of a large model will be compared."""
    alone = all(h.geometry.op == "linear" and not ties_outside(program, weight_names(program, h.site)) for h in places)
    if is_small(program) or whole or not alone or any(p.shift is not None for h in places for p in h.parts):
        return program.copy()
    weights = type(program.weights)(program.weights)
    return replace(program, weights=weights, aliases=dict(program.aliases), attachments=list(program.attachments))


def sum_claim(before: Program, after: Program, places: Sequence[Here], whole: Iterable[str], method: str, span: Span) -> Claim | None:
    """``merged = weighted sum``. ``before`` is what :func:`kept` gave, which this changes, ``whole`` are tensors that the merge replaced, and ``after``
    is the program now, which later statements may change.

    Every change is formed on its own, from the adapter's tensors as they were placed, and added to the weight in float32; nothing of the merged
    factors enters. None where a weight has a mask, which keeps changes off its zeros, and where an adapter that stands there already reads
    the weight: its change is of the weight alone, and would be another one here.
    """
    reading = [a for a in before.attachments if isinstance(a.method, DeltaMethod) and a.method.wants_weight()]
    readers = {n for a in reading for n in weight_names(before, a.site)}
    for here in places:
        names = weight_names(before, here.site)
        if masked.key_of(before, names[0]) is not None or readers & set(names):
            return None
        if ties_outside(before, names):
            untie(before, names)
        name = before.aliases.get(names[0], names[0])
        source = cast(before.weights[name], "float32")
        part = part_of(source, here.site, here.geometry)
        terms = [_change(here, i, method, part) for i in range(len(here.parts))]
        changed: Expr = Add(part.shape, "float32", (part, *terms))
        if here.geometry.rows:
            changed = Update(source.shape, "float32", source, changed, here.geometry.out_axis, here.geometry.rows)
        before.weights[name] = changed
    for name in whole:
        if ties_outside(before, (name,)) and not ties_outside(after, (name,)):
            untie(before, (name,))
        first = before.aliases.get(name, name)
        before.weights[first] = after.weights[after.aliases.get(name, name)]
    new = [a for a in after.attachments if a.module not in {b.module for b in before.attachments}]
    found = None if is_small(after) else probes(after, new)
    if found:
        inputs = f"{len(found)} weights, first, middle and last of each kind"
        expected, seen = sites(before, found), sites(after, found)
        return Claim(
            f"merged = weighted sum, of {inputs}", before, lambda tensors, _: computed(expected, tensors),
            lambda tensors, _: computed(seen, tensors), TOLERANCE, span, inputs,
        )  # fmt: skip
    if before.graph is after.graph:
        apart = after.copy()
        for a in new:
            attach.detach(apart, a)
        before = replace(before, graph=apart.graph)
    after = after.copy()
    return Claim("merged = weighted sum", before, outputs_of(before), outputs_of(after), TOLERANCE, span)


def _change(here: Here, i: int, method: str, part: Expr) -> Expr:
    """The weighted change of part ``i`` in the layout of the stored weight."""
    args, parts = arguments(replace(here, parts=(here.parts[i],)))
    site: Geometry = here.geometry
    delta: Expr = Apply(site.canonical, "float32", f"merge/{method}:alone", args, (("part", parts[0]), ("site", site.pairs())))
    if site.op == "conv":
        delta = Reshape(part.shape, "float32", delta)
    elif site.transposed:
        delta = Reshape(part.shape, "float32", delta, (0, 2, 1) if site.experts else (1, 0))
    return Scale(part.shape, "float32", delta, here.weights[i])
