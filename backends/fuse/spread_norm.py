"""On processors norms are spread out again, because their one-operation kernels are the slower form there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse import ops_norm, ops_spread  # noqa: F401  (they register the operations)
from surgery.backends.fuse.heads import called
from surgery.backends.fuse.nodes import operand, pair
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView, aten

_OPS = torch.ops.surgery
LAYER = (_OPS.skip_layer_norm.default, _OPS.skip_layer_norm_sum.default)
RMS = (_OPS.skip_rms_norm.default, _OPS.skip_rms_norm_sum.default)


@dataclass
class SpreadNorm:
    """onnxruntime's kernels for norms with their shortcut add the numbers of a row one after another on processors; those for a norm alone run on
    vector units. So shortcuts are sums again, the bias goes back to its product, and the sum is spelled so that the runtime does not put it
    together with the norm by itself. Other devices keep the operations that the rules for norms made."""

    name: str = "spread_norm"
    doc: str = "on processors norms and the sums before them are operations of their own, which run on vector units"
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
            total = view.call(_OPS.total.default, _biased(view, total, operand(node, "bias")), operand(node, "skip"), like=node)
        elif (parts := pair(total, aten.add.Tensor)) is not None:
            total = _respelled(view, total, parts)
        out = view.call(_OPS.spread_norm.default, total, weight, shift, float(eps), centred, like=node)
    if not called(node, LAYER[1], RMS[1]):
        view.replace(node, out)
        return
    values: tuple[Any, Any] = (out, total)
    for user in list(node.users):
        user.replace_all_uses_with(values[user.args[1]])  # type: ignore[index]
        view.graph.graph.erase_node(user)
    view.drop(node)


def _biased(view: FuseView, x: Any, bias: Any) -> Any:
    """``x + bias``, added by the product that ``x`` is where nobody else reads it."""
    if bias is None:
        return x
    if called(x, aten.linear.default) and operand(x, "bias") is None and len(x.users) == 1:
        return view.call(aten.linear.default, *x.args[:2], bias, like=x)
    return view.call(aten.add.Tensor, x, bias, like=x)


def _respelled(view: FuseView, total: Any, parts: tuple[fx.Node, fx.Node]) -> Any:
    """A sum that the norm reads as it is: for all its readers, so that it is made once."""
    with view.before(total):
        made = view.call(_OPS.total.default, *parts, like=total)
    total.replace_all_uses_with(made)
    return made


RULE = SpreadNorm()
