"""The scores of attention that is written out: what a softmax weighs is taken apart into one product, its factor, and what is added to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse.heads import COPIES, SHAPES, behind_copies, called
from surgery.backends.fuse.masks import HIDES
from surgery.backends.fuse.nodes import CASTS, is_call, number, same, with_number
from surgery.backends.fuse.view import FuseView, aten

PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default)
SUMS = (aten.add.Tensor, aten.add_.Tensor)
FILLS = (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar, aten.masked_fill_.Tensor)
FACTORS = (aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar)
LAYOUT = (*SHAPES, *COPIES, *CASTS)
CONSTANTS = (aten.full.default, aten.full_like.default, aten.new_full.default)
LARGER = (aten.maximum.default, aten.max.other)
FLOOR = -1e30
"""A bound from below at which nothing that is not hidden is changed."""


class Unread(Exception):
    """Scores that are made in another way: the condition that failed, and what is particular to the place."""

    def __init__(self, condition: str, detail: str = "") -> None:
        super().__init__(condition)
        self.condition, self.detail = condition, detail


@dataclass(frozen=True)
class Added:
    """What is added to scores with the axes of ``level``: ``factor`` times ``node``, or for a boolean ``node`` the number ``factor`` at the places
    where it is ``hides``."""

    node: fx.Node
    level: fx.Node
    factor: float = 1.0
    hides: bool | None = None


@dataclass(frozen=True)
class Scores:
    """``scale * cap(factors * product) + added``. ``factors`` are tensors without an axis of keys; ``cap`` is 0, or c of ``c tanh(x / c)``;
    ``chain`` has every node from the product to the one that was read."""

    product: fx.Node
    scale: float
    cap: float
    factors: tuple[fx.Node, ...]
    added: tuple[Added, ...]
    chain: tuple[fx.Node, ...]


def read(view: FuseView, node: Any) -> Scores:
    """The scores that ``node`` holds. Raises :class:`Unread`."""
    scale, cap = 1.0, 0.0
    factors: list[fx.Node] = []
    added: list[Added] = []
    chain: list[fx.Node] = []
    while True:
        if not isinstance(node, fx.Node) or node.op != "call_function":
            raise Unread("what the softmax weighs is no product", getattr(node, "name", str(node)))
        chain.append(node)
        if is_call(node, *PRODUCTS):
            return Scores(node, scale * (cap or 1.0), cap, tuple(factors), tuple(added), tuple(chain))
        if is_call(node, aten.baddbmm.default):
            _outside(node, cap, factors)
            _add(view, added, node.args[0], node, scale * float(node.kwargs.get("beta", 1)))
            return Scores(node, scale * float(node.kwargs.get("alpha", 1)), cap, tuple(factors), tuple(added), tuple(chain))
        if is_call(node, *LAYOUT):
            _laid_out(view, node)
            node = node.args[0]
        elif (by := scaling(view, node)) is not None:
            node, factor = by
            scale *= factor
        elif is_call(node, *SUMS) and node.kwargs.get("alpha", 1) == 1:
            _outside(node, cap, factors)
            own, other = _sides(view, node)
            _add(view, added, other, node, scale)
            node = own
        elif is_call(node, aten.sub.Tensor, aten.sub_.Tensor) and node.kwargs.get("alpha", 1) == 1:
            _outside(node, cap, factors)
            _add(view, added, node.args[1], node, -scale)
            node = node.args[0]
        elif is_call(node, *FILLS):
            _outside(node, cap, factors)
            _hide(view, added, node.args[1], True, node.args[2], node, scale)
            node = node.args[0]
        elif is_call(node, aten.where.self):
            _outside(node, cap, factors)
            own, hides, fill = (node.args[1], False, node.args[2]) if _leads(view, node.args[1]) else (node.args[2], True, node.args[1])
            _hide(view, added, node.args[0], hides, fill, node, scale)
            node = own
        elif (bounded := _bounded(view, node)) is not None:
            node = bounded
        elif is_call(node, aten.mul.Tensor):
            own, other = _sides(view, node)
            if not _erased(view, other, added):
                _multiply(view, factors, other, node)
            node = own
        elif is_call(node, aten.tanh.default) and not cap and scale > 0:
            cap, scale = scale, 1.0
            node = node.args[0]
        else:
            raise Unread("between the product with the keys and the softmax stands another operation", str(node.target))


def scaling(view: FuseView, node: Any) -> tuple[fx.Node, float] | None:
    """What a call multiplies with a number, or divides by one, and the factor; None for anything else."""
    if not is_call(node, *FACTORS) or node.kwargs.get("rounding_mode"):
        return None
    found = with_number(view, node, *FACTORS)
    if found is None:
        return None
    return found[0], 1 / float(found[1]) if "div" in str(node.target) else float(found[1])


def _laid_out(view: FuseView, node: fx.Node) -> None:
    """Raises unless queries and keys stay the last two axes."""
    if is_call(node, *CASTS):
        dtype = view.dtype(node)
        if dtype is None or not dtype.is_floating_point:
            raise Unread("the scores are cast to a type that is not floating point", str(dtype))
        return
    if not same(view, view.shape(node)[-2:], view.shape(node.args[0])[-2:]):
        raise Unread("a change of axes between product and softmax moves those of queries and keys", str(node.target))


def _sides(view: FuseView, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Of two operands the one that leads to the product, and the other."""
    left, right = node.args[:2]
    if _leads(view, left) and isinstance(right, fx.Node):
        return left, right  # type: ignore[return-value]
    if _leads(view, right) and isinstance(left, fx.Node):
        return right, left  # type: ignore[return-value]
    raise Unread("neither of two values leads to a product with the keys", str(node.target))


