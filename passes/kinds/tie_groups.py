"""Which layers share with which: groups by size, number or list, in one of three orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery.core.diagnostics import fail
from surgery.core.plan import plural
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.passes.kinds.drop_choice import span_of
from surgery.passes.kinds.drop_extract import is_layer
from surgery.passes.operation import Resolved


def one_stack(op: Resolved) -> list[Site]:
    """The selected layers in their order. Raises S0475 for what is no whole layer, S0481 for layers of several stacks."""
    wrong = [s.role for s in op.sites if not is_layer(s)]
    if wrong:
        raise fail(
            "S0475", f"`{wrong[0]}` is no whole layer", op.origin.span, "selected here",
            help="select layers, as in `on layers[4..15]`; `keep own attn` keeps a part of them apart",
        )  # fmt: skip
    stacks = list(dict.fromkeys(s.stack for s in op.sites))
    if len(stacks) > 1:
        raise fail(
            "S0481", f"layers of {' and '.join(f'`{s}`' for s in stacks)} do not share with each other", op.origin.span, "selected here",
            help="write one statement for each stack",
        )  # fmt: skip
    return sorted(op.sites, key=lambda s: s.layer or 0)


def numbers(count: int, groups: int, order: str) -> list[int]:
    """The group of each of ``count`` layers among ``groups`` (which divides ``count``): for 6 layers in 3 groups

    ``sequence`` 0 0 1 1 2 2, ``cycle`` 0 1 2 0 1 2, ``cycle_rev`` 0 1 2 2 1 0: cycles, of which the last runs backwards
    (with 9 layers 0 1 2 0 1 2 2 1 0). Takase and Kiyono, 2021, arXiv:2104.06022, section 2.
    """
    each = count // groups
    if order == "sequence":
        return [i // each for i in range(count)]
    cycles = [list(range(groups)) for _ in range(each)]
    if order == "cycle_rev" and each > 1:
        cycles[-1] = cycles[-1][::-1]
    return [g for cycle in cycles for g in cycle]


def grouped(op: Resolved, layers: Sequence[Site]) -> list[list[Site]]:
    """The groups of two layers or more, each in order of the layers. Raises S0480 for groups that do not divide the layers, S0482
    for lists of layers that overlap, name others or hold no two."""
    params = op.method.params()
    groups, order = params["groups"], str(params["order"])
    span = span_of(op, "groups")
    if len(layers) < 2:
        raise fail(
            "S0480", "one layer has nothing to share with", op.origin.span, "one layer is selected", help="select at least two layers"
        )
    if isinstance(groups, tuple | list):
        return _listed(op, layers, groups, order, span)
    count = {"pairs": len(layers) // 2, "all": 1}[groups] if isinstance(groups, str) else int(groups)
    if count < 1 or len(layers) % count or (groups == "pairs" and len(layers) % 2):
        divisors = [n for n in range(1, len(layers)) if len(layers) % n == 0]
        what = "pairs" if groups == "pairs" else plural(count, "group")
        raise fail(
            "S0480", f"{plural(len(layers), 'layer')} do not divide into {what}", span, f"{len(layers)} layers are selected",
            help=f"select another number of layers, or write `groups = {_nearest(divisors, count)}`; "
            + f"{', '.join(str(d) for d in divisors)} {'divides' if len(divisors) == 1 else 'divide'} {len(layers)}",
        )  # fmt: skip
    if count == len(layers):
        raise fail(
            "S0480", f"{plural(count, 'group')} of {plural(len(layers), 'layer')}: nothing would be shared", span, "one layer each",
            help="give fewer groups",
        )  # fmt: skip
    found: list[list[Site]] = [[] for _ in range(count)]
    for site, group in zip(layers, numbers(len(layers), count, order), strict=True):
        found[group].append(site)
    return found


def _nearest(divisors: Sequence[int], count: int) -> int:
    return min(divisors, key=lambda n: (abs(n - count), n))


def _listed(op: Resolved, layers: Sequence[Site], groups: Sequence[Any], order: str, span: Span) -> list[list[Site]]:
    example = "write the numbers of the layers, one list for each group: `groups = [[0, 1], [2, 5]]`"
    if not groups or any(not isinstance(g, tuple | list) or any(type(n) is not int for n in g) for g in groups):
        raise fail("S0482", "`groups` is no list of lists of layers", span, "not understood", help=example)
    if order != "sequence":
        raise fail(
            "S0482", f"`order = {order}` and a list of groups both say which layers share", span_of(op, "order"), "said again here",
            also=[(span, "said here")], help="leave `order` out: the lists say it",
        )  # fmt: skip
    by_number = {s.layer: s for s in layers}
    seen: dict[int, int] = {}
    for at, group in enumerate(groups):
        if len(group) < 2:
            raise fail("S0482", f"group {at} of `groups` holds {plural(len(group), 'layer')}", span, "nothing to share", help=example)
        for number in group:
            if number not in by_number:
                stack = layers[0].stack
                raise fail(
                    "S0482", f"`groups` names layer {number}, which is not selected", span, f"group {at}",
                    help=f"select {stack}[{number}] too, or leave it out of the list",
                )  # fmt: skip
            if number in seen:
                where = "twice in one group" if seen[number] == at else f"in groups {seen[number]} and {at}"
                raise fail(
                    "S0482",
                    f"layer {number} is {where}",
                    span,
                    "groups overlap",
                    help="name each layer in one group; join groups that share a layer",
                )
            seen[number] = at
    left = [s.role for s in layers if s.layer not in seen]
    if left:
        raise fail(
            "S0482", f"`groups` leaves out {', '.join(left[:4])}", span, "not in a group", help="add it to a group, or select fewer layers"
        )
    return [[by_number[n] for n in group] for group in groups]
