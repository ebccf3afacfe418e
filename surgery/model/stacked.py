"""Parameters that a graph only reads stacked are one parameter.

A model may hold the matrices of its experts one by one where the capture multiplies with all of them at once. In a program such a stack is
one stored tensor ``[experts, ...]``, as most families hold it, so that everything that knows experts knows these too; its expression stacks
what the checkpoint has.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx, nn

from surgery.model.program import Program
from surgery.model.retarget import graphs_of
from surgery.model.weights import Stack


def fuse_stacked(program: Program) -> dict[str, tuple[str, ...]]:
    """Makes one parameter of each stack, in place; the new names with those that they replace, in order.

    ``experts.expert_0.wi.weight``, ``experts.expert_1.wi.weight`` ... become ``experts.wi.weight``. Stacks of parameters that are read
    elsewhere too, that are tied, or whose names do not count up in one place stay operations.
    """
    made: dict[str, tuple[str, ...]] = {}
    for path, module in graphs_of(program.graph):
        for node in [n for n in module.graph.nodes if n.target is torch.ops.aten.stack.default]:
            parts = _parts(node)
            name = _joined([str(p.target) for p in parts])
            prefix = f"{path}." if path else ""
            members = tuple(prefix + str(p.target) for p in parts)
            taken = {*program.weights, *program.aliases, *program.aliases.values()}
            if not name or prefix + name in taken or any(m in program.aliases or m in program.aliases.values() for m in members):
                continue
            if not all(m in program.weights for m in members):
                continue
            _replace(module, node, parts, name)
            made[prefix + name] = members
    if made:
        _restack(program, made)
    return made


def _parts(node: fx.Node) -> list[fx.Node]:
    """The parameters of a stack along a new first axis, each of which nothing else reads; none where it is another stack."""
    given = node.args[0]
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parts = [p for p in given if isinstance(p, fx.Node)] if isinstance(given, (list, tuple)) else []
    if axis != 0 or len(parts) < 2 or any(p.op != "get_attr" or set(p.users) != {node} for p in parts):
        return []
    return parts


def _joined(names: list[str]) -> str:
    """``a.b_0.c``, ``a.b_1.c`` ... as ``a.c``; empty where the names are not those of numbered parts in one place."""
    split = [n.split(".") for n in names]
    if not split or len({len(s) for s in split}) != 1:
        return ""
    different = [i for i, words in enumerate(zip(*split, strict=True)) if len(set(words)) > 1]
    if len(different) != 1 or different[0] == len(split[0]) - 1:
        return ""
    found = [re.fullmatch(r"(\D*)(\d+)", s[different[0]]) for s in split]
    if any(m is None for m in found) or len({m[1] for m in found if m}) != 1 or [int(m[2]) for m in found if m] != list(range(len(names))):
        return ""
    return ".".join(w for i, w in enumerate(split[0]) if i != different[0])


def _replace(module: fx.GraphModule, node: fx.Node, parts: list[fx.Node], name: str) -> None:
    first = _tensor(module, str(parts[0].target))
    whole = nn.Parameter(
        torch.empty(len(parts), *first.shape, dtype=first.dtype, device="meta"), requires_grad=bool(first.requires_grad)
    )  # fmt: skip
    owner: Any = module
    *steps, last = name.split(".")
    for step in steps:
        if step not in owner._modules:
            owner._modules[step] = nn.Module()
        owner = owner._modules[step]
    owner._parameters[last] = whole
    with module.graph.inserting_before(node):
        new = module.graph.create_node("get_attr", name)
    new.meta = {**parts[0].meta, **{k: v for k, v in node.meta.items() if k in ("spec", "val")}}
    node.replace_all_uses_with(new)
    module.graph.erase_node(node)
    for part in parts:
        module.graph.erase_node(part)
        _remove(module, str(part.target))
    module.recompile()


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    path, _, last = name.rpartition(".")
    return module.get_submodule(path)._parameters[last]  # type: ignore[return-value]


def _remove(module: nn.Module, name: str) -> None:
    """A parameter, and the modules around it that hold nothing else."""
    path, _, last = name.rpartition(".")
    del module.get_submodule(path)._parameters[last]
    while path:
        own = module.get_submodule(path)
        if type(own) is not nn.Module or own._parameters or own._buffers or own._modules:
            return
        path, _, last = path.rpartition(".")
        del module.get_submodule(path)._modules[last]


def _restack(program: Program, made: dict[str, tuple[str, ...]]) -> None:
    """The expressions of the new parameters, each in the place of its first member."""
    first = {members[0]: name for name, members in made.items()}
    gone = {m for members in made.values() for m in members}
    out = type(program.weights)()
    for name, expr in program.weights.items():
        if name in first:
            parts = tuple(program.weights[m] for m in made[first[name]])
            out[first[name]] = Stack((len(parts), *expr.shape), expr.dtype, parts, 0)
        elif name not in gone:
            out[name] = expr
    program.weights.clear()
    program.weights.update(out)
