"""The gate and the up projection of a gated feed-forward block become one product."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from surgery.backends.fuse.packing import LINEAR, nearest, obstacle, pack, product
from surgery.backends.fuse.rule import PT2, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten

ACTIVATIONS = frozenset(
    {aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.mish.default}
)  # fmt: skip


@dataclass(frozen=True)
class PackGateUp:
    """Places are ``act(x G^T) * x U^T`` with an activation that works on each element."""

    name: str = "pack_gate_up"
    doc: str = "gate and up projection of a feed-forward block are one matrix product"
    order: int = 110
    targets: frozenset[str] = frozenset({PT2})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        for node in view.calls(aten.mul.Tensor):
            sides = [a for a in node.args if isinstance(a, fx.Node)]
            if len(sides) != 2:
                continue
            gates = [s for s in sides if s.op == "call_function" and s.target in ACTIVATIONS]
            if len(gates) != 1:
                continue
            gate, up = gates[0].args[0], next(s for s in sides if s is not gates[0])
            if not isinstance(gate, fx.Node):
                continue
            found = self._place(view, node, gate, up)
            if found is not None:
                yield found

    def _place(self, view: FuseView, node: fx.Node, gate: fx.Node, up: fx.Node) -> Match | Miss | None:
        left, right = product(gate), product(up)
        if left is None or right is None:
            behind = [nearest(n, frozenset({LINEAR})) for n in (gate, up)]
            if all(behind) and any(len(b) > 1 for b in behind):
                return Miss(view.where(node), "a side comes from more than one product, as with an adapter beside a projection")
            return None
        if left.x is not right.x:
            return Miss(view.where(node), "the two projections read different values", f"{left.x.name} and {right.x.name}")
        why = obstacle(view, [left, right])
        if why is not None:
            return Miss(view.where(node), *why)
        rows = f"{view.shape(left.weight)[0]} + {view.shape(right.weight)[0]}"
        return Match(left.node, lambda: pack(view, [left, right], "gate_up"), f"one product of {rows} rows")


RULE = PackGateUp()
