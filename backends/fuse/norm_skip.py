"""A shortcut and the layer norm behind it become one operation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from surgery.backends.fuse import ops_norm  # noqa: F401  (registers the operations)
from surgery.backends.fuse.nodes import operand
from surgery.backends.fuse.norm_sum import Sum, half, place, says, sum_before, write
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten


@dataclass(frozen=True)
class SkipLayerNorm:
    """``LayerNorm(x + skip)`` is SkipLayerNormalization. When ``x`` is a product, its bias is added there, too; a sum that is read later as
    well (norms in front of their blocks) is the operation's second result."""

    name: str = "skip_layer_norm"
    doc: str = "a shortcut, the bias before it and the layer norm behind it are one operation"
    order: int = 210
    targets: frozenset[str] = frozenset({ONNX})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        for node in view.calls(aten.layer_norm.default):
            found = self._read(view, node)
            if isinstance(found, Sum):
                yield Match(node, lambda n=node: self._write(view, n), says(found))  # type: ignore[misc]
            else:
                yield Miss(view.where(node), *found)

    def _read(self, view: FuseView, node: fx.Node) -> Sum | tuple[str, str]:
        shape = operand(node, "normalized_shape")
        if len(shape) != 1:
            return "the norm is not over the last axis alone", f"axes of sizes {list(shape)}"
        if not isinstance(operand(node, "weight"), fx.Node):
            return "the norm has no gain", node.name
        return half(view, node) or sum_before(view, node)

    def _write(self, view: FuseView, node: fx.Node) -> None:
        found = self._read(view, node)
        if not isinstance(found, Sum):
            return
        weight, shift = operand(node, "weight"), operand(node, "bias")
        if place(view, found, weight, shift, found.bias):
            ops = torch.ops.surgery
            alone, both = ops.skip_layer_norm.default, ops.skip_layer_norm_sum.default
            write(view, found, node, alone, both, weight, shift, found.bias, operand(node, "eps"))


RULE = SkipLayerNorm()
