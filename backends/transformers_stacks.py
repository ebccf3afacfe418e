"""Experts that a program holds as one tensor and the class of a checkpoint one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from surgery.model.program import Program
from surgery.model.weights import Reshape, select


def members(model: nn.Module, names: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Of ``names`` (in the program: in the checkpoint) those that ``model`` has apart, with the names that it has them under.

    ``experts.wi.weight`` is ``experts.expert_0.wi.weight``, ``experts.expert_1.wi.weight`` ... where ``experts`` is a list or dict of modules.
    """
    lists = {path: m for path, m in model.named_modules() if isinstance(m, (nn.ModuleDict, nn.ModuleList)) and len(m) > 1}
    own = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    found: dict[str, tuple[str, ...]] = {}
    for name, target in names.items():
        if target in own:
            continue
        for path, container in lists.items():
            rest = target.removeprefix(path + ".")
            apart = tuple(f"{path}.{child}.{rest}" for child, _ in container.named_children())
            if rest != target and own.issuperset(apart):
                found[name] = apart
    return found


def apart(program: Program, stacks: Mapping[str, tuple[str, ...]]) -> Program:
    """The program as it is stored: each of its stacked tensors as one tensor for each member. Only its weights differ."""
    if not stacks:
        return program
    weights = type(program.weights)()
    for name, expr in program.weights.items():
        if name not in stacks or expr.shape[0] != len(stacks[name]):
            weights[name] = expr
            continue
        for i, member in enumerate(stacks[name]):
            weights[member] = Reshape(expr.shape[1:], expr.dtype, select(expr, 0, ((i, i + 1),)))
    return replace(program, weights=weights)
