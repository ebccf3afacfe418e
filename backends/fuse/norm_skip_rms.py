"""A shortcut and the root-mean-square norm behind it become one operation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse import ops_norm  # noqa: F401  (registers the operations)
from surgery.backends.fuse.nodes import hoist
from surgery.backends.fuse.norm_sum import Sum, half, place, says, sum_before, write
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten


@dataclass(frozen=True)
class SkipRmsNorm:
    """A norm that ``rms_norm`` found and the sum before it are SkipSimplifiedLayerNormalization, bias and kept sum as in
    ``skip_layer_norm``. The gain is cast to the type of the values where it has another."""

    name: str = "skip_rms_norm"
    doc: str = "a shortcut and the root-mean-square norm behind it are one operation"
    order: int = 211
    targets: frozenset[str] = frozenset({ONNX})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        for node in view.calls(torch.ops.surgery.rms_norm.default):
            found = self._read(view, node)
            if isinstance(found, Sum):
                yield Match(node, lambda n=node: self._write(view, n), says(found))  # type: ignore[misc]
            else:
                yield Miss(view.where(node), *found)

    def _read(self, view: FuseView, node: fx.Node) -> Sum | tuple[str, str]:
        if not isinstance(node.args[1], fx.Node):
            return "the norm has no gain", node.name
        return half(view, node) or sum_before(view, node)

    def _write(self, view: FuseView, node: fx.Node) -> None:
        found = self._read(view, node)
        if not isinstance(found, Sum):
            return
        weight: Any = node.args[1]
        if not hoist(view, weight, found.node):
            return
        if view.dtype(weight) != view.dtype(found.x):
            with view.before(found.node):
                weight = view.call(aten.to.dtype, weight, view.dtype(found.x), like=node)
        if place(view, found, weight, found.bias):
            ops = torch.ops.surgery
            write(view, found, node, ops.skip_rms_norm.default, ops.skip_rms_norm_sum.default, weight, found.bias, node.args[2])


RULE = SkipRmsNorm()
