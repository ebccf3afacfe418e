"""Several products of one value become one product with the rows of all: what the packing rules share."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten
LINEAR = aten.linear.default


@dataclass(frozen=True)
class Product:
    """``x W^T + b``: the call and its parts. ``bias`` is None where there is none."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None


def product(node: fx.Node) -> Product | None:
    """A call of ``linear`` taken apart, None for anything else."""
    if node.op != "call_function" or node.target is not LINEAR:
        return None
    x, weight = node.args[:2]
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    return Product(node, x, weight, bias if isinstance(bias, fx.Node) else None)


def obstacle(view: FuseView, parts: Sequence[Product]) -> tuple[str, str] | None:
    """The first condition under which these products cannot be one, with its detail; None when they can."""
    for part in parts:
        for tensor in (part.weight, part.bias):
            if tensor is None:
                continue
            name = view.name(tensor)
            if not name:
                return "a weight is computed in the graph and not stored", str(tensor.name)
            if view.is_live(tensor):
                return "a weight stays apart under its own name because it is live", name
    if len({view.dtype(p.weight) for p in parts}) > 1:
        return "the weights have different types", ", ".join(str(view.dtype(p.weight)).removeprefix("torch.") for p in parts)
    if len({p.node for p in parts}) < len(parts) or len({view.name(p.weight) for p in parts}) < len(parts):
        return "two of the products read one weight", view.name(parts[0].weight)
    return None


def pack(view: FuseView, parts: Sequence[Product], label: str) -> None:
    """Replaces the products by one on a new parameter ``<common path>.<label>.weight [sum of rows, in]`` and slices of its result."""
    first = min(parts, key=_position)
    names = [view.name(p.weight) for p in parts]
    base = ".".join([*common_path(names), label])
    rows = [int(view.shape(p.weight)[0]) for p in parts]
    weights = [view.attribute(n).detach() for n in names]
    with view.before(first.node):
        weight = view.packed(f"{base}.weight", names, lambda: torch.cat(weights), first.node)
        bias = None
        if any(p.bias is not None for p in parts):
            biases = [
                view.attribute(view.name(p.bias)).detach() if p.bias is not None else w.new_zeros(w.shape[0])
                for p, w in zip(parts, weights, strict=True)
            ]
            bias = view.packed(f"{base}.bias", names, lambda: torch.cat(biases), first.node)
        whole = view.call(LINEAR, first.x, weight, bias, like=first.node)
        split = view.call(aten.split_with_sizes.default, whole, rows, -1, like=first.node)
        slices = [view.call(operator.getitem, split, i, like=p.node) for i, p in enumerate(parts)]
    for part, value in zip(parts, slices, strict=True):
        view.replace(part.node, value)


def common_path(names: Sequence[str]) -> list[str]:
    """The parts that dotted names share at the front, without the last two of any (the module and the leaf)."""
    paths = [n.split(".")[:-2] for n in names]
    shared = []
    for column in zip(*paths, strict=False):
        if len(set(column)) > 1:
            break
        shared.append(column[0])
    return shared


def _position(part: Product) -> int:
    graph = part.node.graph
    return next(i for i, n in enumerate(graph.nodes) if n is part.node)


def nearest(node: fx.Node, stop: frozenset[object]) -> list[fx.Node]:
    """The nodes whose target is in ``stop`` that are met first on the ways back from a node, in the order of the graph's arguments.
    The way ends there and at inputs; ``node`` itself counts."""
    return list(_nearest(node, stop, set()))


def _nearest(node: fx.Node, stop: frozenset[object], seen: set[fx.Node]) -> Iterator[fx.Node]:
    if node in seen:
        return
    seen.add(node)
    if node.op == "call_function" and node.target in stop:
        yield node
        return
    for above in node.all_input_nodes:
        yield from _nearest(above, stop, seen)