def _leads(view: FuseView, node: Any) -> bool:
    """Whether a value is a product, behind the operations that :func:`read` goes through."""
    todo = [node]
    while todo:
        here = todo.pop()
        if not isinstance(here, fx.Node) or here.op != "call_function":
            continue
        if is_call(here, *PRODUCTS, aten.baddbmm.default):
            return all(view.rank(o) == view.rank(here) for o in operands(here))
        if is_call(here, *LAYOUT, *FACTORS, *FILLS, aten.tanh.default, aten.sub.Tensor, aten.sub_.Tensor, aten.clamp.default):
            todo.append(here.args[0])
            if is_call(here, aten.mul.Tensor):
                todo.append(here.args[1])
        elif is_call(here, *SUMS, *LARGER):
            todo += here.args[:2]
        elif is_call(here, aten.where.self):
            todo += here.args[1:3]
    return False


def operands(node: fx.Node) -> Sequence[Any]:
    """Both operands of a product."""
    if is_call(node, aten.einsum.default):
        return tuple(node.args[1])  # type: ignore[arg-type]
    return node.args[1:3] if is_call(node, aten.baddbmm.default) else node.args[:2]


# ------------------------------------------------------------------ what is added


def _outside(node: fx.Node, cap: float, factors: list[fx.Node]) -> None:
    """What is added has to be added last."""
    if cap or factors:
        raise Unread(f"something is added to scores before they are {'capped' if cap else 'multiplied by a tensor'}", str(node.target))


def _add(view: FuseView, added: list[Added], node: Any, level: fx.Node, factor: float) -> None:
    dtype = view.dtype(node)
    if not isinstance(node, fx.Node) or dtype is None or not dtype.is_floating_point:
        raise Unread("what is added to the scores are no numbers", getattr(node, "name", str(node)))
    added.append(Added(node, level, factor))


def _hide(view: FuseView, added: list[Added], mask: Any, hides: bool, fill: Any, level: fx.Node, factor: float) -> None:
    value = _fill(view, fill)
    if value is None or factor <= 0 or value * factor > HIDES:
        raise Unread("what stands in the place of hidden scores is no number that hides them", str(fill if value is None else value))
    if view.dtype(mask) is not torch.bool:
        raise Unread("what hides scores is no boolean mask", getattr(mask, "name", ""))
    added.append(Added(mask, level, value * factor, hides))


def _fill(view: FuseView, value: Any) -> float | None:
    value = behind_copies(value)
    if is_call(value, *CONSTANTS):
        value = value.args[-1]
    elif is_call(value, aten.scalar_tensor.default):
        value = value.args[0]
    found = number(view, value)
    return None if found is None else float(found)


def _bounded(view: FuseView, node: fx.Node) -> fx.Node | None:
    """What was bounded from below so far down that only what is hidden changes."""
    if is_call(node, *LARGER):
        for own, bound in (node.args[:2], node.args[1::-1]):
            low = _fill(view, bound)
            if low is not None and low <= FLOOR and isinstance(own, fx.Node):
                return own
    if is_call(node, aten.clamp.default, aten.clamp_min.default):
        low = _fill(view, node.args[1] if len(node.args) > 1 else node.kwargs.get("min"))
        high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
        if low is not None and low <= FLOOR and (high is None or float(high) >= -FLOOR):  # type: ignore[arg-type]
            return node.args[0]  # type: ignore[return-value]
    return None


def _erased(view: FuseView, node: Any, added: list[Added]) -> bool:
    """Whether a factor of the scores is a stored table of zeros and ones, and where it is zero a number that hides is added behind it, as in the first
    GPT: ``scores * b + c * (1 - b)``. What the zeros erase is then hidden without them."""
    table = node
    while called(table, aten.slice.Tensor, *COPIES, *SHAPES):
        table = table.args[0]
    values = view.tensor(table) if isinstance(table, fx.Node) else None
    if values is None or not bool(((values == 0) | (values == 1)).all()):
        return False
    return any(part.hides is None and _complement(view, part, node) for part in added)


def _complement(view: FuseView, part: Added, node: fx.Node) -> bool:
    """Whether what is added is ``c * (1 - node)`` with a ``c`` that hides."""
    by = scaling(view, part.node)
    if by is None or by[1] * part.factor > HIDES or not is_call(by[0], aten.rsub.Scalar, aten.rsub.Tensor, aten.sub.Tensor):
        return False
    left, right = by[0].args[:2][:: 1 if is_call(by[0], aten.sub.Tensor) else -1]
    return right is node and number(view, left) == 1 and len(by[0].args) == 2 and by[0].kwargs.get("alpha", 1) == 1


def _multiply(view: FuseView, factors: list[fx.Node], node: fx.Node, level: fx.Node) -> None:
    shape = view.shape(node)
    if not shape or not same(view, shape[-1], 1) or view.rank(level) != 4:
        raise Unread("scores are multiplied by a number for each key", node.name)
    factors.append(node)
