"""Operands of products as [batch, heads, steps, width], found in front of the turns, reshapes and factors that stand before a written-out product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from surgery.backends.fuse.attention_scores import scaling
from surgery.backends.fuse.heads import COPIES, SHAPES, called
from surgery.backends.fuse.nodes import is_call, same
from surgery.backends.fuse.view import FuseView, aten


@dataclass(frozen=True)
class Operand:
    """``factor`` times ``source`` with its axes in the order ``axes``: the value [batch, heads, steps, width].

    ``shaped`` is the reshape that ``source`` was given the factor in front of: it is done again without it. ``heads`` is 0, or the number of heads
    that axis ``axes[0]`` of ``source`` [steps, batch, heads * width] in a reshape [steps, batch * heads, width] stands for.
    """

    source: fx.Node
    axes: tuple[int, ...]
    factor: float = 1.0
    shaped: fx.Node | None = None
    heads: int = 0


def factors_of(node: fx.Node) -> tuple[list[str], list[str], str]:
    """The letters of a product's operands and of its result: those of an ``einsum``, or ``abqw``, ``abwk`` and ``abqk``, without ``a`` for three axes."""
    if is_call(node, aten.einsum.default):
        given, _, made = str(node.args[0]).replace(" ", "").partition("->")
        left, _, right = given.partition(",")
        return list(left), list(right), made
    rank = node.meta["val"].ndim
    front = "ab"[-(rank - 2) :] if rank > 2 else ""
    return [*front, "q", "w"], [*front, "w", "k"], f"{front}qk"


def score_axes(node: fx.Node) -> tuple[tuple[int, ...], tuple[int, ...], bool] | None:
    """Of a product that gives scores [..., queries, keys] where the axes (batch, heads, steps, width) of the queries and of the keys are, and
    whether the operand with the queries is the first; None for a product of another kind."""
    left, right, made = factors_of(node)
    if len(made) not in (3, 4) or len(left) != len(made) or len(right) != len(made) or "." in made:
        return None
    front, query, key = made[:-2], made[-2], made[-1]
    first = query in left
    mine, other = (left, right) if first else (right, left)
    width = [x for x in mine if x not in made]
    if len(width) != 1 or not {*front, query, *width} <= set(mine) or not {*front, key, *width} <= set(other):
        return None
    return tuple(map(mine.index, [*front, query, *width])), tuple(map(other.index, [*front, key, *width])), first


def value_axes(node: fx.Node, at: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Of a product of weights [..., queries, keys], its operand ``at``, with values: where (batch, heads, keys, width) of the values are, and the axes
    of the result in terms of (batch, heads, queries, width); None for a product of another kind."""
    left, right, made = factors_of(node)
    weights, values = (left, right) if at == 0 else (right, left)
    if len(made) not in (3, 4) or len(weights) != len(made) or len(values) != len(made) or "." in made:
        return None
    *front, query, key = weights
    width = [x for x in values if x not in weights]
    if len(width) != 1 or not {*front, key} <= set(values) or sorted(made) != sorted([*front, query, *width]):
        return None
    return tuple(map(values.index, [*front, key, *width])), tuple([*front, query, *width].index(x) for x in made)


def find(view: FuseView, node: Any, axes: Sequence[int], heads: int = 0) -> Operand | None:
    """The operand whose axes (batch, heads, steps, width), or (batch * heads, steps, width), stand at ``axes`` of ``node``; ``heads`` is how many there
    are where that is known. None where no value with an axis of heads stands behind it."""
    factor = 1.0
    order = tuple(axes)
    while isinstance(node, fx.Node):
        turned = _turned(view, node)
        scaled = scaling(view, node)
        if turned is not None:
            order = tuple(turned[a] for a in order)
        elif scaled is not None:
            factor *= scaled[1]
        elif not called(node, *COPIES):
            break
        node = node.args[0] if scaled is None else scaled[0]
    if not isinstance(node, fx.Node):
        return None
    if len(order) == 3:
        made = _unmerged(view, node, order, heads)
        return None if made is None else replace(made, factor=made.factor * factor)
    above = scaling(view, node.args[0]) if called(node, *SHAPES) else None
    return Operand(node, order, factor) if above is None else Operand(above[0], order, factor * above[1], shaped=node)


def _turned(view: FuseView, node: fx.Node) -> list[int] | None:
    """The axes of the argument in the order in which a change of axes gives them."""
    rank = view.rank(node)
    if called(node, aten.permute.default):
        return [int(a) % rank for a in node.args[1]]  # type: ignore[union-attr, arg-type]
    if called(node, aten.transpose.int):
        axes = list(range(rank))
        i, j = (int(a) % rank for a in node.args[1:3])  # type: ignore[arg-type]
        axes[i], axes[j] = axes[j], axes[i]
        return axes
    return None


def _unmerged(view: FuseView, node: fx.Node, order: tuple[int, ...], heads: int) -> Operand | None:
    """The operand behind a reshape that makes one axis of batch and heads."""
    if not called(node, *SHAPES):
        return None
    above, at = node.args[0], order[0]
    shape, wide = view.shape(node), view.shape(above)
    if len(wide) == 4 and same(view, (*wide[:at], wide[at] * wide[at + 1], *wide[at + 2 :]), shape):
        return find(view, above, [at, at + 1, *(a + 1 if a > at else a for a in order[1:])])
    if len(wide) == 3 and at == 1 and order[2] == 2 and isinstance(shape[2], int) and isinstance(wide[2], int) and wide[2] % shape[2] == 0:
        count = wide[2] // shape[2]
        if same(view, shape[0], wide[0]) and same(view, wide[1] * count, shape[1]) and heads in (0, count):
            made = _rows(view, above)
            return Operand(made.source, (1, 2, 0, 3), made.factor, heads=count)
    return None


def _rows(view: FuseView, node: Any) -> Operand:
    """A value of three axes in front of copies and factors."""
    factor = 1.0
    while isinstance(node, fx.Node):
        scaled = scaling(view, node)
        if scaled is not None:
            node, factor = scaled[0], factor * scaled[1]
        elif called(node, *COPIES):
            node = node.args[0]
        else:
            break
    return Operand(node, (0, 1, 2), factor)


def shape_of(view: FuseView, operand: Operand) -> tuple[Any, ...]:
    """Its sizes, [batch, heads, steps, width]."""
    shape = view.shape(operand.shaped if operand.shaped is not None else operand.source)
    if operand.heads:
        shape = (shape[0], shape[1], operand.heads, shape[2] // operand.heads)
    return tuple(shape[a] for a in operand.axes)


def build(view: FuseView, operand: Operand, like: fx.Node) -> fx.Node:
    """The value as a node, without its factor."""
    node = operand.source
    if operand.shaped is not None:
        node = view.call(operand.shaped.target, node, *operand.shaped.args[1:], like=like)  # type: ignore[arg-type]
    if operand.heads:
        shape = view.shape(node)
        node = view.call(
            aten.reshape.default, node, [view.size(node, 0), view.size(node, 1), operand.heads, int(shape[2]) // operand.heads], like=like
        )  # fmt: skip
    if operand.axes == (0, 1, 2, 3):
        return node
    if operand.axes == (0, 2, 1, 3):
        return view.call(aten.transpose.int, node, 1, 2, like=like)
    return view.call(aten.permute.default, node, list(operand.axes), like=like)
