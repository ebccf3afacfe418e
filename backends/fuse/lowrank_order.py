"""A low-rank change of a weight is applied to the value in two thin products, and never formed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse.nodes import is_call, operand, tensors_of_adapters, with_number
from surgery.backends.fuse.rule import ONNX, PT2, Match, Miss
from surgery.backends.fuse.view import FuseView
from surgery.model import grouped  # noqa: F401  (registers the product of sorted rows)

aten = torch.ops.aten
LINEAR, MATMUL, GROUPED = aten.linear.default, aten.matmul.default, torch.ops.surgery.grouped_mm.default

_PRODUCTS = (aten.mm.default, aten.matmul.default, aten.bmm.default)
_ADDED = (aten.addmm.default, aten.baddbmm.default)
_TURNS = (aten.transpose.int, aten.t.default)
_MASKS = (aten.where.self, aten.where.ScalarOther, aten.masked_fill.Scalar)


@dataclass(frozen=True)
class _Change:
    """``base + scale left right`` as the matrix that a value is multiplied with from the left; ``turned``: all of it is transposed."""

    base: fx.Node | None
    left: fx.Node
    right: fx.Node
    scale: float
    turned: bool


@dataclass(frozen=True)
class LowRankOrder:
    """``x (W + s B A)^T`` is ``x W^T + s (x A^T) B^T``: two thin products instead of a matrix of the size of the weight in every run, also for
    experts, whose rows are sorted by expert. The factors stay tensors of their own, so that an adapter can be exchanged, and the scale is a
    number. A change that passes a mask has to be formed, because the mask has no rank; so has one that is no product of two factors."""

    name: str = "low_rank_order"
    doc: str = "the low-rank change of a weight is two thin products and is never formed"
    order: int = 32
    targets: frozenset[str] = frozenset({ONNX, PT2})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        adapters = tensors_of_adapters(view)
        if not adapters:
            return
        for node in view.calls(LINEAR, MATMUL, GROUPED, aten.mm.default):
            weight = node.args[1]
            if not isinstance(weight, fx.Node) or weight.op != "call_function" or not _from_adapters(view, weight, adapters):
                continue
            found = self._read(view, node)
            if isinstance(found, _Change):
                rank = view.shape(found.left)[-1]
                yield Match(node, lambda n=node: self._write(view, n), f"two products of rank {rank}")  # type: ignore[misc]
            elif found is not None:
                yield Miss(view.where(node), *found)

    def _read(self, view: FuseView, node: fx.Node) -> _Change | tuple[str, str] | None:
        """The change in a product's weight; the first condition that fails; None for a stored factor in another layout."""
        value: Any = node.args[1]
        turned = is_call(node, LINEAR)
        while is_call(value, *_TURNS) and _last_two(view, value):
            value, turned = value.args[0], not turned
        if view.name(value) or (is_call(value, aten.to.dtype, aten.pad.default, aten.mul.Tensor) and _plain(view, value)):
            return None
        if _masked(value):
            return "a mask keeps parts of the change zero, so that it has to be formed", value.name
        base, scale = None, 1.0
        if is_call(value, *_ADDED):
            base, left, right = value.args[:3]
            if operand(value, "beta") != 1:
                return "the weight itself is scaled", f"beta {operand(value, 'beta')}"
            scale = float(operand(value, "alpha"))
        else:
            if is_call(value, aten.add.Tensor) and all(isinstance(a, fx.Node) for a in value.args[:2]):
                sides = [a for a in value.args if _product(view, a) is None]
                if len(sides) != 1 or operand(value, "alpha") != 1:
                    return "the change is no product of two factors", value.name
                base = sides[0]
                value = next(a for a in value.args if a is not base)
            found = _product(view, value)
            if found is None:
                return "the change is no product of two factors", value.name
            left, right, scale = found
        rank, rows, columns = view.shape(left)[-1], view.shape(left)[-2], view.shape(right)[-1]
        if rank * (rows + columns) >= rows * columns:
            return "the rank is not low: two products are no less work", f"rank {rank} of a matrix of {rows} x {columns}"
        if is_call(node, MATMUL, aten.mm.default) and view.rank(left) != 2:
            return "the factors are neither matrices nor those of experts", node.name
        return _Change(base, left, right, scale, turned)

    def _write(self, view: FuseView, node: fx.Node) -> None:
        found = self._read(view, node)
        if not isinstance(found, _Change):
            return
        x: Any = node.args[0]
        first, second = (found.right, found.left) if found.turned else (found.left, found.right)
        with view.before(node):
            thin = self._times(view, node, x, first, found.turned)
            if found.scale != 1:
                thin = view.call(aten.mul.Tensor, thin, found.scale, like=node)
            change = self._times(view, node, thin, second, found.turned)
            if found.base is not None:
                bias = operand(node, "bias") if is_call(node, LINEAR) else None
                change = view.call(aten.add.Tensor, self._times(view, node, x, found.base, found.turned, bias), change, like=node)
            elif is_call(node, LINEAR) and operand(node, "bias") is not None:
                change = view.call(aten.add.Tensor, change, operand(node, "bias"), like=node)
        view.replace(node, change)

    @staticmethod
    def _times(view: FuseView, node: fx.Node, x: fx.Node, matrix: fx.Node, turned: bool, bias: fx.Node | None = None) -> fx.Node:
        """``x`` times a matrix of the change, by the kind of product that ``node`` is."""
        if is_call(node, GROUPED):
            if turned:
                matrix = view.call(aten.transpose.int, matrix, -2, -1, like=node)
            return view.call(GROUPED, x, matrix, node.args[2], like=node)
        if turned:
            return view.call(LINEAR, x, matrix, bias, like=node)
        return view.call(MATMUL, x, matrix, like=node)


