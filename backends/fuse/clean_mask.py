"""Masks: what is true everywhere goes, and a look-up with counters of whole axes is a view."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse.nodes import is_call, number, operand, pair, same
from surgery.backends.fuse.rule import ONNX, PT2, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten

AND = (aten.__and__.Tensor, aten.logical_and.default, aten.bitwise_and.Tensor)
SDPA = aten.scaled_dot_product_attention.default

VIEWS = frozenset(
    {
        aten.unsqueeze.default, aten.expand.default, aten.reshape.default, aten.view.default, aten.squeeze.dim, aten.transpose.int,
        aten.permute.default, aten.slice.Tensor, aten.clone.default, aten.contiguous.default, aten.select.int,
    }
)  # fmt: skip
"""Operations whose result holds values of their first argument and no others."""


@dataclass(frozen=True)
class SimplifyMask:
    """A conjunction with what is true for every input (comparisons of counters with 0, constants of ones) is the other side. A mask that is
    true everywhere leaves its attention. ``mask[batch counter, key counter]`` over the whole axes, the way in which models look padding up,
    is the mask with new axes. What depends on the caller's mask stays: padding is masked as before."""

    name: str = "simplify_masks"
    doc: str = "conditions that are always true leave the masks, look-ups by counters become views"
    order: int = 20
    targets: frozenset[str] = frozenset({ONNX, PT2})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        for node in view.nodes:
            if is_call(node, *AND):
                kept = self._kept(view, node)
                if kept is not None:
                    yield Match(node, lambda n=node: self._conjunction(view, n), "a condition that is always true dropped")  # type: ignore[misc]
            elif is_call(node, SDPA):
                mask = operand(node, "attn_mask")
                if isinstance(mask, fx.Node) and view.dtype(mask) is torch.bool and always(view, mask):
                    yield Match(node, lambda n=node: self._unmask(view, n), "a mask that is true everywhere dropped")  # type: ignore[misc]
                elif isinstance(mask, fx.Node) and self._broadcast(view, node, mask) is not None:
                    yield Match(node, lambda n=node: self._thin(view, n), "the mask is broadcast by the attention")  # type: ignore[misc]
            elif is_call(node, aten.index.Tensor):
                found = self._look_up(view, node)
                if isinstance(found, str):
                    yield Miss(view.where(node), found)
                elif found is not None:
                    yield Match(node, lambda n=node: self._look(view, n), "a look-up by counters is a view")  # type: ignore[misc]

    # ---------------------------------------------------------------- conjunctions

    @staticmethod
    def _kept(view: FuseView, node: fx.Node) -> fx.Node | None:
        """The side of a conjunction that decides it."""
        sides = pair(node, *AND)
        if sides is None or any(view.dtype(s) is not torch.bool for s in sides):
            return None
        left, right = sides
        return right if always(view, left) else left if always(view, right) else None

    def _conjunction(self, view: FuseView, node: fx.Node) -> None:
        kept = self._kept(view, node)
        if kept is None:
            return
        if not same(view, view.shape(kept), view.shape(node)):
            other = next(s for s in node.args if s is not kept)
            lift = view.rank(node) - view.rank(kept)
            with view.before(node):
                sizes = [-1] * view.rank(node)
                for axis, size in enumerate(view.shape(node)):
                    own = view.shape(kept)[axis - lift] if axis >= lift else None
                    if own is None or not same(view, own, size):
                        sizes[axis] = self._size(view, other, node, axis)
                kept = view.call(aten.expand.default, kept, sizes, like=node)
        view.replace(node, kept)

    @staticmethod
    def _size(view: FuseView, other: Any, node: fx.Node, axis: int) -> Any:
        """The size of an axis of the result, read from the side that has it."""
        size = view.shape(node)[axis]
        if isinstance(size, int):
            return size
        return view.size(other, axis - view.rank(node) + view.rank(other))

    # ---------------------------------------------------------------- attention

    @staticmethod
    def _unmask(view: FuseView, node: fx.Node) -> None:
        mask = operand(node, "attn_mask")
        _set_mask(node, None)
        view.drop(mask)

    @staticmethod
    def _broadcast(view: FuseView, node: fx.Node, mask: fx.Node) -> fx.Node | None:
        """What a mask was before it was spread over batch, heads or queries, which the attention does by itself."""
        if not is_call(mask, aten.expand.default) or not isinstance(mask.args[0], fx.Node):
            return None
        thin = mask.args[0]
        return thin if view.rank(thin) == view.rank(mask) == 4 and same(view, view.shape(thin)[-1], view.shape(mask)[-1]) else None

    def _thin(self, view: FuseView, node: fx.Node) -> None:
        mask = operand(node, "attn_mask")
        thin = self._broadcast(view, node, mask)
        if thin is not None:
            _set_mask(node, thin)
            view.drop(mask)

    # ---------------------------------------------------------------- look-ups

    def _look_up(self, view: FuseView, node: fx.Node) -> list[int] | str | None:
        """The axis of the result that each axis of the looked-up tensor becomes; what is missing, in words; None: no look-up of a mask."""
        source, indices = node.args[:2]
        if not isinstance(source, fx.Node) or view.dtype(source) is not torch.bool or not isinstance(indices, (list, tuple)):
            return None
        if len(indices) != view.rank(source) or not all(isinstance(i, fx.Node) for i in indices):
            return "not every axis of the mask is looked up"
        axes: list[int] = []
        rank = max(view.rank(i) for i in indices)
        for axis, index in enumerate(indices):
            found = _counter(view, index)
            if found is None:
                return "an index is no counter from 0"
            length, place = found
            if not same(view, length, view.shape(source)[axis]):
                return "a counter does not run over the whole axis"
            axes.append(place + rank - view.rank(index))
        return axes if axes == sorted(set(axes)) else "the counters turn the axes around"

    def _look(self, view: FuseView, node: fx.Node) -> None:
        axes = self._look_up(view, node)
        if not isinstance(axes, list):
            return
        value: Any = node.args[0]
        with view.before(node):
            for axis in range(view.rank(node)):
                if axis not in axes:
                    value = view.call(aten.unsqueeze.default, value, axis, like=node)
        view.replace(node, value)


