"""Layers that only share a value, such as a relative position bias, made independent of each other.

T5 computes the bias of its heads once and every layer adds it to its scores, so a head can only go from all layers of a stack together. An
``index_select`` with an index buffer on the way into each layer's scores breaks that: it changes nothing as long as the buffer counts up,
and a layer that loses a head loses the entry of its own buffer.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from surgery.core.site import NodeRef
from surgery.model.cut_graph import recompile_later
from surgery.model.dims import Leaf
from surgery.model.program import Origin, Program, ValueSpec
from surgery.model.weights import Init

aten = torch.ops.aten


def shared_values(program: Program, leaf: Leaf) -> dict[str, list[tuple[NodeRef, int]]]:
    """For each layer (the path of its graph) the values with units of ``leaf`` on one axis that other layers see as well, with that axis.

    Only layers that have parameters with the leaf count; caches, which belong to one layer each, are not among them.
    """
    dims = program.dims
    holders = {name for name, _, _ in dims.holders(leaf)}
    layers = [path for path, gm in program.graph.named_modules() if path and isinstance(gm, fx.GraphModule)]
    layers = [path for path in layers if any(name.startswith(path + ".") for name in holders)]
    found: dict[str, list[tuple[NodeRef, int]]] = {}
    for node in dims.graph.nodes:
        axes = dims.values.get(node)
        if type(axes) is not tuple or node.op == "get_attr":
            continue
        at = [i for i, axis in enumerate(axes) if dims.leaf(axis) == leaf]
        refs = {ref.graph: ref for ref in node.meta["refs"] if ref.graph in layers}
        if at and len(refs) > 1:
            for path, ref in refs.items():
                found.setdefault(path, []).append((ref, at[0]))
    return found


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
        for ref, axis in values:
            _select(program, gm, ref, axis, name, origin)
        recompile_later(gm)
        made.append(full)
    if made:
        program.touch()
    return tuple(made)


def _select(program: Program, gm: fx.GraphModule, ref: NodeRef, axis: int, name: str, origin: Origin) -> None:
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
    with gm.graph.inserting_after(index):
        picked: Any = gm.graph.call_function(aten.index_select.default, (value, axis, index))
    picked.meta["spec"] = value.meta["spec"]
    for user in users:
        user.replace_input_with(value, picked)
    program.journal.record(NodeRef(ref.graph, picked.name), origin)


def _free_name(module: Any, name: str) -> str:
    candidate, n = name, 1
    while hasattr(module, candidate):
        n += 1
        candidate = f"{name}_{n}"
    return candidate
