"""How many units go, and which: shares, counts and budgets, by site or over all sites, in whole steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from surgery.model.dims import Dims, Group, Leaf
from surgery.model.program import Program
from surgery.passes.kinds import slice_faults as faults
from surgery.passes.kinds.slice_scores import Vector
from surgery.passes.kinds.slice_targets import Target, tensors
from surgery.passes.operation import Resolved

Counts = list[int]
"""For each target the number of steps that go: a step is one unit, or one unit of each group."""


@dataclass(frozen=True)
class Ranked:
    """The units of a target in the order in which they go: ``order [groups, steps]`` and the score of each step (ascending)."""

    order: np.ndarray[Any, Any]
    score: Vector

    @staticmethod
    def of(target: Target, scores: Vector | None) -> Ranked:
        """By score, the lowest first, ties by index; without scores from the last unit to the first."""
        groups, each = target.units.step, target.units.inner.size
        if scores is None:
            return Ranked(np.tile(np.arange(each - 1, -1, -1), (groups, 1)), np.zeros(each))
        table = scores.reshape(groups, each)
        if target.units.same:
            order = np.tile(np.argsort(table.sum(axis=0), kind="stable"), (groups, 1))
        else:
            order = np.argsort(table, axis=1, kind="stable")
        return Ranked(order, np.take_along_axis(table, order, axis=1).sum(axis=0))


@dataclass(frozen=True)
class Limits:
    """What bounds the steps of a target: ``step`` units each, kept units in multiples of ``multiple``, at least ``least`` kept."""

    size: int
    step: int
    multiple: int
    least: int

    @staticmethod
    def of(target: Target, round_to: int) -> Limits:
        step = target.units.step
        return Limits(target.size, step, math.lcm(step, max(1, round_to)), max(target.units.least, step))

    def rounded(self, steps: int) -> int:
        """The most steps up to ``steps`` that leave a multiple and what must stay."""
        kept = max(self.size - steps * self.step, self.least)
        kept = min(self.size, -(-kept // self.multiple) * self.multiple)
        return (self.size - kept) // self.step

    @property
    def most(self) -> int:
        return self.rounded(self.size // self.step)


# ---------------------------------------------------------------- how many


def wanted(program: Program, op: Resolved, target: Target, noun: str) -> int:
    """The units that a share or a count asks to remove, rounded to ``round_to``.

    A share removes ``int(share x units)``, exactly. Raises S0442 when too little would be left, S0443 when more are to be kept than there
    are, S0446 when the parts of one decision ask for different numbers.
    """
    params = op.methods[target.at[0]].params() if target.at else op.method.params()
    for name in ("ratio", "keep"):
        values = {s.role: op.methods[at].params()[name] for s, at in zip(target.sites, target.at, strict=True)}
        if len(set(values.values())) > 1:
            raise faults.disagree(op, noun, target, name, values)
    size, keep = target.size, params["keep"]
    if keep is not None:
        if keep > size:
            raise faults.too_many(op, program, noun, target, keep, tensors(program.dims, target))
        kept, parameter = int(keep), "keep"
    else:
        kept, parameter = size - int(Fraction(str(params["ratio"])) * size), "ratio"
    if kept < max(1, target.units.least):
        raise faults.empty(op, noun, target, kept, target.units.least, target.units.why, parameter)
    multiple = params["round_to"]
    return size - min(size, -(-kept // multiple) * multiple)


def by_layer(program: Program, op: Resolved, targets: Sequence[Target], noun: str) -> Counts:
    """Each target's own number. Raises S0444 where query heads would not divide among their groups."""
    counts = []
    for target in targets:
        gone = wanted(program, op, target, noun)
        if gone % target.units.step or (target.size - gone) < target.units.step:
            parameter = "keep" if op.method.params()["keep"] is not None else "ratio"
            raise faults.grouping(op, target, target.size - gone, parameter)
        counts.append(gone // target.units.step)
    return counts


def over_all(program: Program, op: Resolved, targets: Sequence[Target], ranked: Sequence[Ranked] | None, noun: str) -> Counts:
    """The same total, taken where the scores are lowest over all targets; without scores in even shares."""
    limits = [Limits.of(t, op.method.params()["round_to"]) for t in targets]
    gone = [wanted(program, op, t, noun) for t in targets]
    if ranked is None:
        return [lim.rounded(n // lim.step) for lim, n in zip(limits, gone, strict=True)]
    total, counts, taken = sum(gone), [0] * len(targets), 0
    for number, _ in queue(op, ranked, limits):
        if taken + limits[number].step <= total:
            counts[number] += 1
            taken += limits[number].step
    return [lim.rounded(n) for lim, n in zip(limits, counts, strict=True)]


def queue(op: Resolved, ranked: Sequence[Ranked], limits: Sequence[Limits]) -> list[tuple[int, int]]:
    """(target, step) of every step that may go, the lowest normalised score first, ties in model order.

    ``normalize``: ``mean`` divides a target's scores by their mean, ``max`` by their largest, ``none`` by nothing.
    """
    how = op.method.params()["normalize"]
    entries: list[tuple[float, int, int]] = []
    for number, (rank, lim) in enumerate(zip(ranked, limits, strict=True)):
        score = rank.score
        scale = {"mean": float(score.mean()), "max": float(score.max()), "none": 1.0}[how]
        entries += [(float(s) / (scale or 1.0), number, j) for j, s in enumerate(score[: lim.most])]
    return [(number, j) for _, number, j in sorted(entries)]


def to_budget(
    op: Resolved, targets: Sequence[Target], ranked: Sequence[Ranked] | None, measure: Callable[[Counts], int], limit: float
) -> Counts | None:
    """The smallest cut after which ``measure`` is at most ``limit``; None when there is none.

    By layer every target loses the same share; over all, the steps with the lowest scores go one by one. Both are found by bisection,
    as what is left never grows with the cut.
    """
    limits = [Limits.of(t, op.method.params()["round_to"]) for t in targets]
    if op.method.params()["scope"] == "global" and ranked is not None:
        steps = queue(op, ranked, limits)

        def cut(amount: int) -> Counts:
            counts = [0] * len(targets)
            for number, _ in steps[:amount]:
                counts[number] += 1
            return [lim.rounded(n) for lim, n in zip(limits, counts, strict=True)]

        most = len(steps)
    else:
        shares = sorted({Fraction(k, n) for n in {lim.size // lim.step for lim in limits} for k in range(n + 1)})

        def cut(amount: int) -> Counts:
            return [lim.rounded(int(shares[amount] * (lim.size // lim.step))) for lim in limits]

        most = len(shares) - 1
    low, high = 0, most
    if measure(cut(high)) > limit:
        return None
    while low < high:
        middle = (low + high) // 2
        if measure(cut(middle)) <= limit:
            high = middle
        else:
            low = middle + 1
    return cut(low)


# ---------------------------------------------------------------- which


def group_of(dims: Dims, targets: Sequence[Target], ranked: Sequence[Ranked], counts: Counts) -> Group:
    """Everything that goes when the first ``counts`` steps of each target go: one group for the whole statement."""
    units: dict[Leaf, Iterable[int]] = {}
    ragged: dict[tuple[Leaf, Leaf], np.ndarray[Any, Any]] = {}
    for target, rank, count in zip(targets, ranked, counts, strict=True):
        if not count:
            continue
        gone = rank.order[:, :count]
        if target.units.outer is None or target.units.same:
            units[target.units.inner] = gone[0]
        else:
            keep = np.ones((target.units.step, target.units.inner.size), bool)
            np.put_along_axis(keep, gone, False, axis=1)
            ragged[target.units.outer, target.units.inner] = keep
    return dims.remove(units, ragged=ragged or None)


def chosen(target: Target, rank: Ranked, count: int) -> list[int]:
    """The units that go, in their present numbering."""
    each = target.units.inner.size
    return sorted(int(g * each + u) for g, row in enumerate(rank.order[:, :count]) for u in row)
