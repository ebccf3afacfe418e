"""On processors the bias before a GELU is added by the product again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from surgery.backends.fuse import ops_activation  # noqa: F401  (it registers the operation)
from surgery.backends.fuse.nodes import is_call, only_user, operand
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView, aten

GELU = torch.ops.surgery.bias_gelu.default


@dataclass
class SpreadGelu:
    """onnxruntime's BiasGelu and FastGelu go over their values once more to add the bias. A product with a third input adds it while it sums up,
    and the GELU alone is the faster kernel. Other devices keep what the rule `bias_gelu` made."""

    name: str = "spread_gelu"
    doc: str = "on processors the bias before a GELU is part of the product"
    order: int = 405
    targets: frozenset[str] = field(default_factory=lambda: frozenset({ONNX}))

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        if view.target.device != "cpu":
            return
        for node in view.calls(GELU):
            if operand(node, "bias") is None:
                continue
            product = node.args[0]
            if view.target.precision == "int8":
                yield Miss(view.where(node), "products of integers add nothing to their result")
            elif view.dtype(node) is not torch.float32:
                yield Miss(view.where(node), "it is not computed in float32", str(view.dtype(node)).removeprefix("torch."))
            elif not is_call(product, aten.linear.default) or operand(product, "bias") is not None or only_user(product) is None:  # type: ignore[arg-type]
                yield Miss(view.where(node), "the value is no product without a bias that is read here alone")
            else:
                yield Match(node, lambda n=node: _apply(view, n), f"a bias of {view.shape(operand(node, 'bias'))[0]}")  # type: ignore[misc]


def _apply(view: FuseView, node: fx.Node) -> None:
    product: fx.Node = node.args[0]  # type: ignore[assignment]
    how = str(operand(node, "approximate"))
    with view.before(node):
        biased = view.call(aten.linear.default, *product.args[:2], operand(node, "bias"), like=product)
        out = view.call(GELU, biased, None, how, like=node) if how == "tanh" else view.call(aten.gelu.default, biased, like=node)
    view.replace(node, out)


RULE = SpreadGelu()
