"""Attention blocks and feed-forward blocks, found from the products, softmaxes and gates of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from surgery.model.anatomy import ops
from surgery.model.anatomy.graphview import GraphView, IntArray, Norm, Projection
from surgery.model.anatomy.labels import Labels


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


@dataclass(eq=False)
class Exit:
    """Where a sublayer joins the residual stream: ``output`` and ``residual`` are the operands of ``add``."""

    output: fx.Node
    residual: fx.Node
    add: fx.Node
    joined: fx.Node
    """The operand of ``add`` that carries this sublayer, after the outputs of parallel sublayers were added to it."""
    norms: list[Norm] = field(default_factory=list)


@dataclass(eq=False)
class Core:
    """One scaled dot product attention: its operands, output and mask."""

    node: fx.Node
    q: fx.Node
    k: fx.Node
    v: fx.Node
    mask: fx.Node | None
    causal: bool
    scores: tuple[fx.Node, ...] = ()
    """The products that make the scores, where they stand apart from the rest."""


@dataclass(eq=False)
class Attention:
    core: Core
    parts: dict[str, Part]
    input: fx.Node
    memory: fx.Node | None
    exit: Exit | None
    cross: bool
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    value_dim: int | None
    q_norms: list[Norm] = field(default_factory=list)
    k_norms: list[Norm] = field(default_factory=list)
    tables: list[fx.Node] = field(default_factory=list)
    """Parameters added to the scores."""
    inner_norms: list[Norm] = field(default_factory=list)
    """Norms between the attention and its output projection."""


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


class Blocks:
    """Finds the blocks of one graph."""

    def __init__(self, view: GraphView, labels: Labels) -> None:
        self.view = view
        self.labels = labels
        self._causal: dict[fx.Node, bool] = {}
        self.attentions = [a for a in map(self._attention, self._cores()) if a is not None]
        self._taken = {p.projection for a in self.attentions for p in a.parts.values()}
        self.feed_forwards = list(self._feed_forwards())
        self._routers()

    # ---------------------------------------------------------------- helpers

    def activations(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that carry data of the batch, without what attached modules contribute."""
        found = [n for n in ops.tensors(node) if not self.view.constant[n] and ops.is_activation(n)]
        own = [n for n in found if not self.attached(n)]
        return own or found

    def attached(self, node: fx.Node) -> bool:
        """The value comes from an opaque module (something that surgery added), up to scales and views."""
        while True:
            if node.op == "call_module":
                return True
            if node.op != "call_function" or node in self.view.by_node:
                return False
            inputs = [n for n in ops.tensors(node) if not self.view.constant[n]]
            if len(inputs) != 1 or not (ops.name_of(node) in ops.SHAPE or ops.is_pointwise(node)):
                return False
            node = inputs[0]

    def from_projection(self, node: fx.Node) -> bool:
        """The value is a projection's output up to scales, views and dropout: a sublayer's contribution, not a stream."""
        while True:
            if node in self.view.by_node:
                return True
            if node.op != "call_function":
                return False
            name = ops.name_of(node)
            if name in ops.SHAPE or name in ops.GATHER or ops.is_pointwise(node) or name in ("sum", "index_add"):
                inputs = self.activations(node)
                if len(inputs) != 1 and name != "mul":
                    return False
                if not inputs:
                    return False
                node = inputs[0]
            else:
                return False

    def upstream(self, node: fx.Node) -> set[fx.Node]:
        """The values that a sublayer's input is, behind views, casts and the norm in front."""
        found: set[fx.Node] = set()
        for _ in range(16):
            found.add(node)
            norm = self.view.norm_of.get(node)
            if norm is not None:
                node = norm.x
            elif ops.name_of(node) in ops.SHAPE or ops.name_of(node) in ops.GATHER:
                node = node.all_input_nodes[0]
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
                if name == "add" and len(both := self.activations(user)) == 2 and both[0] is not both[1]:
                    other = both[1] if both[0] is node else both[0]
                    if _same_size(user, node):
                        if not self.upstream(other) & streams and self.from_projection(other):
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

    # ---------------------------------------------------------------- attention

    def _cores(self) -> Iterator[Core]:
        for node in self.view.nodes:
            name = ops.name_of(node)
            if name == "scaled_dot_product_attention":
                args = node.args
                mask = args[3] if len(args) > 3 else node.kwargs.get("attn_mask")
                flag = bool(args[5] if len(args) > 5 else node.kwargs.get("is_causal", False))
                mask = mask if isinstance(mask, fx.Node) else None
                q, k, v = (a for a in args[:3] if isinstance(a, fx.Node))
                yield Core(node, q, k, v, mask, flag or self.is_causal(mask))
            elif name in ("softmax", "_softmax"):
                core = self._softmax_core(node)
                if core is not None:
                    yield core

    def _softmax_core(self, softmax: fx.Node) -> Core | None:
        node = softmax
        context: fx.Node | None = None
        for _ in range(8):
            users = self.view.users(node)
            context = next((u for u in users if ops.name_of(u) in ops.MATMUL and u not in self.view.by_node), None)
            if context is not None:
                break
            step = next((u for u in users if ops.name_of(u) in ops.SHAPE), None)
            if step is None:
                return None
            node = step
        if context is None:
            return None
        operands = [n for n in ops.tensors(context) if n is not node]
        if len(operands) != 1:
            return None
        scores = [n for n in self._score_products(softmax)]
        if not scores:
            return None
        mask: list[fx.Node] = []
        node = ops.tensors(softmax)[0]
        score = scores[0]
        for _ in range(12):
            if node is score:
                break
            inputs = ops.tensors(node)
            if len(inputs) > 1:
                mask += inputs[1:]
            if not inputs:
                break
            node = inputs[0]
        pair = ops.tensors(score)[-2:]
        causal = any(map(self.is_causal, mask))
        return Core(context, pair[0], pair[1], operands[0], mask[0] if mask else None, causal, tuple(scores))

    def _score_products(self, softmax: fx.Node) -> list[fx.Node]:
        """Products behind a softmax through elementwise and shape ops; the one whose operands both come from data first."""
        found: list[fx.Node] = []
        walk = self.view.backward(softmax)
        skip: bool | None = None
        while True:
            try:
                node = walk.send(skip) if skip is not None else next(walk)
            except StopIteration:
                break
            name = ops.name_of(node)
            if node is softmax:
                skip = False
            elif name in ops.MATMUL and node not in self.view.by_node:
                found.append(node)
                skip = True
            else:
                moves = name in ops.SHAPE or name in ops.PARTS or name in ops.GATHER or ops.is_pointwise(node)
                skip = not moves or self.view.constant[node] or node.op != "call_function"
        with_sources = [n for n in found if all(self.labels.sources(t) for t in ops.tensors(n)[-2:])]
        return sorted(with_sources, key=self.view.position.__getitem__)

    def is_causal(self, mask: fx.Node | None) -> bool:
        """The mask is made by comparing positions (search stops at projections and embeddings)."""
        if mask is None:
            return False
        known = self._causal.get(mask)
        if known is None:
            known = False
            walk = self.view.backward(mask)
            skip: bool | None = None
            while True:
                try:
                    node = walk.send(skip) if skip is not None else next(walk)
                except StopIteration:
                    break
                name = ops.name_of(node)
                if name in ops.COMPARE and (name.startswith("tri") or self._compares_positions(node)):
                    known = True
                    break
                skip = node in self.view.by_node or name == "embedding"
            self._causal[mask] = known
        return known

    def _compares_positions(self, node: fx.Node) -> bool:
        """Both sides of the comparison count positions along different axes."""
        sides = ops.tensors(node)
        return len(sides) == 2 and sides[0] is not sides[1] and all(self._counts(s) for s in sides)

    def _counts(self, node: fx.Node) -> bool:
        for _ in range(32):
            name = ops.name_of(node)
            if name in ("arange", "cumsum"):
                return True
            inputs = ops.tensors(node)
            if not inputs:
                return node.op == "placeholder" and not ops.is_activation(node)
            node = inputs[0]
        return False

    def _attention(self, core: Core) -> Attention | None:
        parts: dict[str, Part] = {}
        for role, value in (("q", core.q), ("k", core.k), ("v", core.v)):
            sources = self.labels.sources(value)
            if sources:
                parts[role] = Part(*sources[0])
        if not parts:
            return None
        sdpa = ops.name_of(core.node) == "scaled_dot_product_attention"
        head_dim = _int((ops.shape_of(core.q) or (None,))[-1])
        value_dim = _int((ops.shape_of(core.v) or (None,))[-1])
        if not sdpa and head_dim is None:
            head_dim = _int((ops.shape_of(core.k) or (None, None))[-2])
        between: list[Norm] = []
        out = self._output_projection(core, between)
        if out is not None:
            parts["o"] = Part(out, np.unique(out.rows))
        q = parts.get("q")
        first = q or next(iter(parts.values()))
        target = self.view.strip(first.projection.x, gather=True, dropout=False)
        key = parts.get("k") or parts.get("v")
        memory = self.view.strip(key.projection.x, gather=True) if key else None
        cross = memory is not None and q is not None and self._stream(target) is not self._stream(memory)
        trail = {r: self.labels.visited(v) for r, v in (("q", core.q), ("k", core.k))}
        inside: dict[str, list[Norm]] = {}
        for role, nodes in trail.items():
            inside[role] = [n for n in dict.fromkeys(self.view.norm_of[x] for x in nodes if x in self.view.norm_of)]
        return Attention(
            core, parts, target, memory if cross else None, self.exit(out.node, target) if out else None, cross,
            _count(q, head_dim), _count(parts.get("k"), head_dim), head_dim, value_dim, inside["q"], inside["k"],
            self._tables(core), between,
        )  # fmt: skip

    def _output_projection(self, core: Core, between: list[Norm]) -> Projection | None:
        node: fx.Node = core.node
        for _ in range(32):
            users = self.view.users(node)
            found = next((self.view.by_node[u] for u in users if u in self.view.by_node and self.view.by_node[u].x is node), None)
            if found is not None:
                return found
            norm = next(iter(self._norms_at(node)), None)
            if norm is not None:
                between.append(norm)
                node = norm.out
                continue
            step = next((u for u in users if self._passes(u, node)), None)
            if step is None:
                return None
            node = step
        return None

    def _stream(self, node: fx.Node) -> fx.Node:
        """The value that a projection's input was computed from, behind norms, projections and elementwise ops of one input."""
        for _ in range(256):
            norm = self.view.norm_of.get(node) or self.view.norm_inner.get(node)
            if norm is not None:
                node = norm.x
                continue
            projection = self.view.by_node.get(node)
            if projection is not None:
                node = projection.x
                continue
            name = ops.name_of(node)
            inputs = [n for n in ops.tensors(node) if not self.view.constant[n] and ops.is_activation(n)]
            moves = name in ops.SHAPE or name in ops.PARTS or name in ops.GATHER or ops.is_pointwise(node)
            if node.op == "call_module" or (moves and len(inputs) == 1):
                node = node.all_input_nodes[0] if node.op == "call_module" else inputs[0]
                continue
            return node
        return node

    def _tables(self, core: Core) -> list[fx.Node]:
        """Float parameters that are looked up or added to make the mask: relative position tables."""
        if core.mask is None:
            return []
        found: dict[fx.Node, None] = {}
        walk = self.view.backward(core.mask)
        skip: bool | None = None
        while True:
            try:
                node = walk.send(skip) if skip is not None else next(walk)
            except StopIteration:
                break
            if node.op == "get_attr" and node.meta.get("parameter") and node.meta["spec"].dtype.startswith(("float", "bfloat")):
                found[node] = None
            skip = node in self.view.by_node or node.op == "placeholder"
        return list(found)

    # ---------------------------------------------------------------- feed-forward

    def _feed_forwards(self) -> Iterator[FeedForward]:
        for down in self.view.projections:
            if down in self._taken or not _pointlike(down):
                continue
            found = self._trace(down)
            if found is None:
                continue
            parts, activation, gated, norms = found
            used = {p.projection for p in parts.values()}
            if used & self._taken or not all(_pointlike(p) for p in used):
                continue
            source = self.view.strip(parts["up"].projection.x, gather=True, dropout=False)
            joined = self.exit(down.node, source)
            if joined is None:
                continue
            parts["down"] = Part(down, np.unique(down.rows))
            self._taken |= {p.projection for p in parts.values()}
            block = FeedForward(parts, source, joined, activation, gated, norms=norms)
            if down.kind == "experts":
                block.experts = down.stored[0]
            yield block

    def _trace(self, down: Projection) -> tuple[dict[str, Part], str, bool, list[Norm]] | None:
        node = down.x
        trail: list[fx.Node] = []
        norms: list[Norm] = []
        for _ in range(40):
            projection = self.view.by_node.get(node)
            if projection is not None:
                return {"up": Part(projection, np.unique(projection.rows))}, activation_of(trail), False, norms
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
            if name in ops.PARTS and (sources := self.labels.sources(node)):
                return {"up": Part(*sources[0])}, activation_of(trail), False, norms
            if not ops.is_pointwise(node):
                return None
            inputs = self.activations(node)
            if len(inputs) == 1:
                trail.append(node)
                node = inputs[0]
                continue
            if len(inputs) != 2:
                return None
            sides = [self._branch(n) for n in inputs]
            if sides[0] is None or sides[1] is None:
                return None
            (first, left), (second, right) = sides
            if first.same(second):
                return {"up": first}, activation_of([*trail, node, *left, *right]), False, norms
            if name != "mul":
                return None
            gate_first = bool(activation_of(left)) or not activation_of(right)
            gate, up = (first, second) if gate_first else (second, first)
            return {"up": up, "gate": gate}, activation_of(left if gate_first else right), True, norms
        return None

    def _halves(self, glu: fx.Node, trail: list[fx.Node], norms: list[Norm]) -> tuple[dict[str, Part], str, bool, list[Norm]] | None:
        sources = self.labels.sources(glu.all_input_nodes[0])
        if not sources or len(sources[0][1]) % 2:
            return None
        projection, rows = sources[0]
        half = len(rows) // 2
        return {"up": Part(projection, rows[:half]), "gate": Part(projection, rows[half:])}, "sigmoid", True, norms

    def _branch(self, start: fx.Node) -> tuple[Part, list[fx.Node]] | None:
        """The one projection behind an operand of a gate, with the elementwise ops between."""
        sources = self.labels.sources(start)
        if not sources or len(sources) > 1:
            return None
        trail = [n for n in self.labels.visited(start) if n not in self.view.by_node and ops.is_pointwise(n)]
        return Part(*sources[0]), trail

    def _routers(self) -> None:
        """Projections whose scores go to a top-k select the experts of the block with the same input."""
        for node in self.view.nodes:
            if ops.name_of(node) != "topk":
                continue
            value: fx.Node = node.all_input_nodes[0]
            for _ in range(16):
                if value in self.view.by_node:
                    break
                inputs = [n for n in ops.tensors(value) if not self.view.constant[n]]
                if not inputs:
                    break
                value = inputs[0]
            projection = self.view.by_node.get(value)
            if projection is None:
                continue
            source = self.view.strip(projection.x, gather=True, dropout=False)
            for block in self.feed_forwards:
                if block.experts == len(projection.rows) and block.input is source and block.router is None:
                    block.router = Part(projection, np.unique(projection.rows))
                    block.top_k = _int(node.args[1])
                    self._taken.add(projection)


# ---------------------------------------------------------------- small facts


def whole(projection: Projection) -> Part:
    """All rows that a projection uses, as one part."""
    return Part(projection, np.unique(projection.rows))


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


def _same_size(node: fx.Node, other: fx.Node) -> bool:
    a, b = ops.shape_of(node), ops.shape_of(other)
    return a is None or b is None or len(a) == len(b)


def _int(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _count(part: Part | None, width: int | None) -> int | None:
    if part is None or not width or len(part.rows) % width:
        return None
    return len(part.rows) // width
