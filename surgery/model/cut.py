"""The cut: units of dimension classes taken out of a whole Program, in weights, modules, graphs and what is attached.

``program.dims.remove(...)`` says what goes together (:class:`~surgery.model.dims.Group`); :func:`cut` does it. Everything that could
refuse is found before the first change, so a refused cut leaves the program as it was.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from surgery.core.diagnostics import fail
from surgery.core.source import Span
from surgery.model import cut_attached, masked
from surgery.model.cut_graph import GraphCut
from surgery.model.cut_leaves import apply_changes, refit
from surgery.model.cut_sizes import NewSizes
from surgery.model.dims import Group, Member
from surgery.model.dims.masks import from_ranges
from surgery.model.program import Origin, Program
from surgery.model.walk import edits, tree
from surgery.model.weights import select

Modules = Sequence[tuple[str, nn.Module]]
"""Every module by every path that it has."""


@dataclass(frozen=True)
class CutResult:
    """What a cut removed: for each tensor the number of its elements that went, and the ranges that went of its axes.

    ``members`` are those of the group and the tensors of attached modules that followed them; ``parameters`` those of the tensors that are no buffers.
    """

    removed: dict[str, int]
    members: tuple[Member, ...]
    parameters: frozenset[str]


def cut(program: Program, group: Group, origin: Origin, sizes: NewSizes | None = None) -> CutResult:
    """Take a group's units out of ``program``, in place.

    Weights become selections of their expressions; tied tensors stay tied. Leaf modules, constants of the graphs and specs of values
    follow, and so do tensors of attached modules. The group must be of ``program.dims`` as it is now; ``sizes`` are those that it leaves, where the
    caller has them.

    Raises S0430 for a group that carries a refusal and for a size that cannot be followed, S0431 where an attached module cannot follow and
    S0432 where a part that is used in several places would have to differ between them; ValueError when the group is of another analysis.
    """
    if group.refusal:
        raise fail("S0430", f"these units cannot be removed: {group.refusal}", origin.span, "removed here")
    if group.dims is not program.dims:
        raise ValueError("the group belongs to another analysis than the program's present one")
    sizes = NewSizes(group.dims, group.keep) if sizes is None else sizes
    graphs = GraphCut(program, sizes, group.constants, origin.span)
    for path, changes in graphs.leaves.items():
        _check_leaf(program, path, changes, origin.span)
    every = tree(program.graph, every=True)
    anything = any([edits(module) is not None for _, module in every])
    attached = cut_attached.plan(program, group, _groups(every, graphs), origin.span) if anything else cut_attached.AttachedCut()
    members = [*group.members, *attached.members]
    program.weights.update(attached.rewrites)
    removed, parameters = _tensors(program, every, members, origin)
    for path, changes in graphs.leaves.items():
        apply_changes(program.module(path), changes)
    runs = list({id(m): m for _, m in every if isinstance(m, fx.GraphModule)}.values())
    for ref in graphs.write(runs, anything):
        program.journal.record(ref, origin)
    _refit(program, dict(every), group)
    cut_attached.apply(program, attached)
    program.touch(None if attached.rewrites or attached.members else group)  # sizes of what is attached follow from no class
    return CutResult(removed, tuple(members), parameters)


def _check_leaf(program: Program, path: str, changes: Any, span: Span) -> None:
    if not apply_changes(copy.copy(program.module(path)), changes):
        why = f"`{path}` has a size that cannot be written"
        raise fail("S0430", f"these units cannot be removed: {why}", span, "removed here")


def _groups(every: Modules, graphs: GraphCut) -> dict[str, int]:
    """Groups of every convolution leaf after the cut."""
    found = {path: m.groups for path, m in every if isinstance(m, nn.modules.conv._ConvNd)}
    for path, changes in graphs.leaves.items():
        if path in found:
            found[path] = next((c.value for c in changes if c.path == ("args", 6)), found[path])
    return found


def _tensors(program: Program, every: Modules, members: list[Member], origin: Origin) -> tuple[dict[str, int], frozenset[str]]:
    """Selects weights and replaces the meta tensors wherever they are held; returns the elements that each lost, and which are parameters."""
    before = {m.parameter: math.prod(program.weights[m.parameter].shape) for m in members}
    for m in members:
        program.weights[m.parameter] = select(program.weights[m.parameter], m.axis, m.kept)
        masked.cut_mask(program, m.parameter, m.axis, m.kept)
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    parameters = set()
    held: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for path, module in every:
        lead = f"{path}." if path else ""
        for store in (module._parameters, module._buffers):
            for leaf, tensor in store.items():
                if tensor is None:
                    continue
                held.append((store, leaf, tensor))
                name = lead + leaf
                first = program.aliases.get(name, name)
                if first in before and id(tensor) not in made:
                    empty = torch.empty(program.weights[first].shape, dtype=tensor.dtype, device=tensor.device)
                    new = empty
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(empty, requires_grad=tensor.requires_grad)
                        parameters.add(first)
                    made[id(tensor)] = (tensor, new)
    for store, leaf, tensor in held:
        if id(tensor) in made and made[id(tensor)][0] is tensor:
            store[leaf] = made[id(tensor)][1]
    removed = {}
    for name, size in before.items():
        removed[name] = size - math.prod(program.weights[name].shape)
        program.journal.record(name, origin)
    return removed, frozenset(parameters)


def _refit(program: Program, modules: dict[str, nn.Module], group: Group) -> None:
    """Attributes of leaf modules that follow from their tensors."""
    smaller = {m.parameter for m in group.members}
    names = [*smaller, *(name for name, first in program.aliases.items() if first in smaller)]
    for owner in dict.fromkeys([name.rpartition(".")[0] for name in names]):
        refit(modules[owner])
    for m in group.members:
        owner, _, leaf = m.parameter.rpartition(".")
        module = modules[owner]
        if isinstance(module, nn.Embedding) and leaf == "weight" and m.axis == 0 and module.padding_idx is not None:
            kept = from_ranges(m.kept, m.kept[-1][1] if m.kept else 0)
            at = module.padding_idx
            module.padding_idx = int(np.count_nonzero(kept[:at])) if at < len(kept) and kept[at] else None
