"""Operations that treat every step by itself see one matrix of steps."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse import ops_activation, ops_norm, ops_rows, ops_spread  # noqa: F401  (they register the operations)
from surgery.backends.fuse.nodes import is_call, operand, same
from surgery.backends.fuse.packing import LINEAR
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView, aten

_OPS = torch.ops.surgery
PRODUCT_SUM, NORMS = _OPS.product_sum.default, (_OPS.spread_norm.default, _OPS.rms_norm.default)
ALONE = frozenset({aten.gelu.default, aten.silu.default, aten.relu.default, aten.tanh.default, aten.sigmoid.default, _OPS.quick_gelu.default,
                   _OPS.bias_gelu.default, *NORMS})  # fmt: skip
"""Operations whose first argument is the value and whose result has its shape; what else they read has one axis, or none."""

TWO = frozenset({aten.add.Tensor, aten.mul.Tensor, _OPS.total.default})
SPLIT = aten.split_with_sizes.default


@dataclass
class FlatRows:
    """Products, norms, activations and sums between two attentions do not look at other steps. On [batch, steps, width] onnxruntime adds the bias of
    a product in a pass of its own; on [batch * steps, width] the product is a Gemm, which adds a bias or a shortcut while it sums up. The values
    change their axes once where such operations begin and once where they end, which moves nothing in memory. Where most products add nothing there
    is nothing to gain."""

    name: str = "flat_rows"
    doc: str = "on processors, operations that look at one step at a time work on a matrix of all steps"
    order: int = 430
    targets: frozenset[str] = field(default_factory=lambda: frozenset({ONNX}))

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        if view.target.device != "cpu":
            return
        for group in _groups(view):
            seeds = [n for n in group if _gains(n)]
            if not seeds:
                continue
            if 2 * len(seeds) < sum(is_call(n, LINEAR, PRODUCT_SUM) for n in group):
                yield Miss(view.where(seeds[0]), "most products beside it add nothing", f"{len(seeds)} do")
                continue
            if view.target.precision == "int8":
                yield Miss(view.where(seeds[0]), "products of integers add nothing to their result")
                continue
            said = f"{len(group)} operations, {len(seeds)} of them products that add something"
            yield Match(seeds[0], lambda g=group: _apply(view, g), said)  # type: ignore[misc]


def _gains(node: fx.Node) -> bool:
    return is_call(node, PRODUCT_SUM) or (is_call(node, LINEAR) and operand(node, "bias") is not None)


def _groups(view: FuseView) -> Iterator[list[fx.Node]]:
    """The connected parts of the graph that consist of operations on single steps alone, each in the order of the graph."""
    order = [n for n in view.nodes if _fits(view, n)]
    group_of: dict[fx.Node, list[fx.Node]] = {}
    for node in order:
        above = {id(g): g for a in node.all_input_nodes if (g := group_of.get(a)) is not None}
        joined = [node, *(member for group in above.values() for member in group)]
        for member in joined:
            group_of[member] = joined
    at = {n: i for i, n in enumerate(order)}
    for group in {id(g): g for g in group_of.values()}.values():
        yield sorted(group, key=at.__getitem__)


def _fits(view: FuseView, node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if is_call(node, operator.getitem):
        return is_call(node.args[0], SPLIT) and _fits(view, node.args[0])  # type: ignore[arg-type]
    if any(view.is_live(a) for a in node.all_input_nodes):
        return False  # an adapter that is exchanged later may have another rank
    first = node.args[0] if node.args else None
    if not isinstance(first, fx.Node) or view.rank(first) != 3 or view.dtype(first) is not torch.float32:
        return False
    if is_call(node, SPLIT):
        return operand(node, "dim") in (-1, 2)
    if view.rank(node) != 3 or view.dtype(node) is not torch.float32:
        return False
    if is_call(node, LINEAR):
        return view.rank(node.args[1]) == 2
    if is_call(node, PRODUCT_SUM):
        return True
    if node.target in ALONE:
        return all(view.rank(a) < 2 for a in node.all_input_nodes if a is not first)
    if node.target not in TWO or node.kwargs:
        return False
    second = node.args[1]
    return not isinstance(second, fx.Node) or view.rank(second) < 2 or same(view, view.shape(second), view.shape(first))


def _apply(view: FuseView, group: list[fx.Node]) -> None:
    inside = set(group)
    flat: dict[fx.Node, fx.Node] = {}

    def rows(value: Any, reader: fx.Node) -> Any:
        if not isinstance(value, fx.Node) or (value not in flat and view.rank(value) != 3):
            return value
        if value not in flat:
            with view.before(reader):
                flat[value] = view.call(aten.reshape.default, value, [-1, int(view.shape(value)[2])], like=reader)
        return flat[value]

    for node in group:
        args = [rows(a, node) for a in node.args]
        with view.before(node):
            if is_call(node, SPLIT):
                flat[node] = view.call(SPLIT, args[0], args[1], 1, like=node)
                continue
            flat[node] = view.call(node.target, *args, like=node, **node.kwargs)  # type: ignore[arg-type]
            if any(user not in inside for user in node.users):
                whole = _whole(view, flat[node], node)
                node.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in inside)  # type: ignore[misc]
    for node in reversed(group):
        view.graph.graph.erase_node(node)


def _whole(view: FuseView, made: fx.Node, old: fx.Node) -> fx.Node:
    """Rows as sequences again, of the axes that ``old`` has; the sizes are read off an input where one has them."""
    batch, steps, width = view.shape(old)
    if isinstance(steps, int):
        return view.call(aten.reshape.default, made, [-1, steps, int(width)], like=old)
    like = next((p for p in view.placeholders if view.rank(p) >= 2 and same(view, view.shape(p)[:2], (batch, steps))), None)
    if like is None:
        like = _source(view, old)
    return view.call(_OPS.sequences.default, made, like, like=old)


def _source(view: FuseView, node: fx.Node) -> fx.Node:
    """The value in front of the group from which the axes come."""
    while _fits(view, node):
        node = node.args[0]  # type: ignore[assignment]
    return node


RULE = FlatRows()
