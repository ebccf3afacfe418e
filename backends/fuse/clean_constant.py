"""What depends on no input becomes a constant."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from surgery.backends.fuse.nodes import RESHAPES, is_call, pure, stored, written
from surgery.backends.fuse.rule import ONNX, PT2, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten

LARGEST = 1 << 20
"""Bytes of a constant above what it is computed from: more is computed again in every run instead of being stored."""

_FREE = RESHAPES | {aten.transpose.int, aten.t.default, aten.permute.default, aten.slice.Tensor, aten.to.dtype, aten.expand.default}
"""Operations on a weight that are not worth a remark."""


@dataclass(frozen=True)
class Constants:
    """Computed once are operations whose arguments are numbers, buffers and other constants: ranges of fixed length, tables of frequencies,
    masks of a fixed size. A range of the length of the input is no constant. What is computed from a parameter is left to the runtime, which
    does it when it loads the graph: the parameter keeps its name."""

    name: str = "fold_constants"
    doc: str = "what depends on no input is computed once and stored"
    order: int = 30
    targets: frozenset[str] = frozenset({ONNX, PT2})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        pinned = written(view)
        fixed: dict[fx.Node, set[str]] = {}  # constant nodes, with the parameters that they are computed from
        for node in view.nodes:
            if node.op == "get_attr":
                fixed[node] = {view.name(node)} if view.is_parameter(node) or view.is_live(node) else set()
            elif node not in pinned and pure(node) and isinstance(view.fake(node), Tensor) and _closed(node, fixed):
                if all(isinstance(size, int) for size in view.shape(node)):
                    fixed[node] = set().union(*(fixed[above] for above in node.all_input_nodes))
        for node, parameters in fixed.items():
            if node.op == "get_attr" or all(user in fixed for user in node.users):
                continue  # a step on the way to a larger constant
            if parameters:
                if not is_call(node, *_FREE):
                    yield Miss(view.where(node), "it is computed from a parameter, which keeps its name", ", ".join(sorted(parameters)))
                continue
            size, given = _bytes(view, node), sum(_bytes(view, above) for above in _sources(node))
            if size > given + LARGEST:
                yield Miss(view.where(node), "the constant would be large", f"{size} bytes from {given}")
                continue
            yield Match(node, lambda n=node: _store(view, n), f"a constant of shape {list(view.shape(node))}")  # type: ignore[misc]


def _closed(node: fx.Node, fixed: dict[fx.Node, set[str]]) -> bool:
    return all(above in fixed for above in node.all_input_nodes)


def _sources(node: fx.Node) -> list[fx.Node]:
    """The stored tensors that a node is computed from."""
    found: dict[fx.Node, None] = {}
    queue, seen = [node], {node}
    while queue:
        for above in queue.pop().all_input_nodes:
            if above.op == "get_attr":
                found[above] = None
            elif above not in seen:
                seen.add(above)
                queue.append(above)
    return list(found)


def _bytes(view: FuseView, node: fx.Node) -> int:
    value = view.fake(node)
    return int(value.numel() * value.element_size()) if isinstance(value, Tensor) else 0


def _store(view: FuseView, node: fx.Node) -> None:
    value = evaluate(view, node, {})
    with view.before(node):
        view.replace(node, stored(view, f"constant_{node.name}", value.detach().clone().contiguous(), node))


def evaluate(view: FuseView, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """The value of a node that depends on no input."""
    if node in known:
        return known[node]
    if node.op == "get_attr":
        value: Any = view.tensor(node)
    else:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: evaluate(view, n, known))
        with torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    known[node] = value
    return value


RULE = Constants()
