"""Feed-forward blocks: a product, an activation or a gate, a product that joins the residual stream; experts and routers.

Rows, widths, experts and routers are queries over the dimension classes. The graph is followed for the operations between the products,
which classes do not hold: they name the activation and tell the gate from the value, two projections of one class.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import sympy
from torch import fx

from surgery.model.anatomy import ops
from surgery.model.anatomy.graphview import GraphView
from surgery.model.anatomy.products import Norm, Projection
from surgery.model.anatomy.sources import Sources
from surgery.model.anatomy.streams import Exit, Part, Streams, whole
from surgery.model.twins import Lost


@dataclass(eq=False)
class FeedForward:
    parts: dict[str, Part]
    input: fx.Node
    exit: Exit
    activation: str
    gated: bool
    experts: int | None = None
    top_k: int | None = None
    router: Part | None = None
    norms: list[Norm] = field(default_factory=list)


class FeedForwards(Streams):
    """Finds the feed-forward blocks of one graph, in order of execution, as ``found``; ``taken`` are the projections of other blocks."""

    def __init__(self, view: GraphView, sources: Sources, taken: set[Projection]) -> None:
        super().__init__(view, sources)
        self._taken = set(taken)
        self.found = list(self._feed_forwards())
        self._routers()

    def _feed_forwards(self) -> Iterator[FeedForward]:
        found: dict[Projection, FeedForward] = {}
        for down in self.view.projections:
            if down in self._taken or not _pointlike(down):
                continue
            i, first = self.view.copied.get(down, (0, None))
            try:
                block = self._block(down) if first is None else self._copy(i, found.get(first))
            except Lost:
                block = self._block(down)
            if block is not None:
                found[down] = block
                self._taken |= {p.projection for p in block.parts.values()}
                yield block

    def _copy(self, i: int, block: FeedForward | None) -> FeedForward | None:
        """What stands at run ``i``, a copy, for a block of the layer that it is a copy of. Raises Lost."""
        if block is None:
            return None
        node, norm, part = self.copier(i)
        parts = {role: part(p) for role, p in block.parts.items()}
        exit = self.copied_exit(i, block.exit)
        assert exit is not None
        return replace(block, parts=parts, input=node(block.input), exit=exit, norms=[*map(norm, block.norms)])

    def _block(self, down: Projection) -> FeedForward | None:
        """The block whose last product is ``down``."""
        found = self._trace(down)
        if found is None:
            return None
        parts, activation, gated, norms = found
        used = {p.projection for p in parts.values()}
        if used & self._taken or not all(_pointlike(p) for p in used):
            return None
        source = self.view.strip(parts["up"].projection.x, gather=True, dropout=False)
        joined = self.exit(down.node, source)
        if joined is None or self._only_weighs(parts["up"].projection, down) or self._remembers(down):
            return None
        parts["down"] = Part(down, down.rows)
        return FeedForward(parts, source, joined, activation, gated, down.stored[0] if down.kind == "experts" else None, norms=norms)

    def _only_weighs(self, up: Projection, down: Projection) -> bool:
        """The last product gives no features of the stream that the first one reads: its outputs weigh other values, such as the streams
        that a layer keeps side by side (AltUp, arXiv:2301.13310)."""
        read, given = (set(self.dims.leaves(self.dims.parameter(p.weight)[axis])) for p, axis in ((up, up.in_axis), (down, down.out_axis)))
        return bool(read and given) and not read & given

    def _remembers(self, down: Projection) -> bool:
        """What the last product reads was gathered along the sequence, as in RWKV (arXiv:2305.13048): a gate in it makes no feed-forward block."""
        between = self.view.backward(down.x, lambda n: n in self.view.by_node)
        return any(ops.name_of(n) in ops.SCANS and n.meta["spec"].dtype.startswith(("float", "bfloat")) for n in between)

    def _trace(self, down: Projection) -> tuple[dict[str, Part], str, bool, list[Norm]] | None:
        node = down.x
        trail: list[fx.Node] = []
        norms: list[Norm] = []
        for _ in range(40):
            projection = self.view.by_node.get(node)
            if projection is not None:
                return {"up": Part(projection, projection.rows)}, activation_of(trail), False, norms
            norm = self.view.norm_of.get(node)
            if norm is not None:
                norms.append(norm)
                node = norm.x
                continue
            name = ops.name_of(node)
            if name == "glu":
                return self._halves(node, trail, norms)
            if node.op == "call_module" or name in ops.SHAPE or name in ops.GATHER:
                node = node.all_input_nodes[0]
                continue
            if name in ops.PARTS and (sources := self.sources.of(node)):
                return {"up": sources[0]}, activation_of(trail), False, norms
            if not ops.is_pointwise(node):
                return None
            inputs = self.view.activations(node)
            if len(inputs) == 1:
                trail.append(node)
                node = inputs[0]
                continue
            if len(inputs) != 2:
                return None
            first, second = self._only_source(inputs[0]), self._only_source(inputs[1])
            if first is None or second is None:
                return None
            same = first.same(second)
            if not same and name != "mul":
                return None
            left, right = self._between(inputs[0]), self._between(inputs[1])
            if same:
                return {"up": first}, activation_of([*trail, node, *left, *right]), False, norms
            gate_first = bool(activation_of(left)) or not activation_of(right)
            gate, up = (first, second) if gate_first else (second, first)
            return {"up": up, "gate": gate}, activation_of(left if gate_first else right), True, norms
        return None

    def _halves(self, glu: fx.Node, trail: list[fx.Node], norms: list[Norm]) -> tuple[dict[str, Part], str, bool, list[Norm]] | None:
        sources = self.sources.of(glu.all_input_nodes[0])
        if not sources or len(sources[0].rows) % 2:
            return None
        projection, rows = sources[0].projection, sources[0].rows
        half = len(rows) // 2
        return {"up": Part(projection, rows[:half]), "gate": Part(projection, rows[half:])}, "sigmoid", True, norms

    def _only_source(self, start: fx.Node) -> Part | None:
        """The one projection behind an operand of a gate."""
        sources = self.sources.of(start)
        return sources[0] if len(sources) == 1 else None

    def _between(self, start: fx.Node) -> list[fx.Node]:
        """The elementwise ops between an operand and the projections behind it."""
        return [n for n in self.sources.visited(start) if n not in self.view.by_node and ops.is_pointwise(n)]

    def _routers(self) -> None:
        """The projection whose scores choose among stored experts: its outputs are their class.

        Where the numbers of the experts escape the classes (see ``dims.domains``) a router has a class of its own: then it is the one with as many units
        that a top-k picks from and that reads the block's input.
        """
        dims = self.dims
        for projection in self.view.projections:
            if projection in self._taken:
                continue
            axis = self.sources.out_axis(projection)
            top_k = dims.picks(axis)
            source = self.view.strip(projection.x, gather=True)  # routers may look at a noisy input
            alike: list[FeedForward] = []
            for block in self.found:
                if block.experts is None or block.router is not None:
                    continue
                experts = dims.parameter(block.parts["down"].projection.weight)[0]
                near = self.view.strip(block.input, gather=True) is source
                if dims.same(experts, axis):
                    alike.insert(0 if near else len(alike), block)  # one that is read at the same place goes first
                elif near and top_k is not None and dims.size(experts) == dims.size(axis):
                    alike.append(block)
            if alike:
                block = alike[0]
                block.router, block.top_k = whole(projection), top_k if top_k is not None else _choices(block, projection)
                self._taken.add(projection)


def _choices(block: FeedForward, router: Projection) -> int | None:
    """How many experts each token is sent to, where no top-k says it: the rows that experts see for each row that the router sees."""
    seen, rows = ops.shape_of(router.x), ops.shape_of(block.parts["up"].projection.x)
    if block.experts is None or seen is None or rows is None or len(rows) != 2:
        return None
    share = sympy.simplify(sympy.sympify(rows[0]) / sympy.Mul(*map(sympy.sympify, seen[:-1])))
    return int(share) if share.is_Integer and 0 < share <= block.experts else None


def activation_of(trail: list[fx.Node]) -> str:
    """Name of the activation that a run of elementwise ops computes; empty when there is none."""
    names = [ops.name_of(n) for n in trail]
    for node, name in zip(trail, names, strict=True):
        if name == "gelu":
            return "gelu_tanh" if "tanh" in (*node.args, *node.kwargs.values()) else "gelu"
        if name in ("silu", "mish", "hardswish", "elu", "selu", "celu", "leaky_relu", "softplus", "relu6", "prelu", "softsign"):
            return name
    if "relu" in names:
        return "relu2" if "pow" in names or "square" in names else "relu"
    if "erf" in names:
        return "gelu"
    if "tanh" in names:
        return "gelu_tanh" if "pow" in names else "tanh"
    if "sigmoid" in names:
        scale = [a for n in trail if ops.name_of(n) == "mul" for a in n.args if isinstance(a, float)]
        if any(abs(a - 1.702) < 1e-3 for a in scale):
            return "quick_gelu"
        return "silu" if "mul" in names else "sigmoid"
    return ""


def _pointlike(projection: Projection) -> bool:
    """Acts on features only: no convolution over neighbours."""
    return projection.kind != "conv" or all(n == 1 for n in projection.stored[2:])
