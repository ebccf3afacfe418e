"""On processors norms are spread out again, because their one-operation kernels are the slower form there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse import ops_norm, ops_spread  # noqa: F401  (they register the operations)
from surgery.backends.fuse.heads import called
from surgery.backends.fuse.nodes import operand
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView, aten

_OPS = torch.ops.surgery
LAYER = (_OPS.skip_layer_norm.default, _OPS.skip_layer_norm_sum.default)
RMS = (_OPS.skip_rms_norm.default, _OPS.skip_rms_norm_sum.default)


@dataclass
class SpreadNorm:
    """onnxruntime's kernels for layer norms, and for norms with their shortcut, add the numbers of a row one after another on processors; the one
    for an RMS norm alone runs on vector units. So shortcuts are sums again, and a layer norm is the mean taken off and an RMS norm, written as
    a few sums and products of whole rows from which the runtime makes that kernel. Other devices keep the operations that the rules for
    norms made."""

    name: str = "spread_norm"
    doc: str = "on processors norms are sums and products of whole rows, which run on vector units"
    order: int = 400
    targets: frozenset[str] = field(default_factory=lambda: frozenset({ONNX}))

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        if view.target.device != "cpu":
            return
        for node in view.calls(*LAYER, *RMS, _OPS.rms_norm.default, aten.layer_norm.default):
            place = view.where(node)
            if view.dtype(node.args[0]) is not torch.float32:
                yield Miss(place, "it is not computed in float32", str(view.dtype(node.args[0])).removeprefix("torch."))
            elif called(node, aten.layer_norm.default) and len(operand(node, "normalized_shape")) != 1:
                yield Miss(place, "it is over more than the last axis", f"{len(operand(node, 'normalized_shape'))} axes")
            else:
                yield Match(node, lambda n=node: _apply(view, n), f"rows of {view.shape(node.args[0])[-1]}")  # type: ignore[misc]


def _apply(view: FuseView, node: fx.Node) -> None:
    centred = called(node, *LAYER, aten.layer_norm.default)
    weight, eps = operand(node, "weight"), operand(node, "eps")
    with view.before(node):
        total, shift = node.args[0], None
        if called(node, aten.layer_norm.default):
            shift = operand(node, "bias")
        elif called(node, *LAYER):
            shift = operand(node, "shift")
        if called(node, *LAYER, *RMS):
            for added in (operand(node, "bias"), operand(node, "skip")):
                if added is not None:
                    total = view.call(aten.add.Tensor, total, added, like=node)
        out = view.call(_OPS.spread_norm.default, total, weight, shift, float(eps), centred, like=node)
    if not called(node, LAYER[1], RMS[1]):
        view.replace(node, out)
        return
    values: tuple[Any, Any] = (out, total)
    for user in list(node.users):
        user.replace_all_uses_with(values[user.args[1]])  # type: ignore[index]
        view.graph.graph.erase_node(user)
    view.drop(node)


RULE = SpreadNorm()
