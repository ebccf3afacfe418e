"""Operations that give back what they are given: dropped."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse.nodes import CASTS, RESHAPES, is_call, number, operand, same, written
from surgery.backends.fuse.rule import ONNX, PT2, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten

COPIES = frozenset(
    {aten.contiguous.default, aten.clone.default, aten.detach.default, aten.detach_.default, aten.alias.default, aten.lift_fresh_copy.default,
     aten.lift.default}
)  # fmt: skip
SHAPES = RESHAPES | {aten.expand.default, aten.broadcast_to.default, aten.slice.Tensor, aten.repeat.default}
"""Operations that are nothing when the shape stays: the elements of an equal shape are all of them, in their order."""

NEUTRAL = {aten.add.Tensor: 0, aten.sub.Tensor: 0, aten.mul.Tensor: 1, aten.div.Tensor: 1, aten.pow.Tensor_Scalar: 1}


@dataclass(frozen=True)
class Identity:
    """Dropped are dropout outside of training, casts to the type that a value has, copies, slices and reshapes to the shape that is there,
    sums with 0, products with 1, turns that are turned back, and the first of two reshapes. What is written in place stays."""

    name: str = "drop_identities"
    doc: str = "operations that change nothing are dropped, and the first of two reshapes"
    order: int = 10
    targets: frozenset[str] = frozenset({ONNX, PT2})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        pinned = written(view)
        strided = any(is_call(n, aten.view.default, aten._unsafe_view.default) for n in view.nodes)
        for node in view.nodes:
            if node.op != "call_function":
                continue
            source = self._source(view, node, strided)
            if source is not None:
                if node in pinned or source in pinned:
                    yield Miss(view.where(node), "the memory of the value is written to in place", source.name)
                    continue
                yield Match(node, lambda n=node: self._drop(view, n, strided), _what(node))  # type: ignore[misc]
            elif self._twice(node) and node not in pinned:
                yield Match(node, lambda n=node: _once(view, n), "one reshape for two")  # type: ignore[misc]

    def _drop(self, view: FuseView, node: fx.Node, strided: bool) -> None:
        source = self._source(view, node, strided)  # asked again: matches before this one may have changed the arguments
        if source is not None:
            view.replace(node, source)

    def _source(self, view: FuseView, node: fx.Node, strided: bool) -> fx.Node | None:
        """The value that a node gives back unchanged."""
        first = node.args[0] if node.args else None
        target: Any = node.target
        if is_call(node, aten.cat.default):
            parts = first if isinstance(first, (list, tuple)) else ()
            return parts[0] if len(parts) == 1 and isinstance(parts[0], fx.Node) else None
        if not isinstance(first, fx.Node):
            return None
        if target in (aten.dropout.default, aten.feature_dropout.default):
            return first if not operand(node, "train") or operand(node, "p") == 0 else None
        if target in (aten.transpose.int, aten.permute.default, aten.neg.default):
            return _turned_back(node, first, view.rank(node))
        if target in COPIES:
            return None if strided and target in (aten.contiguous.default, aten.clone.default) else first
        if not self._same_value(view, node, first):
            return None
        if target in CASTS:
            other = view.fake(first)
            return first if other.device == view.fake(node).device else None
        if target in SHAPES:
            return first
        if target in NEUTRAL and number(view, node.args[1]) == NEUTRAL[target] and not node.kwargs.get("rounding_mode"):
            return first
        return None

    @staticmethod
    def _same_value(view: FuseView, node: fx.Node, first: fx.Node) -> bool:
        """Whether type and shape are those of the first argument."""
        dtype = view.dtype(node)
        return dtype is not None and dtype == view.dtype(first) and same(view, view.shape(node), view.shape(first))

    @staticmethod
    def _twice(node: fx.Node) -> bool:
        """Whether a reshape reads a reshape that nobody else reads."""
        if not is_call(node, aten.reshape.default, aten.view.default):
            return False
        inner = node.args[0]
        return is_call(inner, *RESHAPES) and len(inner.users) == 1  # type: ignore[union-attr]


def _turned_back(node: fx.Node, inner: fx.Node, rank: int) -> fx.Node | None:
    """What a turn of a turned value was before both, when the second undoes the first."""
    if not is_call(inner, node.target) or rank < 0:
        return None
    source = inner.args[0]
    if node.target is aten.neg.default:
        return source if isinstance(source, fx.Node) else None
    first, second = _axes(inner, rank), _axes(node, rank)
    if [first[i] for i in second] != list(range(rank)):
        return None
    return source if isinstance(source, fx.Node) else None


def _axes(node: fx.Node, rank: int) -> list[int]:
    axes = list(range(rank))
    if node.target is aten.permute.default:
        return [int(a) % rank for a in node.args[1]]  # type: ignore[union-attr,arg-type]
    i, j = (int(a) % rank for a in node.args[1:3])  # type: ignore[arg-type]
    axes[i], axes[j] = axes[j], axes[i]
    return axes


def _once(view: FuseView, node: fx.Node) -> None:
    inner = node.args[0]
    if is_call(inner, *RESHAPES):  # a match before may have dropped it
        node.args = (inner.args[0], *node.args[1:])  # type: ignore[union-attr]
        node.target = aten.reshape.default
        view.drop(inner)  # type: ignore[arg-type]


def _what(node: fx.Node) -> str:
    return f"{str(node.target).removeprefix('aten.')} dropped"


RULE = Identity()
