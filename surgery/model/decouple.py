"""Layers that only share a value, such as a relative position bias, made independent of each other.

T5 computes the bias of its heads once and every layer adds it to its scores, so a head can only go from all layers of a stack together. An
``index_select`` with an index buffer on the way into each layer's scores breaks that: it changes nothing as long as the buffer counts up,
and a layer that loses a head loses the entry of its own buffer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from surgery.core.site import NodeRef
from surgery.model.cut_graph import recompile_later
from surgery.model.dims import Dims, Leaf
from surgery.model.dims.algebra import factors
from surgery.model.program import Origin, Program, ValueSpec
from surgery.model.weights import Init

aten = torch.ops.aten


@dataclass(frozen=True)
class Place:
    """A value and its axis on which units stand. ``size`` is their number where they share the axis with others (samples in front of heads, say),
    ``inner`` how many positions each of them has there; 0 and 1 where the axis is theirs alone."""

    ref: NodeRef
    axis: int
    size: int = 0
    inner: int = 1


def shared_values(program: Program, leaf: Leaf) -> dict[str, list[Place]]:
    """For each layer (the path of its graph) the values with units of ``leaf`` on one axis that other layers see as well.

    Only layers that have parameters with the leaf count; caches, which belong to one layer each, are not among them.
    """
    dims = program.dims
    holders = {name for name, _, _ in dims.holders(leaf)}
    layers = [path for path, gm in program.graph.named_modules() if path and isinstance(gm, fx.GraphModule)]
    layers = [path for path in layers if any(name.startswith(path + ".") for name in holders)]
    found: dict[str, list[Place]] = {}
    for node in dims.graph.nodes:
        axes = dims.values.get(node)
        if type(axes) is not tuple or node.op == "get_attr":
            continue
        refs = {ref.graph: ref for ref in node.meta["refs"] if ref.graph in layers}
        at = (
            next(((i, *size) for i, axis in enumerate(axes) if (size := _stands(dims, axis, leaf)) is not None), None)
            if len(refs) > 1
            else None
        )
        if at is not None:
            for path, ref in refs.items():
                found.setdefault(path, []).append(Place(ref, *at))
    return found


def _stands(dims: Dims, axis: Any, leaf: Leaf) -> tuple[int, int] | None:
    """How units of ``leaf`` stand on an axis (see :class:`Place`), None where they do not."""
    if dims.leaf(axis) == leaf:
        return 0, 1
    parts = factors(axis)
    if leaf.axis not in parts:
        return None
    behind = parts[parts.index(leaf.axis) + 1 :]
    return None if any(dims.symbolic(part) for part in behind) else (leaf.size, prod(part.size for part in behind))


def decouple(program: Program, leaf: Leaf, origin: Origin, layers: Collection[str] | None = None) -> tuple[str, ...]:
    """Give each layer that shares values with units of ``leaf`` its own class of these units, in place; the names of the buffers added.

    ``layers`` are the paths of the layers' graphs (None: all that share). The outputs stay as they are, bit for bit. The shared value itself
    cannot lose these units any more: which of them a layer takes is then a matter of numbers. Empty when nothing is shared.
    """
    made: list[str] = []
    for path, values in shared_values(program, leaf).items():
        if layers is not None and path not in layers:
            continue
        gm = program.module(path)
        name = _free_name(gm, "units_kept")
        gm.register_buffer(name, torch.empty(leaf.size, dtype=torch.int64, device="meta"))
        full = f"{path}.{name}"
        program.weights[full] = Init((leaf.size,), "int64", "arange")
        program.journal.record(full, origin)
        for place in values:
            _select(program, gm, place, name, origin)
        recompile_later(gm)
        made.append(full)
    if made:
        program.touch()
    return tuple(made)


def counted_values(program: Program, leaf: Leaf) -> list[tuple[NodeRef, tuple[int, ...]]]:
    """Values of fixed sizes that the graph computes from nothing but numbers (the slopes of ALiBi, a row of frequencies) and that meet others:
    the place of each, with the axes that have units of ``leaf``."""
    dims = program.dims
    alone: set[fx.Node] = set()
    found: list[tuple[NodeRef, tuple[int, ...]]] = []
    for node in dims.graph.nodes:
        spec = node.meta.get("spec")
        if (
            node.op == "call_function"
            and isinstance(spec, ValueSpec)
            and all(type(s) is int for s in spec.shape)
            and alone.issuperset(node.all_input_nodes)
        ):
            alone.add(node)
    for node in dims.graph.nodes:
        axes = dims.values.get(node)
        if node not in alone or type(axes) is not tuple or alone.issuperset(u for u in node.users if u.op != "output"):
            continue
        at = tuple(i for i, axis in enumerate(axes) if leaf in dims.leaves(axis))
        if at and node.meta["refs"]:
            found.append((node.meta["refs"][0], at))
    return found


def pick_counted(program: Program, leaves: Collection[Leaf], origin: Origin) -> tuple[str, ...]:
    """Let units of ``leaves`` go although numbers are counted along them: the values that :func:`counted_values` finds are picked by index
    buffers, which lose entries as parameters lose rows. The outputs stay as they are, bit for bit. The names of the buffers, none where
    nothing is counted along these units."""
    places: dict[NodeRef, set[int]] = {}
    for leaf in leaves:
        for ref, at in counted_values(program, leaf):
            places.setdefault(ref, set()).update(at)
    made: list[str] = []
    for ref, axes in places.items():
        gm = program.module(ref.graph)
        for axis in sorted(axes):
            value = program.node(ref)
            size = value.meta["spec"].shape[axis]
            name = _free_name(gm, "units_kept")
            gm.register_buffer(name, torch.empty(size, dtype=torch.int64, device="meta"))
            full = f"{ref.graph}.{name}" if ref.graph else name
            program.weights[full] = Init((size,), "int64", "arange")
            program.journal.record(full, origin)
            _select(program, gm, Place(ref, axis), name, origin)
            made.append(full)
        recompile_later(gm)
    if made:
        program.touch()
    return tuple(made)


def _select(program: Program, gm: fx.GraphModule, place: Place, name: str, origin: Origin) -> None:
    ref, axis = place.ref, place.axis
    value = program.node(ref)
    users = [u for u in value.users if u.op != "output"]
    if not users:
        return
    behind = value
    while value.op == "placeholder" and behind.next.op == "placeholder":
        behind = behind.next
    with gm.graph.inserting_after(behind):
        index = gm.graph.get_attr(name)
    index.meta["spec"] = ValueSpec("tensor", "int64", tuple(gm.get_buffer(name).shape))
    spec: Any = value.meta["spec"]
    steps: list[tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = [(aten.index_select.default, (axis, index), spec.shape)]
    if place.size:
        shape = list(spec.shape)
        shape[axis : axis + 1] = [shape[axis] // (place.size * place.inner), place.size, place.inner]
        apart = (aten.unflatten.int, (axis, [-1, place.size, place.inner]), tuple(shape))
        steps = [
            apart,
            (aten.index_select.default, (axis + 1, index), tuple(shape)),
            (aten.flatten.using_ints, (axis, axis + 2), spec.shape),
        ]
    picked, last = value, index
    for target, args, sizes in steps:
        with gm.graph.inserting_after(last):
            last = picked = gm.graph.call_function(target, (picked, *args))
        picked.meta["spec"] = replace(spec, shape=sizes)
    for user in users:
        user.replace_input_with(value, picked)
    program.journal.record(NodeRef(ref.graph, picked.name), origin)


def _free_name(module: Any, name: str) -> str:
    candidate, n = name, 1
    while hasattr(module, candidate):
        n += 1
        candidate = f"{name}_{n}"
    return candidate
