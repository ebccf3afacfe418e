"""Experts that a module stores in two dimensions, ``[experts * units, width]``, are one tensor ``[experts, units, width]``.

Where a graph only reads such a parameter through a view as one matrix for each expert, the view is the tensor's real form. In a program the tensor is
stored so, as in most families, and everything that knows experts knows these too; a plain checkpoint gets back what its class has.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from surgery.model.program import Program
from surgery.model.retarget import graphs_of
from surgery.model.weights import Expr, Load, Reshape

_PRODUCT = torch.ops.surgery.grouped_mm.default
_TURNS = (torch.ops.aten.transpose.int, torch.ops.aten.permute.default)
_VIEWS = (torch.ops.aten.reshape.default, torch.ops.aten.view.default)


def unfold_experts(program: Program) -> dict[str, tuple[int, ...]]:
    """Gives each such parameter its three dimensions, in place; the shapes that they had, by name.

    Left alone are parameters that are read in another way too, or that have several names.
    """
    made: dict[str, tuple[int, ...]] = {}
    named_twice = {*program.aliases, *program.aliases.values()}
    for path, module in graphs_of(program.graph):
        prefix = f"{path}." if path else ""
        changed = False
        for product in module.graph.find_nodes(op="call_function", target=_PRODUCT):
            view = _view(product.args[1])
            if view is None:
                continue
            stored: Any = view.args[0]
            name, shape = prefix + str(stored.target), tuple(view.meta["spec"].shape)
            if name not in program.weights or name in named_twice:
                continue
            before = program.weights[name].shape
            if len(before) != 2 or not all(type(n) is int for n in shape) or before != (shape[0] * shape[1], shape[2]):
                continue
            made[name] = before
            program.weights[name] = reshaped(program.weights[name], shape)
            _replace(module, stored, view)
            changed = True
        if changed:
            module.recompile()
    return made


def reshaped(expr: Expr, shape: tuple[int, ...]) -> Expr:
    """``expr`` with its numbers in their order in another shape. A stored tensor is read in that shape, so that it still flows from file to file."""
    assert math.prod(shape) == math.prod(expr.shape), (shape, expr.shape)
    if shape == expr.shape:
        return expr
    if isinstance(expr, Load):
        return replace(expr, shape=shape)
    return Reshape(shape, expr.dtype, expr)


def _view(matrices: Any) -> fx.Node | None:
    """The view of a parameter as one matrix for each expert behind the second operand of their product; None where there is none."""
    node = matrices
    while isinstance(node, fx.Node) and node.target in _TURNS:
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in _VIEWS or len(getattr(node.meta.get("spec"), "shape", ())) != 3:
        return None
    stored = node.args[0]
    return node if isinstance(stored, fx.Node) and stored.op == "get_attr" and set(stored.users) == {node} else None


def _replace(module: fx.GraphModule, stored: fx.Node, view: fx.Node) -> None:
    path, _, last = str(stored.target).rpartition(".")
    owner = module.get_submodule(path)
    old = owner._parameters[last]
    assert old is not None
    shape = view.meta["spec"].shape
    owner._parameters[last] = nn.Parameter(torch.empty(shape, dtype=old.dtype, device="meta"), requires_grad=old.requires_grad)
    stored.meta = {**stored.meta, **{k: v for k, v in view.meta.items() if k in ("spec", "val")}}
    view.replace_all_uses_with(stored)
    module.graph.erase_node(view)
