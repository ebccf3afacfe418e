"""The same operation on the same arguments is computed once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse.nodes import pure, written
from surgery.backends.fuse.rule import ONNX, PT2, Match, Miss
from surgery.backends.fuse.view import FuseView


@dataclass(frozen=True)
class Common:
    """Two calls of one operation with equal arguments are one; that their arguments are equal may follow from the same. Random operations and
    memory that is written in place are left alone."""

    name: str = "common_subexpressions"
    doc: str = "an operation that is there twice with the same arguments is computed once"
    order: int = 40
    targets: frozenset[str] = frozenset({ONNX, PT2})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        pinned = written(view)
        first: dict[fx.Node, fx.Node] = {}  # every node to the one that stands for it
        known: dict[Any, fx.Node] = {}
        for node in view.nodes:
            if node in pinned:
                continue
            if node.op == "get_attr":
                key: Any = ("tensor", id(view.attribute(str(node.target))))  # tied names are one tensor
            elif pure(node):
                key = (node.target, _key(node.args, first), _key(node.kwargs, first))
            else:
                continue
            other = known.setdefault(key, node)
            if other is node:
                continue
            first[node] = other
            if node.op == "call_function" and str(node.target) != "aten.sym_size.int":
                yield Match(node, lambda n=node, o=other: _merge(view, n, o), f"one with {other.name}")  # type: ignore[misc]


def _merge(view: FuseView, node: fx.Node, other: fx.Node) -> None:
    if not other._erased:
        view.replace(node, other)


def _key(value: Any, first: dict[fx.Node, fx.Node]) -> Any:
    """A value to be compared: nodes by what stands for them, everything else with its type, so that 1, 1.0 and True stay apart."""
    if isinstance(value, fx.Node):
        return first.get(value, value)
    if isinstance(value, (list, tuple)):
        return ("list", *(_key(v, first) for v in value))
    if isinstance(value, dict):
        return ("dict", *((k, _key(value[k], first)) for k in sorted(value)))
    if isinstance(value, slice):
        return ("slice", *(_key(v, first) for v in (value.start, value.stop, value.step)))
    if isinstance(value, float):
        return ("float", value.hex())
    if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
        return str(value)
    return (type(value).__name__, value)


RULE = Common()
