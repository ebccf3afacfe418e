"""What a dense feed-forward block computes between its projections, cut out of the graph as a function of features.

Everything there acts on single features (activations, products of gate and value, dropout, casts), so it is the same function for the rows
of an expert as for the tokens of a batch. The function keeps the model's own operations; nothing is recognised by name.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from surgery.core.site import Site
from surgery.model.anatomy import ops
from surgery.model.program import Program, ValueSpec
from surgery.passes.kinds.calls import calls_of, operand

aten = torch.ops.aten


@dataclass(frozen=True)
class Between:
    """``act(up)`` or ``act(gate, up)`` between the projections, ``x`` what enters, ``down`` the node that leaves the block, ``inner`` the nodes from
    the first projection to ``down``, all in the GraphModule at ``graph``."""

    graph: str
    x: fx.Node
    down: fx.Node
    inner: tuple[fx.Node, ...]
    act: fx.GraphModule


class NotPlainError(ValueError):
    """The block is more than projections with elementwise operations between; the text says what was found."""


def between(program: Program, parts: dict[str, Site]) -> Between:
    """The function between the projections ``up``, ``gate`` (if there is one) and ``down``. Raises NotPlainError."""
    places: dict[str, tuple[str, fx.Node]] = {}
    for role, site in parts.items():
        if site.op not in ("linear", "conv1d"):
            raise NotPlainError(f"{site.role} is a {site.op}")
        found = calls_of(program, site)
        if len(found) != 1:
            raise NotPlainError(f"{site.role} is called {len(found)} times")
        places[role] = found[0]
    if len({graph for graph, _ in places.values()}) != 1:
        raise NotPlainError("its projections stand in different graphs")
    if parts["down"].rows:
        raise NotPlainError(f"{parts['down'].role} is a part of a stored tensor")
    graph, down = places["down"]
    nodes = {role: node for role, (_, node) in places.items()}
    x = operand(nodes["up"])
    if "gate" in nodes and operand(nodes["gate"]) is not x:
        raise NotPlainError("its projections read different values")
    if _lead(x) != _lead(down):
        raise NotPlainError("tokens are arranged differently before and behind it")
    cutter = _Cutter(program.module(graph), nodes, parts)
    act = cutter.cut(operand(down))
    return Between(graph, x, down, tuple(cutter.inner), act)


def _lead(node: fx.Node) -> tuple[Any, ...]:
    spec = node.meta.get("spec")
    return spec.shape[:-1] if isinstance(spec, ValueSpec) else ()


class _Cutter:
    """Copies the nodes between the projections into a graph of their own."""

    def __init__(self, gm: fx.GraphModule, nodes: dict[str, fx.Node], parts: dict[str, Site]) -> None:
        self.gm = gm
        self.parts = parts
        self.nodes = nodes
        self.fused = nodes.get("gate") is nodes["up"]
        self.graph = fx.Graph()
        self.inputs = {role: self.graph.placeholder(role) for role in (("gate", "up") if "gate" in parts else ("up",))}
        self.modules = nn.Module()
        self.inner: list[fx.Node] = []
        self.known: dict[fx.Node, fx.Node] = {}

    def cut(self, end: fx.Node) -> fx.GraphModule:
        wanted = self._wanted(end)
        for node in self.gm.graph.nodes:
            if node in wanted and node not in self.known:
                self.known[node] = self._copy(node)
        self.graph.output(self.known[end])
        unused = [role for role, node in self.inputs.items() if not node.users]
        if unused:
            raise NotPlainError(f"the {unused[0]} projection does not reach its end")
        self.inner = [n for n in self.gm.graph.nodes if n in wanted or n in self.nodes.values()]
        made = fx.GraphModule(self.modules, self.graph)
        made.recompile()
        return made

    def _wanted(self, end: fx.Node) -> set[fx.Node]:
        """Everything between the projections and ``end``."""
        found: set[fx.Node] = set()
        stack = [end]
        starts = {self.nodes[r] for r in self.inputs}
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            if node in starts and not self.fused:
                self.known[node] = next(self.inputs[r] for r in self.inputs if self.nodes[r] is node)
                continue
            if node in starts:
                continue
            if node.op in ("placeholder", "get_attr"):
                raise NotPlainError(f"`{node.target}` is read between its projections")
            stack += [n for n in self._sources(node)]
        return found

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that carry features; sizes of a view are left out."""
        if ops.name_of(node) in ops.SHAPE or ops.name_of(node) in ops.PARTS:
            return node.all_input_nodes[:1]
        return node.all_input_nodes

    def _copy(self, node: fx.Node) -> fx.Node:
        name = ops.name_of(node)
        if self.fused and node is self.nodes["up"]:
            return self.inputs["up"]  # read in parts only, see `_part`
        if node.op == "call_module":
            return self._module(node)
        if name in ops.PARTS or name == "glu":
            return self._part(node, name)
        source = node.all_input_nodes[0]
        if name in ("to", "_to_copy", "type_as", "contiguous", "clone", "alias", "detach", "float", "half", "bfloat16"):
            return self._plain(node)
        if name in ops.SHAPE:
            if ops.name_of(node) in ops.TURNS or _last(node) != _last(source):
                raise NotPlainError(f"`{name}` moves features between its projections")
            return self.known[source]
        if not ops.is_pointwise(node):
            raise NotPlainError(f"`{name}` stands between its projections")
        self._whole_operands(node)
        return self._plain(node)

    def _plain(self, node: fx.Node) -> fx.Node:
        args, kwargs = fx.map_arg(node.args, self.known.__getitem__), fx.map_arg(node.kwargs, self.known.__getitem__)
        return self.graph.create_node("call_function", node.target, args, kwargs)

    def _whole_operands(self, node: fx.Node) -> None:
        if self.fused and self.nodes["up"] in node.all_input_nodes:
            raise NotPlainError(f"`{ops.name_of(node)}` reads gate and value together")

    def _module(self, node: fx.Node) -> fx.Node:
        module = self.gm.get_submodule(str(node.target))
        if isinstance(module, nn.Identity):
            return self.known[node.all_input_nodes[0]]
        if not isinstance(module, nn.Dropout):
            raise NotPlainError(f"`{node.target}` stands between its projections")
        name = f"dropout_{len(self.modules._modules)}" if self.modules._modules else "dropout"
        self.modules.add_module(name, nn.Dropout(module.p))
        self._whole_operands(node)
        return self.graph.call_module(name, (self.known[node.all_input_nodes[0]],))

    def _part(self, node: fx.Node, name: str) -> fx.Node:
        """A slice of a fused projection is its gate or its value."""
        if not self.fused:
            raise NotPlainError(f"`{name}` takes a part of the features")
        if name in ("chunk", "split", "split_with_sizes", "unsafe_chunk", "unsafe_split"):
            return self.inputs["up"]  # the parts are taken by what follows
        if name == "glu":  # the first half times the sigmoid of the second
            open_ = self.graph.call_function(aten.sigmoid.default, (self.inputs["gate"],))
            return self.graph.call_function(aten.mul.Tensor, (self.inputs["up"], open_))
        rows = self._rows(node, name)
        role = next((r for r in self.inputs if self.parts[r].rows == (rows,)), None)
        if role is None:
            raise NotPlainError(f"rows {rows[0]} to {rows[1]} of its fused projection are neither gate nor value")
        return self.inputs[role]

    def _rows(self, node: fx.Node, name: str) -> tuple[int, int]:
        source = node.all_input_nodes[0]
        if node.target is operator.getitem:
            sizes = [int(s.shape[-1]) for s in source.meta["spec"]]
            at = int(node.args[1])  # type: ignore[call-overload]
            return sum(sizes[:at]), sum(sizes[: at + 1])
        if name == "slice" and len(node.args) >= 4 and node.args[1] in (-1, len(source.meta["spec"].shape) - 1):
            width = int(_last(source))
            start, stop = int(node.args[2] or 0), min(width, int(node.args[3]))  # type: ignore[arg-type,call-overload]
            return (start + width if start < 0 else start), stop
        raise NotPlainError(f"`{name}` takes a part of the features")


def _last(node: fx.Node) -> Any:
    spec = node.meta.get("spec")
    return spec.shape[-1] if isinstance(spec, ValueSpec) and spec.shape else None
