"""Query, key and value projections of one value become one product."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from surgery.backends.fuse.packing import LINEAR, Product, nearest, obstacle, pack, product
from surgery.backends.fuse.rule import ONNX, PT2, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default

PRODUCTS = frozenset({LINEAR, aten.addmm.default, aten.mm.default, aten.matmul.default, aten.bmm.default, SDPA})
"""Where the way back from an attention ends: at the products that made its operands."""

ROLES = ("q", "k", "v")


@dataclass(frozen=True)
class PackQKV:
    """Places are attentions: their three operands are followed back to the products they come from, through heads, norms of heads, rotary
    embedding, caches and repeated key heads. Those that read one value are packed, whatever their sizes; three are the usual case, keys
    and values of cross-attention the other one."""

    name: str = "pack_qkv"
    doc: str = "query, key and value projections of one value are one matrix product"
    order: int = 100
    targets: frozenset[str] = frozenset({ONNX, PT2})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        taken: set[fx.Node] = set()
        for node in view.calls(SDPA):
            found = self._place(view, node)
            if isinstance(found, Miss):
                yield found
                continue
            for label, parts in found:
                if taken.isdisjoint(p.node for p in parts):
                    taken.update(p.node for p in parts)
                    rows = " + ".join(str(view.shape(p.weight)[0]) for p in parts)
                    yield Match(parts[0].node, lambda p=parts, s=label: pack(view, p, s), f"one product of {rows} rows")  # type: ignore[misc]

    def _place(self, view: FuseView, attention: fx.Node) -> Miss | list[tuple[str, list[Product]]]:
        place = view.where(attention)
        found: list[tuple[str, Product]] = []
        for role, operand in zip(ROLES, attention.args[:3], strict=True):
            if not isinstance(operand, fx.Node):
                return []
            sources = [n for n in nearest(operand, PRODUCTS)]
            made = [p for p in map(product, sources) if p is not None]
            names = [view.name(p.weight) or p.node.name for p in made] if len(sources) > 1 else _beside(view, sources)
            if names:
                return Miss(
                    place,
                    "an operand comes from more than one product, as with an adapter beside a projection",
                    f"{role}: {', '.join(names)}",
                )
            if len(made) == 1:
                found.append((role, made[0]))
        return self._groups(view, place, found)

    def _groups(self, view: FuseView, place: str, found: list[tuple[str, Product]]) -> Miss | list[tuple[str, list[Product]]]:
        by_input: dict[fx.Node, list[tuple[str, Product]]] = {}
        for role, part in found:
            if all(part.node is not p.node for _, p in by_input.get(part.x, ())):
                by_input.setdefault(part.x, []).append((role, part))
        out = []
        for group in by_input.values():
            if len(group) < 2:
                continue
            parts = [p for _, p in group]
            why = obstacle(view, parts)
            if why is not None:
                return Miss(place, *why)
            out.append(("".join(role for role, _ in group), parts))
        return out


def _beside(view: FuseView, sources: list[fx.Node]) -> list[str]:
    """The tensors of a product that is added onto another one in one operation, which is how adapters compute; [] where there is no such pair."""
    if len(sources) != 1 or sources[0].target is not aten.addmm.default:
        return []
    added, _, factor = sources[0].args[:3]
    base = [p for n in nearest(added, PRODUCTS) if (p := product(n)) is not None] if isinstance(added, fx.Node) else []
    while isinstance(factor, fx.Node) and factor.op == "call_function" and factor.args:
        factor = factor.args[0]
    return [view.name(p.weight) or p.node.name for p in base] + [view.name(factor) or str(factor)] if base else []


RULE = PackQKV()
