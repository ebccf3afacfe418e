"""A norm of a sum: what the two rules of norms behind a shortcut share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse.nodes import hoist, is_call, operand, pair, same
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten


@dataclass(frozen=True)
class Sum:
    """``x + skip + bias``: ``bias`` comes out of the product that ``x`` is and is None where that has none. ``kept``: somebody else reads
    the sum."""

    node: fx.Node
    x: fx.Node
    skip: fx.Node
    bias: fx.Node | None
    kept: bool


def sum_before(view: FuseView, norm: fx.Node) -> Sum | tuple[str, str]:
    """The sum that a norm reads, or the first condition that fails, with its detail."""
    node: Any = norm.args[0]
    parts = pair(node, aten.add.Tensor)
    if parts is None:
        return "the norm reads no sum of two values", node.name
    if view.rank(node) not in (2, 3):
        return "the values have neither two nor three axes", str([str(s) for s in view.shape(node)])
    if any(view.dtype(p) != view.dtype(node) for p in parts):
        return "a summand has another type than the sum", ", ".join(str(view.dtype(p)).removeprefix("torch.") for p in parts)
    x, skip = parts
    if not same(view, view.shape(x), view.shape(node)):
        x, skip = skip, x
    if not same(view, view.shape(x), view.shape(node)):
        return "no summand has the shape of the sum", node.name
    if not _spread(view, skip, node):
        return "the other summand is spread over more than the batch", str([str(s) for s in view.shape(skip)])
    bias = _bias(view, x)
    if bias is None and same(view, view.shape(skip), view.shape(node)) and _bias(view, skip) is not None:
        x, skip = skip, x
        bias = _bias(view, x)
    return Sum(node, x, skip, bias, len(node.users) > 1)


def _spread(view: FuseView, skip: fx.Node, total: fx.Node) -> bool:
    """Whether the kernel can add this summand: the shape of the sum, or for every batch the same."""
    own, wanted = view.shape(skip), view.shape(total)
    if same(view, own, wanted):
        return True
    return len(wanted) == 3 and len(own) == 3 and own[0] == 1 and same(view, own[1:], wanted[1:])


def _bias(view: FuseView, x: fx.Node) -> fx.Node | None:
    """The stored bias of a product that only the sum reads; it may be added in the norm instead."""
    if not is_call(x, aten.linear.default) or len(x.users) > 1:
        return None
    bias = operand(x, "bias")
    return bias if view.name(bias) and view.dtype(bias) == view.dtype(x) else None


def place(view: FuseView, found: Sum, *needed: fx.Node | None) -> bool:
    """Makes sure that what the fused operation reads stands before the sum; False when that cannot be."""
    return all(hoist(view, n, found.node) for n in needed if n is not None)


def unbiased(view: FuseView, found: Sum) -> fx.Node:
    """``x`` without its bias."""
    if found.bias is None:
        return found.x
    with view.before(found.x):
        return view.call(aten.linear.default, *found.x.args[:2], None, like=found.x)


def write(view: FuseView, found: Sum, norm: fx.Node, alone: Any, both: Any, *rest: Any) -> None:
    """Replaces the sum and its norm by ``alone(x, skip, *rest)``, or by ``both``, which gives the sum, too."""
    x = unbiased(view, found)
    with view.before(found.node):
        if not found.kept:
            view.replace(norm, view.call(alone, x, found.skip, *rest, like=norm))
            return
        made = view.call(both, x, found.skip, *rest, like=norm)
        normed, total = view.item(made, 0, like=norm), view.item(made, 1, like=found.node)
    view.replace(norm, normed)
    found.node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    view.drop(found.node)


def says(found: Sum) -> str:
    """What the place becomes, in words."""
    return f"sum{' with bias' if found.bias is not None else ''} and norm{', the sum kept' if found.kept else ''}"


def half(view: FuseView, node: fx.Node) -> tuple[str, str] | None:
    """The condition on the type of the value that the kernels put."""
    dtype = view.dtype(node)
    if dtype in (torch.float32, torch.float16):
        return None
    return "the runtime has no kernel for this type", str(dtype).removeprefix("torch.")
