"""Adapters that share their first factor and read one value share the product of the two."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from surgery.backends.fuse.nodes import is_call, operand, tensors_of_adapters
from surgery.backends.fuse.rule import ONNX, PT2, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten


@dataclass(frozen=True)
class LowRankShared:
    """Where the adapters of query, key and value have one tensor ``A``, ``x A^T`` is computed once. Adapters with factors of their own keep their
    own products: put together they could not be exchanged one by one."""

    name: str = "low_rank_shared"
    doc: str = "adapters with one first factor share its product with the value"
    order: int = 34
    targets: frozenset[str] = frozenset({ONNX, PT2})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        adapters = tensors_of_adapters(view)
        first: dict[tuple[fx.Node, int], fx.Node] = {}
        beside: dict[fx.Node, fx.Node] = {}
        for node in view.calls(aten.linear.default) if adapters else ():
            weight = node.args[1]
            if is_call(weight, aten.to.dtype):
                weight = weight.args[0]  # type: ignore[union-attr]
            name = view.name(weight)
            if not (name in adapters or self._tied(view, name, adapters)) or operand(node, "bias") is not None:
                continue
            x: fx.Node = node.args[0]  # type: ignore[assignment]
            other = first.setdefault((x, id(view.attribute(name))), node)
            if other is not node:
                yield Match(node, lambda n=node, o=other: self._merge(view, n, o), f"one product with {other.name}")  # type: ignore[misc]
            elif beside.setdefault(x, node) is not node:
                yield Miss(view.where(node), "another adapter of the value has a first factor of its own", f"{name} is a tensor of its own")

    @staticmethod
    def _tied(view: FuseView, name: str, adapters: frozenset[str]) -> bool:
        return bool(name) and view.program.aliases.get(name, "") in adapters

    @staticmethod
    def _merge(view: FuseView, node: fx.Node, other: fx.Node) -> None:
        if not other._erased:
            view.replace(node, other)


RULE = LowRankShared()
