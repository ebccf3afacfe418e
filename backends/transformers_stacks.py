"""Experts that a program holds as one tensor ``[experts, ., .]`` and the class of a checkpoint one by one, or in two dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from surgery.model.program import Program
from surgery.model.viewed import reshaped
from surgery.model.weights import Reshape, select


@dataclass(frozen=True)
class Layout:
    """How the class of a checkpoint stores what the program has as one tensor in three dimensions: ``apart`` are the names that it has each expert
    under, by the program's name; ``flat`` are tensors that it has as ``[experts * units, width]``."""

    apart: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    flat: frozenset[str] = frozenset()


def layout_of(model: nn.Module, program: Program, names: Mapping[str, str]) -> Layout:
    """The layout of ``model`` for the tensors ``names`` (in the program: in the checkpoint).

    ``experts.wi.weight`` is ``experts.expert_0.wi.weight``, ``experts.expert_1.wi.weight`` ... where ``experts`` is a list or dict of modules.
    """
    lists = {path: m for path, m in model.named_modules() if isinstance(m, (nn.ModuleDict, nn.ModuleList)) and len(m) > 1}
    own = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, tuple[str, ...]] = {}
    flat: set[str] = set()
    for name, target in names.items():
        if target in own:
            if len(program.weights[name].shape) == 3 and own[target].ndim == 2:
                flat.add(name)
            continue
        for path, container in lists.items():
            rest = target.removeprefix(path + ".")
            apart = tuple(f"{path}.{child}.{rest}" for child, _ in container.named_children())
            if rest != target and apart[0] in own and own.keys() >= set(apart):
                found[name] = apart
    return Layout(found, frozenset(flat))


def as_stored(program: Program, layout: Layout) -> Program:
    """The program as the class stores it. Only its weights differ."""
    if not layout.apart and not layout.flat:
        return program
    weights = type(program.weights)()
    for name, expr in program.weights.items():
        parts = layout.apart.get(name, ())
        if len(parts) == expr.shape[0] and parts:
            for i, member in enumerate(parts):
                weights[member] = Reshape(expr.shape[1:], expr.dtype, select(expr, 0, ((i, i + 1),)))
        elif name in layout.flat:
            experts, units, width = expr.shape
            weights[name] = reshaped(expr, (experts * units, width))
        else:
            weights[name] = expr
    return replace(program, weights=weights)
