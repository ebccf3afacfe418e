"""Budgets: what is left of a quantity after a cut, counted exactly before the cut is made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

from surgery.model import cost
from surgery.model.cut import cut
from surgery.model.cut_sizes import NewSizes
from surgery.model.dims import Group
from surgery.model.program import Program
from surgery.model.walk import edited
from surgery.passes.kinds.slice_choice import Counts, Limits, Ranked, group_of
from surgery.passes.kinds.slice_targets import Target
from surgery.passes.operation import Resolved

MEASURES = {"params": cost.parameters, "bytes": cost.bytes_of, "flops": cost.flops_per_token}


class Budget:
    """A share of one quantity of the model before the spec, and what candidate cuts leave of it."""

    def __init__(self, program: Program, op: Resolved, targets: Sequence[Target], ranked: Sequence[Ranked], quantity: str) -> None:
        self.program, self.op, self.targets, self.ranked, self.quantity = program, op, targets, ranked, quantity
        self.now = MEASURES[quantity](program)
        self.whole = op.base.get(quantity, self.now)
        self._names = set(cost.parameter_names(program))
        self._known: dict[tuple[int, ...], int] = {}
        self._bare = not program.attachments and not edited(program.graph)
        self._counted = cost.count(program) if quantity == "flops" and self._bare else None

    def limit(self, share: float) -> float:
        """In decimals, so that 80% of 10 is 8."""
        return float(Decimal(str(share)) * self.whole)

    def left(self, counts: Counts) -> int:
        """The quantity after a cut of that many steps."""
        key = tuple(counts)
        if key not in self._known:
            self._known[key] = self._left(counts)
        return self._known[key]

    def _left(self, counts: Counts) -> int:
        if not any(counts):
            return self.now
        group = group_of(self.program.dims, self.targets, self.ranked, counts)
        if self._counted is not None:
            return cost.foreseen(self.program, self._counted, NewSizes(group.dims, group.keep))
        if self.quantity == "flops" or not self._bare:
            copy = self.program.copy()
            cut(copy, group, self.op.origin)
            return MEASURES[self.quantity](copy)
        return self.now - self._gone(group)

    def _gone(self, group: Group) -> int:
        """Elements (or bytes) that the group's members lose, each tensor once."""
        shapes: dict[str, list[int]] = {}
        for m in group.members:
            if m.parameter in self._names:
                shape = shapes.setdefault(m.parameter, list(self.program.weights[m.parameter].shape))
                shape[m.axis] = sum(b - a for a, b in m.kept)
        total = 0
        for name, shape in shapes.items():
            expr = self.program.weights[name]
            lost = math.prod(expr.shape) - math.prod(shape)
            total += lost if self.quantity == "params" else lost * expr.nbytes // math.prod(expr.shape)
        return total

    def least(self) -> int:
        """What the largest possible cut leaves."""
        round_to = self.op.method.params()["round_to"]
        return self.left([Limits.of(t, round_to).most for t in self.targets])

    def text(self, counts: Counts, share: float) -> str:
        return (
            (
                f"{self.quantity}: {self.left(counts):,} are left, {share:.4%} of {self.whole:,} before the spec allows {self.limit(share):,.0f}"
            )
            .replace("0000%", "%")
            .replace(".%", "%")
        )
