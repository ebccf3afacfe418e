"""The bias of a product and the GELU behind it become one operation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from surgery.backends.fuse import ops_activation  # noqa: F401  (registers the operations)
from surgery.backends.fuse.nodes import RESHAPES, hoist, is_call, operand
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten


@dataclass(frozen=True)
class BiasGelu:
    """``gelu(x W^T + b)``: the product loses its bias, and BiasGelu (for the form by tanh FastGelu) adds it. A product of two axes that adds its
    bias itself, as of a transposed weight, keeps it: there is nothing to gain."""

    name: str = "bias_gelu"
    doc: str = "the bias of a product and the GELU behind it are one operation"
    order: int = 220
    targets: frozenset[str] = frozenset({ONNX})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        for node in view.calls(aten.gelu.default):
            why = self._obstacle(view, node)
            if why is not None and self._alone(view, node):
                yield Match(node, lambda n=node: self._write_alone(view, n), "GELU by tanh, no bias to add")  # type: ignore[misc]
                continue
            if why is not None:
                yield Miss(view.where(node), *why)
                continue
            yield Match(node, lambda n=node: self._write(view, n), f"bias and GELU{self._by(node)}")  # type: ignore[misc]

    @staticmethod
    def _alone(view: FuseView, node: fx.Node) -> bool:
        """Whether FastGelu is better than the operator Gelu even without a bias: before operator set 20, and in half precision, the
        operator is written out in single operations."""
        return operand(node, "approximate") == "tanh" and (view.target.opset < 20 or view.dtype(node) is torch.float16)

    @staticmethod
    def _write_alone(view: FuseView, node: fx.Node) -> None:
        with view.before(node):
            made = view.call(torch.ops.surgery.bias_gelu.default, node.args[0], None, "tanh", like=node)
        view.replace(node, made)

    @staticmethod
    def _by(node: fx.Node) -> str:
        return " by tanh" if operand(node, "approximate") == "tanh" else ""

    @staticmethod
    def _obstacle(view: FuseView, node: fx.Node) -> tuple[str, str] | None:
        product = node.args[0]
        while is_call(product, *RESHAPES):
            product = product.args[0]  # type: ignore[union-attr]
        if is_call(product, aten.addmm.default):
            return "the product adds its bias itself", product.name  # type: ignore[union-attr]
        product = node.args[0]
        if not is_call(product, aten.linear.default):
            return "the value is no product", getattr(product, "name", str(product))
        if len(product.users) > 1:  # type: ignore[union-attr]
            return "something else reads the product, too", product.name  # type: ignore[union-attr]
        bias = operand(product, "bias")  # type: ignore[arg-type]
        if bias is None:
            return "the product has no bias", product.name  # type: ignore[union-attr]
        if not view.name(bias) or view.dtype(bias) != view.dtype(product):
            return "the bias is not stored, or of another type", bias.name
        if view.dtype(node) not in (torch.float32, torch.float16):
            return "the runtime has no kernel for this type", str(view.dtype(node)).removeprefix("torch.")
        return None

    def _write(self, view: FuseView, node: fx.Node) -> None:
        if self._obstacle(view, node) is not None:
            return
        product: fx.Node = node.args[0]  # type: ignore[assignment]
        bias = operand(product, "bias")
        if not hoist(view, bias, node):
            return
        with view.before(node):
            plain = view.call(aten.linear.default, *product.args[:2], None, like=product)
            made = view.call(torch.ops.surgery.bias_gelu.default, plain, bias, operand(node, "approximate"), like=node)
        view.replace(node, made)


RULE = BiasGelu()
