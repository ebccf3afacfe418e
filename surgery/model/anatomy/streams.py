"""The residual stream: where sublayers leave it and join it again.

The places are values in the graph. All values of the stream are of one dimension class, so classes cannot tell them apart: these questions
follow the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from torch import fx

from surgery.model.anatomy import ops
from surgery.model.anatomy.graphview import GraphView
from surgery.model.anatomy.products import Norm, Projection
from surgery.model.anatomy.sources import Part, Sources
from surgery.model.twins import Lost

T = TypeVar("T")


@dataclass(eq=False)
class Exit:
    """Where a sublayer joins the residual stream: ``output`` and ``residual`` are the operands of ``add``."""

    output: fx.Node
    residual: fx.Node
    add: fx.Node
    joined: fx.Node
    """The operand of ``add`` that carries this sublayer, after the outputs of parallel sublayers were added to it."""
    norms: list[Norm] = field(default_factory=list)


class Streams:
    """Questions about the flow of one graph between sublayers."""

    def __init__(self, view: GraphView, sources: Sources) -> None:
        self.view = view
        self.dims = view.dims
        self.sources = sources

    def copier(self, i: int) -> tuple[Callable[[fx.Node], fx.Node], Callable[[Norm], Norm], Callable[[Part], Part]]:
        """What stands at run ``i``, a copy, for a node, a norm and a part of the layer that it is a copy of; they raise Lost."""
        view, node = self.view, partial(self.view.copies.node, i)

        def at(table: dict[fx.Node, T], key: fx.Node) -> T:
            found = table.get(node(key))
            if found is None:
                raise Lost
            return found

        return node, lambda n: at(view.norm_of, n.out), lambda p: Part(at(view.by_node, p.projection.node), p.rows)

    def copied_exit(self, i: int, exit: Exit | None) -> Exit | None:
        """Where a copy joins the stream."""
        if exit is None:
            return None
        node, norm, _ = self.copier(i)
        return Exit(node(exit.output), node(exit.residual), node(exit.add), node(exit.joined), [norm(n) for n in exit.norms])

    def from_projection(self, node: fx.Node) -> bool:
        """The value is a projection's output up to scales, views and dropout: a sublayer's contribution, not a stream."""
        while True:
            if node in self.view.by_node:
                return True
            if node.op != "call_function":
                return False
            name = ops.name_of(node)
            if name in ops.SHAPE or name in ops.GATHER or ops.is_pointwise(node) or name in ("sum", "index_add"):
                inputs = self.view.activations(node)
                if len(inputs) != 1 and name != "mul":
                    return False
                if not inputs:
                    return False
                node = inputs[0]
            else:
                return False

    def upstream(self, node: fx.Node) -> set[fx.Node]:
        """The values on the line that leads to a sublayer's input: views, norms, elementwise ops and products of one input."""
        found: set[fx.Node] = set()
        for _ in range(64):
            found.add(node)
            norm = self.view.norm_of.get(node)
            projection = self.view.by_node.get(node)
            name = ops.name_of(node)
            if norm is not None:
                node = norm.x
            elif projection is not None:
                node = projection.x
            elif name in ops.SHAPE or name in ops.GATHER or ops.is_pointwise(node) or node.op == "call_module":
                inputs = self.view.activations(node)
                if len(inputs) != 1:
                    break
                node = inputs[0]
            else:
                break
        return found

    def exit(self, start: fx.Node, source: fx.Node) -> Exit | None:
        """Forward from a projection's output to the addition that joins it to the residual stream; ``source`` entered."""
        node: fx.Node = start
        streams = self.upstream(source)
        output: fx.Node | None = None
        norms: list[Norm] = []
        for _ in range(64):
            norm = next((n for n in self._norms_at(node)), None)
            following = self.view.users(node)
            step: fx.Node | None = None
            for user in following:
                name = ops.name_of(user)
                if name == "add" and len(both := self.view.activations(user, node)) == 2 and both[0] is not both[1]:
                    other = both[1] if both[0] is node else both[0]
                    if _same_size(user, node):
                        if not self._same_stream(other, streams) and self.from_projection(other):
                            output = output or node
                            step = user
                            break
                        return Exit(output or node, other, user, node, norms)
            if step is None and norm is not None and len(following) <= 3:
                norms.append(norm)
                step = norm.out
            if step is None:
                step = next((u for u in following if self._passes(u, node)), None)
            if step is None:
                return None
            node = step
        return None

    def _same_stream(self, node: fx.Node, streams: set[fx.Node]) -> bool:
        return node in streams or self.view.strip(node) in streams

    def _norms_at(self, node: fx.Node) -> list[Norm]:
        found = []
        for user in self.view.users(node):
            for candidate in (user, *(user.users if ops.name_of(user) in ops.SHAPE else ())):
                norm = self.view.norm_of.get(candidate) or self.view.norm_inner.get(candidate)
                if norm is not None and self.view.strip(norm.x) is self.view.strip(node):
                    found.append(norm)
        return found

    def _passes(self, user: fx.Node, node: fx.Node) -> bool:
        if user in self.view.by_node:
            return False
        if user.op == "call_module":
            return True
        if user.op != "call_function":
            return False
        name = ops.name_of(user)
        if name in ops.SHAPE or name in ("sum", "index", "index_add", "scatter_add", "index_put", "roll", "slice", "getitem", "mean"):
            return user.args[0] is node or name in ("index_add", "scatter_add", "index_put")
        return ops.is_pointwise(user)


def whole(projection: Projection) -> Part:
    """All rows that a projection uses, as one part."""
    return Part(projection, projection.rows)


def _same_size(node: fx.Node, other: fx.Node) -> bool:
    a, b = ops.shape_of(node), ops.shape_of(other)
    return a is None or b is None or len(a) == len(b)
