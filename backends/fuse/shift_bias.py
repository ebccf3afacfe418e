"""The bias of a product moves into the shift of the norm whose value is added to the product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse import ops_attention, ops_spread  # noqa: F401  (they register the operations)
from surgery.backends.fuse.nodes import hoist, is_call, operand, same
from surgery.backends.fuse.packing import LINEAR
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView

_OPS = torch.ops.surgery
NORM, TOTAL, PACKED = _OPS.spread_norm.default, _OPS.total.default, _OPS.packed_attention.default


@dataclass(frozen=True)
class _Place:
    """``x W^T + b`` and a norm's value that are added in ``total``; ``readers``: the products that read the norm's value, too."""

    total: fx.Node
    product: fx.Node
    norm: fx.Node
    readers: tuple[fx.Node, ...]


@dataclass
class ShiftBias:
    """Where a norm stands behind its block, its value ``n`` goes into products and is added to the result of the last of them: ``(x W^T + b) + n``.
    With ``b`` in the shift of the norm the sum needs no bias; the products that read ``n`` get ``c - V b`` instead of their bias ``c``, so that they
    give what they gave. What is left, ``x W^T + (n + b)``, is one operation (see `product_sum`)."""

    name: str = "shift_bias"
    doc: str = "on processors the bias before a shortcut is part of the shift of the norm that the shortcut comes from"
    order: int = 410
    targets: frozenset[str] = field(default_factory=lambda: frozenset({ONNX}))

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        if view.target.device != "cpu":
            return
        for total in view.calls(TOTAL):
            found = _read(view, total)
            if isinstance(found, Miss):
                yield found
            elif found is not None:
                count = len(found.readers)
                yield Match(total, lambda p=found: _apply(view, p), f"{count} product{'' if count == 1 else 's'} beside it")  # type: ignore[misc]


def _read(view: FuseView, total: fx.Node) -> _Place | Miss | None:
    place = view.where(total)
    for product, norm in (total.args[:2], total.args[1::-1]):
        if not is_call(product, LINEAR) or operand(product, "bias") is None or not is_call(norm, NORM):  # type: ignore[arg-type]
            continue
        assert isinstance(product, fx.Node) and isinstance(norm, fx.Node)
        if view.target.precision == "int8":
            return Miss(place, "products of integers add nothing to their result")
        if not operand(norm, "centred"):
            return Miss(place, "the norm has no shift: it is the root of the mean square")
        if len(product.users) > 1:
            return Miss(place, "something else reads the product", product.name)
        if not same(view, view.shape(norm), view.shape(total)) or not same(view, view.shape(product), view.shape(total)):
            return Miss(place, "the summands have different shapes")
        others = [user for user in norm.users if user is not total]
        strange = [u for u in others if not (is_call(u, LINEAR, PACKED) and norm in u.args[:1] and norm not in u.args[1:])]
        if strange or list(total.args[:2]).count(norm) > 1:
            return Miss(place, "the norm is read by something that is no product", strange[0].name if strange else norm.name)
        stored = [operand(product, "bias"), operand(norm, "shift"), *(t for u in others for t in _own(u))]
        for tensor in stored:
            if tensor is None:
                continue
            if not view.name(tensor):
                return Miss(place, "a weight is computed in the graph and not stored", str(tensor))
            if view.is_live(tensor):
                return Miss(place, "a weight stays apart under its own name because it is live", view.name(tensor))
            if view.dtype(tensor) is not torch.float32:
                return Miss(place, "it is not computed in float32", view.name(tensor))
        return _Place(total, product, norm, tuple(others))
    return None


def _own(reader: fx.Node) -> Iterator[Any]:
    yield reader.args[1]
    yield operand(reader, "bias")


def _apply(view: FuseView, place: _Place) -> None:
    bias, shift = operand(place.product, "bias"), operand(place.norm, "shift")
    if not hoist(view, bias, place.norm):
        return
    moved = view.tensor(bias)
    assert moved is not None
    with view.before(place.norm):
        base = view.tensor(shift) if shift is not None else torch.zeros_like(moved)
        assert base is not None
        name = view.name(shift) or f"{view.name(operand(place.norm, 'weight')).rpartition('.')[0]}.bias"
        new = view.packed(f"{name}_shifted", [view.name(shift), view.name(bias)], lambda: base + moved, place.norm)
    _set(place.norm, "shift", new)
    for reader in place.readers:
        _correct(view, reader, moved, view.name(bias))
    _set(place.product, "bias", None)


def _correct(view: FuseView, reader: fx.Node, moved: torch.Tensor, source: str) -> None:
    """Takes off a product what ``moved``, added to its input, adds to its result; summed up in double precision."""
    weight, bias = (view.tensor(t) if t is not None else None for t in _own(reader))
    assert weight is not None
    wide = weight.double().t() if is_call(reader, LINEAR) else weight.double()
    excess = moved.double() @ wide
    base = torch.zeros(1, dtype=torch.float64) if bias is None else bias.double()
    names = [view.name(t) for t in _own(reader)]
    name = names[1] or f"{names[0].rpartition('.')[0]}.bias"
    with view.before(reader):
        new = view.packed(f"{name}_shifted", [*names, source], lambda: (base - excess).to(weight.dtype), reader)
    _set(reader, "bias", new)


def _set(node: fx.Node, name: str, value: Any) -> None:
    """Sets an argument that is given by its place in the schema."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    index = next(i for i, a in enumerate(schema) if a.name == name)
    args = [*node.args, *(a.default_value for a in schema[len(node.args) : index + 1])]
    args[index] = value
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != name}
    node.args = tuple(args)


RULE = ShiftBias()
