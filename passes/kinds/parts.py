"""A site's part of a stored weight, and the names of tied weights: what every kind that rewrites weights needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from surgery.core.site import Site
from surgery.model import masked
from surgery.model.program import Program
from surgery.model.weights import Expr, Select, Update
from surgery.passes.kinds.calls import ties_outside
from surgery.passes.kinds.geometry import Geometry


def part_of(source: Expr, site: Site, geometry: Geometry) -> Expr:
    """The stored weight, restricted to the site's rows and to the expert that it is."""
    source = _expert(source, geometry)
    if not geometry.rows:
        return source
    shape = list(source.shape)
    shape[geometry.out_axis] = geometry.out
    return Select(tuple(shape), source.dtype, source, geometry.out_axis, geometry.rows)


def _expert(source: Expr, geometry: Geometry) -> Expr:
    if geometry.member < 0:
        return source
    return Select((1, *source.shape[1:]), source.dtype, source, 0, ((geometry.member, geometry.member + 1),))


def rewrite(program: Program, name: str, source: Expr, part: Expr, geometry: Geometry) -> None:
    """Put a new value of a site's part in the place of the old one. A mask of the weight is left to the caller."""
    if geometry.member >= 0 and geometry.rows:
        own = _expert(source, geometry)
        part = Update(own.shape, own.dtype, own, part, geometry.out_axis, geometry.rows)
    if geometry.member >= 0:
        whole: Expr = Update(source.shape, source.dtype, source, part, 0, ((geometry.member, geometry.member + 1),))
    else:
        whole = Update(source.shape, source.dtype, source, part, geometry.out_axis, geometry.rows) if geometry.rows else part
    program.weights[name] = whole


def size_of(program: Program, name: str) -> int:
    expr = program.weights.get(program.aliases.get(name, name))
    return 0 if expr is None else int(torch.Size(expr.shape).numel())


def untie(program: Program, names: tuple[str, ...]) -> bool:
    """Make the weight that ``names`` share one of their own if it has other names, too, so that a change stays with them.

    A mask goes along with both. Returns whether the weight was tied to others.
    """
    first = program.aliases.get(names[0], names[0])
    others = ties_outside(program, names)
    if not others:
        return False
    expr, frozen = program.weights[first], first in program.frozen
    for members in (others, list(names)):
        for member in members:
            program.aliases.pop(member, None)
        for member in members[1:]:
            program.aliases[member] = members[0]
        program.weights[members[0]] = expr
        if frozen:
            program.frozen.add(members[0])
    if first in names and first != names[0]:
        del program.weights[first]
        program.frozen.discard(first)
    old: Any = program.graph.get_parameter(first)
    made = nn.Parameter(torch.empty_like(old, device="meta"), requires_grad=old.requires_grad)
    for member in names:
        owner, _, leaf = member.rpartition(".")
        setattr(program.module(owner), leaf, made)
    masked.split(program, others, names)
    return True
