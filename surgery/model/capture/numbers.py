"""Numbers that a model computes from literals while it runs are computed once, where a stored graph could not hold the way there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from surgery.model.oplist import target_name

_SAME = frozenset(f"aten.{name}.default" for name in ("detach", "detach_", "lift_fresh", "lift_fresh_copy", "alias", "clone"))


def fold_scalars(graph: fx.Graph, lifted: dict[str, Tensor]) -> None:
    """Replaces each number (a tensor without axes) that follows from ``lifted`` constants alone, through an operation that no stored graph
    may name, by a constant; ``lifted`` gets its value.

    Casts to half precision are not folded: they stand for the model's own dtype, which the graph may be given later.
    """
    known: dict[fx.Node, Any] = {}
    for node in graph.find_nodes(op="placeholder"):
        if node.name in lifted and lifted[node.name].ndim == 0:
            known[node] = lifted[node.name]
    foreign: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or not node.all_input_nodes or any(n not in known for n in node.all_input_nodes):
            continue
        if str(node.target) not in _SAME and getattr(getattr(node.target, "_schema", None), "is_mutable", False):
            return  # whoever reads a constant later reads what was written to it
        value = _value(node, known)
        if value is None:
            continue
        known[node] = value
        if target_name(node.target) is None or any(n in foreign for n in node.all_input_nodes):
            foreign.add(node)
    first = next((n for n in graph.nodes if n.op == "placeholder"), None)
    made = 0
    for node in [n for n in graph.nodes if n in foreign and isinstance(known[n], Tensor)]:
        outside = [u for u in node.users if u not in known]
        if not outside:
            continue
        assert first is not None
        with graph.inserting_before(first):
            constant = graph.placeholder(f"folded_{made}")
        constant.meta = {k: v for k, v in node.meta.items() if k in ("spec", "val")}
        lifted[constant.name] = known[node]
        made += 1
        for user in outside:
            user.replace_input_with(node, constant)
    if made:
        for node in [n for n in known if not n.users]:
            _erase(graph, node, lifted)


def _erase(graph: fx.Graph, node: fx.Node, lifted: dict[str, Tensor]) -> None:
    """A number that nothing reads any more, with those that were read for it alone."""
    sources = node.all_input_nodes
    if node.op == "placeholder":
        lifted.pop(node.name)
    graph.erase_node(node)
    for source in sources:
        if not source.users:
            _erase(graph, source, lifted)


def _value(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """What a node gives on the CPU: a number, or a tuple of them; None for what is not followed."""
    name = str(node.target)
    if name in _SAME:
        return known[node.all_input_nodes[0]]
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
    if name.startswith("aten.to.") or "to_copy" in name:  # to another device, where the type stays
        source = node.all_input_nodes[0]
        return known[source] if node.meta["spec"] == source.meta["spec"] else None
    schema = getattr(node.target, "_schema", None)
    if schema is not None and not schema.name.startswith("aten::"):
        return None
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return None
    value = node.target(*args, **kwargs)  # type: ignore[operator]
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return value if all(isinstance(v, Tensor) and v.ndim == 0 and v.device.type == "cpu" for v in parts) else None
