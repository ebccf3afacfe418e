"""Folding a parallel bottleneck into the feed-forward block beside it, by making that block wider.

With the same input and the same activation ``f``, ``W2 f(W1 x + b1) + b2 + s (U f(D x + d) + u)`` is a feed-forward block with
``W1' = [W1; D]``, ``b1' = [b1; d]``, ``W2' = [W2, s U]``, ``b2' = b2 + s u``: exact.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from surgery.core.site import Site
from surgery.model import masked
from surgery.model.program import Attachment, Program, ValueSpec
from surgery.model.weights import Add, Apply, Cast, Concat, Expr, Init, Scale
from surgery.passes.kinds import attach
from surgery.passes.kinds.calls import calls_of, operand
from surgery.passes.operation import Resolved

_ACTIVATIONS = {"relu": "relu", "silu": "silu", "tanh": "tanh"}


def widen(program: Program, a: Attachment, op: Resolved) -> str:
    """Fold ``a`` by widening; returns why that is not possible (then nothing was changed), else an empty text."""
    module = program.module(a.module)
    branch: dict[str, Any] | None = getattr(module.method, "branch", lambda site: None)(module.site)
    if module.site.place != "beside" or branch is None:
        return f"only a plain {a.method.name} beside a feed-forward block widens that block"
    parts = {s.role.removeprefix(a.site.role + "."): s for s in program.anatomy.sites if s.role.startswith(a.site.role + ".")}
    up, down = parts.get("up"), parts.get("down")
    if up is None or down is None or "gate" in parts:
        return "it is not beside a plain feed-forward block (up, activation, down)"
    if any(s.op != "linear" or s.rows or len(s.calls) != 1 for s in (up, down)):
        return "the block's projections are not plain linear modules"
    if any(other.site.weight in (up.weight, down.weight) for other in program.attachments if other.site.weight):
        return "other adapters stand on the block's projections; fold them first"
    (graph, first), (other_graph, last) = calls_of(program, up)[0], calls_of(program, down)[0]
    gm = program.module(graph)
    if graph != other_graph or first.op != "call_module" or last.op != "call_module":
        return "the block's projections are not plain linear modules"
    node = program.node(a.node)
    if node.graph is not first.graph or node.args[0] is not operand(first):
        return "it does not see the same input as the block"
    between = path_between(gm, first, last)
    if between is None or activation_of(gm, between) != branch["activation"]:
        return f"its activation {branch['activation']} is not the block's"
    if not _same_output(node, last, gm):
        return "something stands between the block and the place where it adds"
    _widen(program, a, op, graph, up, down, [first, *between], branch)
    return ""


def path_between(gm: fx.GraphModule, first: fx.Node, last: fx.Node) -> list[fx.Node] | None:
    """The nodes from ``first`` (excluded) to ``last`` (excluded) when each has one use and one input, else None."""
    path: list[fx.Node] = []
    node = first
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node is last:
            return path
        if len(node.all_input_nodes) != 1:
            return None
        path.append(node)
    return None


def activation_of(gm: fx.GraphModule, path: list[fx.Node]) -> str:
    """The activation that the path computes (dropout beside it does not count), or an empty text."""
    found = []
    for node in path:
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            if isinstance(module, (nn.Dropout, nn.Identity)):
                continue
            return ""
        name = str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_")
        if name == "gelu":
            found.append("gelu_tanh" if node.kwargs.get("approximate", *node.args[1:2] or ("none",)) == "tanh" else "gelu")
        elif name in _ACTIVATIONS:
            found.append(_ACTIVATIONS[name])
        elif name != "dropout":
            return ""
    return found[0] if len(found) == 1 else "" if found else "identity"


def _same_output(node: fx.Node, last: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether the value that ``node`` edits is the down projection's output, dropout and other insertions apart."""
    value = node.args[1]
    while isinstance(value, fx.Node) and value is not last:
        if value.op != "call_module":
            return False
        module = gm.get_submodule(str(value.target))
        if isinstance(module, (nn.Dropout, nn.Identity)):
            value = value.args[0]
        elif getattr(module, "edits", None) == 1:
            value = value.args[1]
        else:
            return False
    return value is last


def _widen(
    program: Program, a: Attachment, op: Resolved, graph: str, up: Site, down: Site, inner: list[fx.Node], branch: dict[str, Any]
) -> None:
    weights, width = program.weights, branch["width"]

    def like(name: str, part: str) -> Expr:
        expr = weights[attach.join(a.module, part)]
        return expr if expr.dtype == weights[name].dtype else Cast(expr.shape, weights[name].dtype, expr)

    def scaled(expr: Expr) -> Expr:
        learned = weights.get(attach.join(a.module, "scale"))
        if learned is not None:
            return Apply(expr.shape, expr.dtype, f"{a.method.verb}/{a.method.name}:times", (expr, learned))
        return expr if branch["scale"] == 1 else Scale(expr.shape, expr.dtype, expr, float(branch["scale"]))

    up_weight, down_weight = weights[up.weight], weights[down.weight]
    ff, hidden = up_weight.shape
    new: dict[str, Expr] = {
        up.weight: Concat((ff + width, hidden), up_weight.dtype, (up_weight, like(up.weight, "down_weight")), 0),
        down.weight: Concat(
            (down_weight.shape[0], ff + width), down_weight.dtype, (down_weight, scaled(like(down.weight, "up_weight"))), 1
        ),
    }
    up_bias, down_bias = up.bias or up.weight[: -len("weight")] + "bias", down.bias or down.weight[: -len("weight")] + "bias"
    zero = Init((ff,), up_weight.dtype, "zeros")
    new[up_bias] = Concat((ff + width,), up_weight.dtype, (weights.get(up_bias, zero), like(up.weight, "down_bias")), 0)
    shift = scaled(like(down.weight, "up_bias"))
    old = weights.get(down_bias)
    new[down_bias] = shift if old is None else Add(shift.shape, old.dtype, (old, shift))
    for name, expr in new.items():
        if name not in weights:
            program.frozen.add(name)
        weights[name] = expr
        program.journal.fold(name, a.origin, op.origin)
    masked.reshape_mask(program, up.weight, lambda keep: _longer(keep, width, 0))
    masked.reshape_mask(program, down.weight, lambda keep: _longer(keep, width, 1))
    for name in (up.weight, down.weight):
        _replace_linear(program, name.rpartition(".")[0], weights[name].shape)
    attach.detach(program, a)
    for node in inner:
        spec = node.meta.get("spec")
        if isinstance(spec, ValueSpec):
            node.meta["spec"] = replace(spec, shape=(*spec.shape[:-1], ff + width))
    program.touch()


def _longer(keep: Expr, width: int, axis: int) -> Expr:
    """A mask of a weight that became longer: nothing of what was added is masked."""
    shape = list(keep.shape)
    more = Init((*shape[:axis], width, *shape[axis + 1 :]), "bool", "ones")
    shape[axis] += width
    return Concat(tuple(shape), "bool", (keep, more), axis)


def _replace_linear(program: Program, path: str, shape: tuple[int, ...]) -> None:
    parent, _, leaf = path.rpartition(".")
    old = program.module(path)
    made = nn.Linear(shape[1], shape[0], bias=True, device="meta", dtype=old.weight.dtype)
    made.train(old.training)
    for name, child in old.named_children():
        made.add_module(name, child)
    for parameter in made.parameters():
        parameter.requires_grad_(old.weight.requires_grad)
    setattr(program.module(parent), leaf, made)
    assert isinstance(made.weight, torch.Tensor)