def _last_two(view: FuseView, node: fx.Node) -> bool:
    """Whether a turn exchanges the last two axes."""
    if not is_call(node, aten.transpose.int):
        return True
    rank = view.rank(node)
    return {int(a) % rank for a in node.args[1:3]} == {rank - 2, rank - 1}  # type: ignore[arg-type]


def _product(view: FuseView, node: Any) -> tuple[fx.Node, fx.Node, float] | None:
    """The factors and the scale of ``scale left right``."""
    scaled = with_number(view, node, aten.mul.Tensor)
    scale = 1.0
    if scaled is not None:
        node, scale = scaled[0], float(scaled[1])
    if not is_call(node, *_PRODUCTS) or any(view.rank(a) not in (2, 3) for a in node.args):
        return None
    return node.args[0], node.args[1], scale


def _plain(view: FuseView, node: fx.Node) -> bool:
    """Whether a node is a stored tensor in another type, layout or scale."""
    above = [a for a in node.args if isinstance(a, fx.Node)]
    return all(view.name(a) or (a.op == "call_function" and a.target in (*_TURNS, aten.to.dtype) and _plain(view, a)) for a in above)


def _masked(node: fx.Node) -> bool:
    """Whether a mask is applied to what is added to the weight."""
    if is_call(node, *_MASKS):
        return True
    return is_call(node, aten.add.Tensor, aten.mul.Tensor, aten.to.dtype) and any(_masked(a) for a in node.all_input_nodes)


def _from_adapters(view: FuseView, node: fx.Node, adapters: frozenset[str]) -> bool:
    """Whether a weight is computed from stored tensors alone, those of an adapter among them."""
    found, queue, seen = False, [node], {node}
    while queue:
        for above in queue.pop().all_input_nodes:
            if above.op == "placeholder" or len(seen) > 64:
                return False
            found = found or view.name(above) in adapters
            if above not in seen:
                seen.add(above)
                queue.append(above)
    return found


RULE = LowRankOrder()
