"""A program whose layers stand in the root graph: one graph in which a rewrite may follow a value from any layer into any other."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from surgery.backends.onnx_cut import copy_of, inputs_of, is_size, same_size
from surgery.model.program import Program


def inlined(program: Program) -> Program:
    """A copy without nested graphs: their nodes stand in the root, leaf modules and tensors keep their full names.

    A layer that is called twice is there twice and reads the same tensors; sizes that an input has are read from it. Specs of values are kept; nodes of attachments and sites are
    those of the nested graphs, so that the copy is for emission alone.
    """
    out = copy_of(program)
    graph = fx.Graph()
    result = _copy(out.graph, out.graph, "", graph, None)
    end = graph.output(result)
    end.meta.update(out.graph.graph.output_node().meta)
    out.graph = fx.GraphModule(out.graph, graph)
    out._dims = None
    given = inputs_of(out.graph)
    for node in graph.nodes:
        if is_size(node) and (found := same_size(node.meta["spec"].shape[0], given)) is not None:
            node.args = found
    _out_of_place(graph)
    out.graph.recompile()
    return out


_PARTS = frozenset("slice select narrow view reshape transpose permute unsqueeze squeeze expand t alias unfold diagonal".split())


def base_of(node: fx.Node) -> fx.Node:
    """The value that a view is one of; the node itself where it is none."""
    while str(getattr(getattr(node.target, "overloadpacket", None), "__name__", "")) in _PARTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _alone(node: fx.Node) -> bool:
    """Nothing reads the value besides the one operation that writes to it, neither it nor what it is a part of."""
    while len(node.users) == 1:
        if base_of(node) is node:
            return True
        node = node.args[0]  # type: ignore[assignment]
    return False


def _out_of_place(graph: fx.Graph) -> None:
    """Operations that write into a value which nothing else reads give a new one instead: what nobody needs of them can go. A part of a value
    is read where the value is."""
    for node in graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        name = str(packet.__name__) if packet is not None else ""
        if name.endswith("_") and not name.endswith("__") and isinstance(node.args[0], fx.Node) and _alone(node.args[0]):
            plain = getattr(getattr(torch.ops.aten, name[:-1], None), str(node.target).rpartition(".")[2], None)
            node.target = plain if plain is not None else node.target


def _copy(root: fx.GraphModule, gm: fx.GraphModule, path: str, graph: fx.Graph, given: list[Any] | None) -> Any:
    """Copies the nodes of one graph; ``given`` are the values of its inputs, None makes placeholders. Returns its outputs."""
    env: dict[fx.Node, Any] = {}
    incoming = iter(given or ())
    for node in gm.graph.nodes:
        if node.op == "output":
            return fx.node.map_arg(node.args[0], env.__getitem__)
        if node.op == "placeholder" and given is not None:
            env[node] = next(incoming)
            continue
        args = fx.node.map_arg(node.args, env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
        target: Any = node.target
        if node.op in ("call_module", "get_attr"):
            target = f"{path}.{node.target}" if path else str(node.target)
        if node.op == "call_module" and isinstance(called := root.get_submodule(target), fx.GraphModule):
            names = [str(n.target) for n in called.graph.nodes if n.op == "placeholder"]
            env[node] = _copy(root, called, target, graph, [*args, *(kwargs[name] for name in names[len(args) :])])
            continue
        if target is operator.getitem and isinstance(args[0], (tuple, list)):
            env[node] = args[0][args[1]]
            continue
        made = graph.create_node(node.op, target, args, kwargs, name=node.name)
        made.meta.update(node.meta)
        env[node] = made
    raise AssertionError("a graph without an output")