def _set_mask(node: fx.Node, mask: fx.Node | None) -> None:
    if "attn_mask" in node.kwargs:
        node.kwargs = {**node.kwargs, "attn_mask": mask}
    else:
        node.args = (*node.args[:3], mask, *node.args[4:])


def _counter(view: FuseView, node: Any) -> tuple[Any, int] | None:
    """Length and axis of ``0, 1, 2 ...`` that stands along one axis of a tensor, the others having one place; None for anything else."""
    added: list[int] = []
    while is_call(node, aten.unsqueeze.default):
        added.append(int(node.args[1]) % view.rank(node))
        node = node.args[0]
    if not is_call(node, aten.arange.default) or view.rank(node) != 1:
        return None
    place = 0
    for axis in reversed(added):
        place += axis <= place
    return view.shape(node)[0], place


# ------------------------------------------------------------------ what is true for every input


def always(view: FuseView, node: Any) -> bool:
    """Whether a boolean tensor is true at every place, whatever the inputs and their sizes."""
    if not isinstance(node, fx.Node):
        return node is True
    if view.name(node):
        value = None if view.is_parameter(node) or view.is_live(node) else view.tensor(node)
        return value is not None and value.dtype is torch.bool and value.device.type != "meta" and bool(value.all())
    if is_call(node, *VIEWS):
        return always(view, node.args[0])
    if is_call(node, *AND):
        return all(always(view, side) for side in node.args)
    if is_call(node, aten.new_ones.default, aten.ones.default, aten.ones_like.default):
        return True
    if is_call(node, aten.full.default, aten.new_full.default):
        return bool(node.args[-1]) and not isinstance(node.args[-1], fx.Node)
    if is_call(node, aten.ge.Scalar, aten.gt.Scalar):
        low, bound = _at_least(view, node.args[0]), number(view, node.args[1])
        return low is not None and bound is not None and (low >= bound if node.target is aten.ge.Scalar else low > bound)
    return False


def _at_least(view: FuseView, node: Any) -> int | None:
    """A number that no element of an integer tensor, and no size, is below; None when nothing is known."""
    if isinstance(node, int) and not isinstance(node, bool):
        return node
    if not isinstance(node, fx.Node):
        return None
    if view.name(node):
        value = None if view.is_parameter(node) or view.is_live(node) else view.tensor(node)
        known = value is not None and value.numel() and not value.is_floating_point() and value.device.type != "meta"
        return int(value.min()) if known else None  # type: ignore[union-attr]
    if node.op == "call_function" and node.target in (aten.sym_size.int, aten.arange.default):
        return 0
    if is_call(node, *VIEWS):
        return _at_least(view, node.args[0])
    if is_call(node, operator.add) or (is_call(node, aten.add.Tensor) and node.kwargs.get("alpha", 1) == 1):
        lows = [_at_least(view, side) for side in node.args[:2]]
        return None if None in lows else sum(lows)  # type: ignore[arg-type]
    return None


RULE = SimplifyMask()
