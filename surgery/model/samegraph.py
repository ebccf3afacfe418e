"""Whether two graph trees are the same program: node by node, module by module, tensor by tensor (shapes and dtypes, not values)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from surgery.model import modules


def difference(left: nn.Module, right: nn.Module) -> str:
    """The first place where two trees differ, in words; empty when they compute the same from the same tensors.

    Compared are the classes of modules, what they are built from, their plain attributes, parameters and buffers (name, shape, dtype, which of them are
    one tensor) and of graphs every node in order: operation, target, arguments. Names of nodes are not.
    """
    ours, theirs = dict(left.named_modules()), dict(right.named_modules())
    if list(ours) != list(theirs):
        odd = sorted(set(ours) ^ set(theirs))
        return f"the modules are not the same: {', '.join(odd[:3])}" if odd else "the modules stand in another order"
    for path, one in ours.items():
        found = _module(one, theirs[path])
        if found:
            return f"{path or 'the model'}: {found}"
    first, second = _ties(left), _ties(right)
    return "" if first == second else f"other tensors are shared: {sorted(set(first.items()) ^ set(second.items()))[:2]}"


def nodes(root: nn.Module) -> int:
    """Nodes of all graphs of a tree."""
    return sum(len(m.graph.nodes) for m in root.modules() if isinstance(m, fx.GraphModule))


def _ties(root: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    every = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
    return {name: first[id(tensor)] for name, tensor in every if first.setdefault(id(tensor), name) != name}


def _module(left: nn.Module, right: nn.Module) -> str:
    for kind, ours, theirs in (("parameter", left._parameters, right._parameters), ("buffer", left._buffers, right._buffers)):
        mine, other = _tensors(ours), _tensors(theirs)
        if mine != other:
            return f"another {kind}: {next(n for n in {**mine, **other} if mine.get(n) != other.get(n))}"
    if isinstance(left, fx.GraphModule) and isinstance(right, fx.GraphModule):
        return _graph(left.graph, right.graph)
    if type(left) in modules.SCOPES and type(right) in modules.SCOPES:
        return ""
    if type(left) is not type(right):
        return f"a {type(right).__name__} in place of a {type(left).__name__}"
    if modules.config_of(left) != modules.config_of(right):
        return f"a {type(left).__name__} built from other values"
    mine, other = _plain(left), _plain(right)
    odd = next((k for k in {**mine, **other} if mine.get(k, "") != other.get(k, "")), None)
    return f"`{odd}` is {other.get(odd)!r} in place of {mine.get(odd)!r}" if odd is not None else ""


def _tensors(store: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {n: (tuple(t.shape), t.dtype) for n, t in store.items() if t is not None}


def _plain(module: nn.Module) -> dict[str, Any]:
    """Attributes that are numbers or texts, which a forward pass may read."""
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training" and isinstance(v, bool | int | float | str)}


def _graph(left: fx.Graph, right: fx.Graph) -> str:
    ours, theirs = list(left.nodes), list(right.nodes)
    if len(ours) != len(theirs):
        return f"{len(theirs)} nodes in place of {len(ours)}"
    number = {n: i for i, n in enumerate(ours)} | {n: i for i, n in enumerate(theirs)}
    for one, other in zip(ours, theirs, strict=True):
        if one.op != other.op or one.target != other.target:
            return f"node {one.name} is {other.op} {other.target} in place of {one.op} {one.target}"
        if not _same((one.args, one.kwargs), (other.args, other.kwargs), number):
            return f"node {one.name} has other arguments"
    return ""


def _same(left: Any, right: Any, number: dict[fx.Node, int]) -> bool:
    if isinstance(left, fx.Node):
        return isinstance(right, fx.Node) and number[left] == number[right]
    if isinstance(left, tuple | list):
        return (
            isinstance(right, tuple | list)
            and len(left) == len(right)
            and all(_same(a, b, number) for a, b in zip(left, right, strict=True))
        )
    if isinstance(left, dict):
        return isinstance(right, dict) and list(left) == list(right) and all(_same(v, right[k], number) for k, v in left.items())
    if isinstance(left, slice):
        return isinstance(right, slice) and _same((left.start, left.stop, left.step), (right.start, right.stop, right.step), number)
    if isinstance(left, float) and left != left:
        return isinstance(right, float) and right != right
    return type(left) is type(right) and bool(left == right)
