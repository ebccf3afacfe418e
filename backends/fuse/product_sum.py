"""A product and the value that is added to it become one operation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import fx

from surgery.backends.fuse import ops_rows, ops_spread  # noqa: F401  (they register the operations)
from surgery.backends.fuse.nodes import is_call, only_user, operand, pair, same
from surgery.backends.fuse.packing import LINEAR
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView, aten

_OPS = torch.ops.surgery


@dataclass
class ProductSum:
    """``x W^T + n`` is Gemm with ``n`` as its third input: the product is summed up on top of the shortcut, which saves a pass over all values. A
    product with a bias of its own has that third input already. Where an RMS norm reads the sum, as in decoders without biases, a product and
    a sum of their own were measured to take no longer, and the changes of axes around a Gemm do."""

    name: str = "product_sum"
    doc: str = "on processors a shortcut is added by the product before it"
    order: int = 420
    targets: frozenset[str] = field(default_factory=lambda: frozenset({ONNX}))

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        if view.target.device != "cpu":
            return
        for node in view.calls(_OPS.total.default, aten.add.Tensor):
            found = _read(view, node)
            if isinstance(found, Miss):
                yield found
            elif found is not None:
                rows, columns = view.shape(found.args[1])
                yield Match(node, lambda n=node, p=found: _apply(view, n, p), f"a product of {rows} by {columns}")  # type: ignore[misc]


def _read(view: FuseView, node: fx.Node) -> fx.Node | Miss | None:
    """The product that can take the other summand; why none can; None where there is no product of a stored weight."""
    parts = list(node.args[:2]) if is_call(node, _OPS.total.default) else list(pair(node, aten.add.Tensor) or ())
    products = [p for p in parts if is_call(p, LINEAR) and isinstance(p, fx.Node) and view.name(p.args[1])]
    if not products or len(parts) < 2 or parts[0] is parts[1]:
        return None
    place = view.where(node)
    if view.target.precision == "int8":
        return Miss(place, "products of integers add nothing to their result")
    if view.dtype(node) is not torch.float32:
        return Miss(place, "it is not computed in float32", str(view.dtype(node)).removeprefix("torch."))
    if view.rank(node) not in (2, 3) or any(not same(view, view.shape(p), view.shape(node)) for p in parts):
        return Miss(place, "the summands have different shapes, or neither two nor three axes")
    bare = [p for p in products if operand(p, "bias") is None]
    if not bare:
        return Miss(place, "the product adds a bias already", products[0].name)
    alone = [p for p in bare if only_user(p) is node]
    if not alone:
        return Miss(place, "something else reads the product", bare[0].name)
    if any(is_call(user, _OPS.spread_norm.default) and not operand(user, "centred") for user in node.users):
        return Miss(place, "the norm behind it is the root of the mean square, where a sum of its own is no slower", alone[0].name)
    if view.is_live(alone[0].args[1]):
        return Miss(place, "a weight stays apart under its own name because it is live", view.name(alone[0].args[1]))
    return alone[0]


def _apply(view: FuseView, node: fx.Node, product: fx.Node) -> None:
    other = next(p for p in node.args[:2] if p is not product)
    with view.before(node):
        made = view.call(_OPS.product_sum.default, product.args[0], product.args[1], other, like=product)
    view.replace(node, made)


RULE = ProductSum()
