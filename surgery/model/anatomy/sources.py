"""Which rows of which projection reach a value: what the parts taken on the way leave of the projection's output axis.

The dimension classes know what every slice, split and selection takes of which axis (:meth:`Dims.cut_of`) and which positions of a
stored axis survive a chain of them (:meth:`Dims.rows`). What they do not record is the way itself: two classes can be one and still
stand for different rows (both halves of a gated product are one class). So the graph is followed from the value back to the products, each
node once, along the operands that carry its features; nothing is moved along but the cuts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from torch import fx

from surgery.model.anatomy import ops
from surgery.model.anatomy.graphview import GraphView
from surgery.model.anatomy.products import IntArray, Projection
from surgery.model.dims import Axis, Cut, Dims, Leaf
from surgery.model.dims.slices import cuts_within, inside, leaves_at, survivors

Reach = dict[Projection, dict[tuple[Cut, ...], None]]
"""The projections behind a value, each with the different chains of cuts between them, outermost last."""


_MOVED = frozenset(("roll", "pad", "constant_pad_nd", "repeat", "unfold", "movedim"))
"""Operations of one input that leave its features as they are and change how many of them there are along other axes."""
_FRESH = frozenset(("new_empty", "empty", "empty_like", "empty_strided", "new_zeros", "zeros", "zeros_like"))
"""Operations that give memory without values of the model."""


@dataclass(eq=False)
class Part:
    """A projection, or the rows of it, in one role."""

    projection: Projection
    rows: IntArray

    @property
    def whole(self) -> bool:
        return len(self.rows) == self.projection.stored[self.projection.out_axis]

    def same(self, other: Part) -> bool:
        return self.projection is other.projection and np.array_equal(self.rows, other.rows)


class Sources:
    """Memoised answers for one graph."""

    def __init__(self, view: GraphView, dims: Dims) -> None:
        self.view = view
        self.dims = dims
        self._reach: dict[fx.Node, Reach] = {}
        self._inside: dict[Projection, set[Axis]] = {}
        self._lost: dict[Leaf, None] = {}
        self._sources: dict[fx.Node, list[Part]] = {}

    def of(self, node: fx.Node) -> list[Part]:
        """The projections that reach a value, each with the rows that do, largest share first."""
        known = self._sources.get(node)
        if known is None:
            reached = [(p, self._rows(p, chains)) for p, chains in self.reach(node).items()]
            found = [Part(p, rows) for p, rows in reached if rows is not None]
            known = self._sources[node] = sorted(found, key=lambda p: (-len(p.rows), p.projection.order))
        return known

    def reach(self, node: fx.Node) -> Reach:
        """The projections behind a value and the cuts between. Iterative, each node once."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._reach:
                stack.pop()
                continue
            needs = self._inputs(top)
            missing = [n for n in needs if n not in self._reach]
            if missing:
                stack += missing
                continue
            self._reach[top] = self._join(top, needs)
            stack.pop()
        return self._reach[node]

    def visited(self, node: fx.Node) -> list[fx.Node]:
        """The values between the projections and ``node``, nearest to ``node`` first."""
        self.reach(node)
        seen: dict[fx.Node, None] = {}
        stack = [node]
        while stack:
            top = stack.pop()
            if top in seen or not self._reach.get(top):
                continue
            seen[top] = None
            if top not in self.view.by_node:
                stack += self._inputs(top)
        return list(seen)

    def out_axis(self, projection: Projection) -> Axis:
        """The expression of a projection's output features."""
        axis: Axis = self.dims.axes(projection.node)[projection.feature_axis]
        return axis

    def heads(self, part: Part, operand: fx.Node, width: Axis) -> dict[Leaf, int]:
        """What the heads of an operand are made of: classes with the number of their units, to be multiplied. Heads of an operand of attention: the classes that the part's rows and the operand both have, without those of ``width``,
        the axis that the scores sum over. What keys were repeated for is in the operand alone and does not count."""
        dims, projection = self.dims, part.projection
        inner = set(dims.leaves(width))
        there = {leaf for axis in dims.axes(operand) for leaf in dims.leaves(axis)} - inner
        axis = self.out_axis(projection)
        if len(part.rows) == len(projection.rows):
            return {leaf: leaf.size for leaf in dims.leaves(axis) if leaf in there}
        at = np.searchsorted(projection.rows, part.rows)
        return {leaf: units for leaf, units in leaves_at(dims, axis, at).items() if leaf in there}

    # ---------------------------------------------------------------- steps

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        if node in self.view.by_node or node.op in ("placeholder", "get_attr", "output"):
            return []
        name = ops.name_of(node)
        if name in ops.SHAPE or name in ops.PARTS or name in ops.NORMS or name in _MOVED:
            return node.all_input_nodes[:1]
        if name == "index_add":  # rows of experts in their old order, onto zeros
            return [n for n in node.args[3:4] if isinstance(n, fx.Node)]
        if node.op == "call_module":
            return node.all_input_nodes[:1]
        if name in ("cat", "stack", "concat", "copy", "slice_scatter"):
            return self.view.inputs(node)
        if name in _FRESH:
            return self.written(node)
        if ops.is_pointwise(node):
            return self.view.activations(node)
        return []

    def written(self, fresh: fx.Node) -> list[fx.Node]:
        """What is copied into the parts of memory that was asked for without values, as some models put heads together (DeepSeek's keys) or the
        scores of windows (Longformer's); nothing where one of these values is made of the memory itself, or where the node is no such memory."""
        if ops.name_of(fresh) not in _FRESH:
            return []
        parts = [u for u in self.view.users(fresh) if ops.name_of(u) in ops.PARTS]
        for part in parts:
            parts += [u for u in self.view.users(part) if ops.name_of(u) in ops.PARTS]
        copies = [c for p in parts for c in self.view.users(p) if ops.name_of(c) == "copy" and c.args[0] is p]
        values = [c.args[1] for c in copies if isinstance(c.args[1], fx.Node)]
        for value in values:
            if any(n is fresh for n in self.view.backward(value, lambda n: n in self.view.by_node)):
                return []
        return values

    def _join(self, node: fx.Node, needs: list[fx.Node]) -> Reach:
        projection = self.view.by_node.get(node)
        if projection is not None:
            return {projection: {(): None}}
        reached = [n for n in needs if self._reach[n]]
        name = ops.name_of(node)
        if name in ("cat", "stack", "concat", "slice_scatter") or name in _FRESH:
            joined: Reach = {}
            for n in reached:
                for p, chains in self._reach[n].items():
                    joined.setdefault(p, {}).update(chains)
            return joined
        if name not in ops.SHAPE and name not in ops.PARTS and name not in _MOVED and name != "index_add":
            # factors of fewer positions (rotary angles, gates of whole channels) are not what the value is made of
            sizes = self._sizes(node)
            reached = [n for n in reached if self._sizes(n) == sizes]
        found = self._reach[reached[0]] if reached else {}
        cut = self.dims.cut_of(node)
        if cut is None:
            return found
        after: Reach = {}
        for p, chains in found.items():
            if cuts_within(cut, self._parts(p)):
                after[p] = {(*c, cut): None for c in chains}
                self._note_lost(p, node, needs[0])
            elif not self._lost.keys() & set(self.dims.leaves(cut.axis)):
                after[p] = chains
            # else: a part of what the classes lost sight of; its rows are unknown, and none is better than a wrong one
        return after

    def _note_lost(self, projection: Projection, node: fx.Node, source: fx.Node) -> None:
        """Remembers classes that a cut began anew (through the middle of a unit): they stand for features, in an unknown order."""
        if not isinstance(source_axes := self.dims.axes(source), tuple):
            return  # a split: its parts are found again
        known = {leaf for axis in (*source_axes, self.out_axis(projection)) for leaf in self.dims.leaves(axis)}
        self._lost |= {leaf: None for axis in self.dims.axes(node) for leaf in self.dims.leaves(axis) if leaf not in known}

    def _parts(self, projection: Projection) -> set[Axis]:
        known = self._inside.get(projection)
        if known is None:
            known = self._inside[projection] = inside(self.out_axis(projection))
        return known

    def _sizes(self, node: fx.Node) -> list[int] | None:
        axes = self.dims.axes(node)
        return [self.dims.size(a) for a in axes] if isinstance(axes, tuple) else None

    def _rows(self, projection: Projection, chains: Collection[tuple[Cut, ...]]) -> IntArray | None:
        """The rows that any of the chains leaves; None where the classes cannot say, rather than too many."""
        if () in chains:
            return projection.rows
        taken = np.zeros(len(projection.rows), bool)
        for chain in chains:
            try:
                left = survivors(self.dims, self.out_axis(projection), chain)
            except LookupError:
                return None
            for start, stop in left:
                taken[start:stop] = True
        return projection.rows[taken]
