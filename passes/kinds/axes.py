"""Which axis of a value carries its features: the last one in transformers, the second one between convolutions."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx, nn

_SECOND = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm)
_LAST = (nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm)
_SECOND_OPS = ("convolution", "conv1d", "conv2d", "conv3d", "batch_norm", "group_norm", "native_group_norm")
_LAST_OPS = ("linear", "addmm", "embedding", "layer_norm", "rms_norm", "native_layer_norm")


def feature_axis(gm: fx.GraphModule, node: fx.Node) -> int:
    """``-1`` or, where the value comes from a convolution or goes into one with its axes in place, the axis from the left.

    Followed back through element-wise operations and permutations to what made the value; for an input of the graph forward
    to what reads it. Where neither says anything it is the last axis, as everywhere in transformers.
    """
    rank = _rank(node)
    if rank < 3:
        return -1
    found = _back(gm, node, rank)
    return -1 if found is None or found == rank - 1 else found


def _rank(node: fx.Node) -> int:
    return len(getattr(node.meta.get("spec"), "shape", ()))


def _back(gm: fx.GraphModule, node: fx.Node, rank: int) -> int | None:
    moves: list[list[int]] = []
    for _ in range(64):
        axis = _made_by(gm, node, rank)
        if axis is None and node.op == "placeholder":
            axis = _read_by(gm, node, rank)
        if axis is not None:
            for move in reversed(moves):  # axis a of a permutation's output is axis move[a] of its input
                axis = move.index(axis)
            return axis
        order = _order(node, rank)
        if order is not None:
            moves.append(order)
        before = _carrier(gm, node)
        if before is None or _rank(before) != rank:
            return None
        node = before
    return None


def _made_by(gm: fx.GraphModule, node: fx.Node, rank: int) -> int | None:
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return 1 if isinstance(module, _SECOND) else rank - 1 if isinstance(module, _LAST) else None
    name = _name(node)
    return 1 if name in _SECOND_OPS else rank - 1 if name in _LAST_OPS else None


def _read_by(gm: fx.GraphModule, node: fx.Node, rank: int) -> int | None:
    """What the first parametric reader of a graph's input expects."""
    for user in node.users:
        axis = _made_by(gm, user, rank)
        if axis is not None and user.all_input_nodes[:1] == [node]:
            return axis
        order = _order(user, rank)
        if order is not None:
            after = _read_by(gm, user, rank)
            if after is not None:
                return order[after]
    return None


def _order(node: fx.Node, rank: int) -> list[int] | None:
    name = _name(node)
    if name == "permute":
        return [int(a) % rank for a in node.args[1]]  # type: ignore[union-attr]
    if name == "transpose":
        order = list(range(rank))
        a, b = (int(x) % rank for x in node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
        return order
    return None


def _carrier(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The input that has the features: what an added module edits, else the first input of full rank."""
    if node.op == "call_module":
        edits = getattr(gm.get_submodule(str(node.target)), "edits", None)
        if isinstance(edits, int):
            return node.args[edits]  # type: ignore[return-value]
    elif node.op != "call_function":
        return None
    same: Callable[[fx.Node], bool] = lambda n: _rank(n) == _rank(node)  # noqa: E731
    return next((n for n in node.all_input_nodes if n.op != "get_attr" and same(n)), None)


def _name(node: fx.Node) -> str:
    if node.op != "call_function":
        return ""
    return str(node.target).removeprefix("aten.").partition(".")[0]
