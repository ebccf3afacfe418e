"""Names of the stacks: encoder and decoder, vision and text, stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from surgery.model.anatomy import ops
from surgery.model.anatomy.blocks import Attention
from surgery.model.anatomy.graphview import GraphView
from surgery.model.anatomy.layers import LayerStack


@dataclass(eq=False)
class Trunk:
    """Stacks that follow each other: one stack, or the stages of a pyramid. ``name`` is "" when it is the only trunk."""

    stacks: list[LayerStack]
    name: str = ""
    before: set[fx.Node] = field(default_factory=set)
    """Values that the trunk's input is computed from."""
    exits: set[fx.Node] = field(default_factory=set)
    """Residual additions of its blocks."""

    @property
    def first(self) -> int:
        return min(s.first for s in self.stacks)

    @property
    def prefix(self) -> str:
        return f"{self.name}." if self.name else ""


def find_trunks(view: GraphView, stacks: Sequence[LayerStack]) -> list[Trunk]:
    """Group stacks into trunks, name them and their stacks."""
    groups: dict[object, list[LayerStack]] = {}
    for stack in stacks:
        groups.setdefault(stack.stage[0] if stack.stage else stack, []).append(stack)
    trunks = [Trunk(_in_order(g)) for g in groups.values()]
    trunks = _series(trunks)
    for trunk in trunks:
        _survey(view, trunk)
    if len(trunks) > 1:
        _name(view, trunks)
    for trunk in trunks:
        staged = len(trunk.stacks) > 1 or trunk.stacks[0].stage is not None
        for i, stack in enumerate(trunk.stacks):
            stack.trunk = trunk.name
            stack.name = trunk.prefix + (f"stages[{i}].layers" if staged else "layers")
    return sorted(trunks, key=lambda t: t.first)


def _in_order(stacks: list[LayerStack]) -> list[LayerStack]:
    return sorted(stacks, key=lambda s: (s.stage[1] if s.stage else 0, s.first))


def _series(trunks: list[Trunk]) -> list[Trunk]:
    """Neighbouring convolutional stacks with one parent and different containers are stages of one trunk."""

    def convolutional(t: Trunk) -> bool:
        return len(t.stacks) == 1 and {u.kind for la in t.stacks[0].layers for u in la.units} == {"conv"}

    def parent(t: Trunk) -> str:
        return t.stacks[0].container.rpartition(".")[0]

    merged: list[Trunk] = []
    for trunk in sorted(trunks, key=lambda t: t.first):
        if merged and convolutional(trunk) and all(u.kind == "conv" for s in merged[-1].stacks for la in s.layers for u in la.units):
            if parent(merged[-1]) == parent(trunk):
                merged[-1].stacks += trunk.stacks
                continue
        merged.append(trunk)
    return merged


def _survey(view: GraphView, trunk: Trunk) -> None:
    for stack in trunk.stacks:
        for layer in stack.layers:
            for unit in layer.units:
                trunk.exits |= {c.exit.add for c in unit.calls if c.exit is not None}
    units = sorted((u for la in trunk.stacks[0].layers for u in la.units), key=lambda u: u.order)
    if not units:
        return
    block = units[0].block
    start = block.exit.residual if block.exit is not None else block.input
    trunk.before = set(view.backward(start)) | set(view.backward(block.input))


def _name(view: GraphView, trunks: list[Trunk]) -> None:
    decoders = [t for t in trunks if any(u.kind == "cross" for s in t.stacks for la in s.layers for u in la.units)]
    for decoder in decoders:
        decoder.name = "decoder"
        memories = [
            u.block.memory for s in decoder.stacks for la in s.layers for u in la.units if isinstance(u.block, Attention) and u.block.memory
        ]
        reach = set(view.backward(memories[0])) if memories else set()
        for other in trunks:
            if other is not decoder and other.exits & reach and not other.name:
                other.name = "encoder"
    for trunk in trunks:
        if not trunk.name:
            trunk.name = _modality(trunk)
    names = [t.name for t in trunks]
    for trunk in trunks:
        if names.count(trunk.name) > 1 or not trunk.name:
            trunk.name = _from_path(trunk, trunks)


def _modality(trunk: Trunk) -> str:
    inputs = [n for n in trunk.before if n.op == "placeholder"]
    tokens = any(ops.name_of(n) == "embedding" for n in trunk.before) and not any(ops.is_activation(n) for n in inputs)
    if tokens:
        return "text"
    ranks = {len(ops.shape_of(n) or ()) for n in inputs if ops.is_activation(n)}
    if ranks & {4, 5}:
        return "vision"
    return "audio" if any(ops.name_of(n) == "conv1d" for n in trunk.before) else ""


def _from_path(trunk: Trunk, trunks: list[Trunk]) -> str:
    """The first part of the container's path that no other trunk has at its place."""
    mine = trunk.stacks[0].container.split(".")
    others = [t.stacks[0].container.split(".") for t in trunks if t is not trunk]
    for i, part in enumerate(mine):
        if part and not part.isdigit() and all(len(o) <= i or o[i] != part for o in others):
            return part.replace("-", "_")
    return f"stack{sorted(t.first for t in trunks).index(trunk.first)}"
