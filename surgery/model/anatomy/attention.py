"""Attention blocks, found from fused attentions and from softmaxes between two products.

Rows, heads, groups and widths are queries over the dimension classes. The graph is followed only for what classes do not hold: which
products stand around a softmax, whether a mask compares positions, which value a block reads and where its output goes, and which
parameters are added to the scores (a class says that a table has heads, not that it is used before the softmax).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import prod

import numpy as np
from torch import fx

from surgery.model.anatomy import ops
from surgery.model.anatomy.graphview import GraphView
from surgery.model.anatomy.products import Norm, Projection
from surgery.model.anatomy.sources import Sources
from surgery.model.anatomy.streams import Exit, Part, Streams
from surgery.model.dims import Axis, Leaf
from surgery.model.twins import Lost


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
    sinks: tuple[fx.Node, ...] = ()
    """Parameters that the softmax counts as scores of a position without a value (Xiao et al., arXiv:2309.17453)."""
    added: tuple[fx.Node, ...] = ()
    """Everything else that is added to the scores besides ``mask``, such as a table of positions that is no part of it."""

    def moved(self, node: Callable[[fx.Node], fx.Node]) -> Core:
        """The same in a copy of the layer: what stands in the place of its nodes."""
        scores, sinks, added = (tuple(map(node, nodes)) for nodes in (self.scores, self.sinks, self.added))
        mask = self.mask and node(self.mask)
        return Core(node(self.node), node(self.q), node(self.k), node(self.v), mask, self.causal, scores, sinks, added)


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
    lender: Attention | None = None
    """The earlier block whose keys and values this one reads: it has none of its own (Gemma 3n)."""
    spans: dict[str, tuple[Projection, dict[Leaf, int]]] = field(default_factory=dict)
    """What the numbers of the block are products of: a projection that stores it, and classes with the units that count."""
    also: list[Core] = field(default_factory=list)
    """Further attentions that the block is made of."""


class Attentions(Streams):
    """Finds the attention blocks of one graph, in order of execution, as ``found``."""

    def __init__(self, view: GraphView, sources: Sources) -> None:
        super().__init__(view, sources)
        self._causal: dict[fx.Node, bool] = {}
        self._first: dict[Projection, Attention] = {}
        self.found: list[Attention] = []
        copies = view.copies
        spans: dict[int, slice] = {}
        for i, run in enumerate(copies.runs):
            made = self._copied(i, self.found[spans[copies.of[i]]]) if i in copies.of else None
            before = len(self.found)
            for found in made if made is not None else map(self._attention, self._cores(run.nodes)):
                if found is not None and (made is not None or not self._joins(found)):
                    self.found.append(found)
                    for role in ("k", "v"):
                        if role in found.parts:
                            self._first.setdefault(found.parts[role].projection, found)
            spans[i] = slice(before, len(self.found))

    def _copied(self, i: int, blocks: list[Attention]) -> list[Attention] | None:
        """The blocks of a copy of the layer that has ``blocks``; None where they do not follow."""
        try:
            return [self._copy(i, block) for block in blocks] if all(b.lender is None for b in blocks) else None
        except Lost:
            return None

    def _copy(self, i: int, block: Attention) -> Attention:
        node, norm, part = self.copier(i)
        core = block.core.moved(node)
        parts = {role: part(p) for role, p in block.parts.items()}
        return replace(
            block, core=core, parts=parts, input=node(block.input), memory=block.memory and node(block.memory),
            exit=self.copied_exit(i, block.exit), q_norms=[*map(norm, block.q_norms)], k_norms=[*map(norm, block.k_norms)],
            tables=[*map(node, block.tables)], inner_norms=[*map(norm, block.inner_norms)], spans=self._spans(core, parts, self._width(core)),
            also=[c.moved(node) for c in block.also],
        )  # fmt: skip

    def _joins(self, found: Attention) -> bool:
        """Attention that runs again with the same queries and keys on other rows of one product's values belongs to the block before, which has all of
        those values (differential attention, arXiv:2410.05258)."""
        if not self.found or not {"q", "k", "v", "o"} <= found.parts.keys():
            return False
        before = self.found[-1]
        if not all(r in before.parts and before.parts[r].same(found.parts[r]) for r in "qko"):
            return False
        values, others = before.parts.get("v"), found.parts["v"]
        if values is None or values.projection is not others.projection or np.intersect1d(values.rows, others.rows).size:
            return False
        before.parts["v"] = Part(values.projection, np.union1d(values.rows, others.rows))
        before.also.append(found.core)
        return True

    def _cores(self, nodes: list[fx.Node]) -> Iterator[Core]:
        for node in nodes:
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
        for _ in range(12):
            users = self.view.users(node)
            context = next((u for u in users if ops.name_of(u) in ops.MATMUL and u not in self.view.by_node), None)
            if context is not None:
                break
            step = next((u for u in users if ops.name_of(u) in ops.SHAPE or ops.name_of(u) in ("slice", "masked_fill", "pad")), None)
            if step is None:
                return None
            node = step
        if context is None:
            return None
        operands = [n for n in self.view.inputs(context) if n is not node]
        if len(operands) != 1:
            return None
        scores = [n for n in self._score_products(softmax)]
        if not scores:
            return None
        mask: list[fx.Node] = []
        sinks: list[fx.Node] = []
        node = self.view.inputs(softmax)[0]
        score = scores[0]
        for _ in range(12):
            if node is score:
                break
            inputs = self.view.inputs(node)
            if ops.name_of(node) == "cat":
                sinks += [p for p in map(self.view.parameter, inputs[1:]) if p is not None]
            elif len(inputs) > 1 and not _is_maximum(inputs[1], inputs[0]):
                mask += inputs[1:]
            if not inputs:
                break
            node = inputs[0]
        pair = self.view.inputs(score)[-2:]
        causal = any(map(self.is_causal, mask))
        return Core(context, pair[0], pair[1], operands[0], mask[0] if mask else None, causal, tuple(scores), tuple(sinks), tuple(mask[1:]))

    def _score_products(self, softmax: fx.Node) -> list[fx.Node]:
        """Products behind a softmax through elementwise and shape ops; the one whose operands both come from data first."""
        found: list[fx.Node] = []

        def stop(node: fx.Node) -> bool:
            name = ops.name_of(node)
            if node is softmax:
                return False
            moves = name in ops.SHAPE or name in ops.PARTS or name in ops.GATHER or ops.is_pointwise(node)
            moves = moves or (name == "cat" and sum(not self.view.constant[n] for n in self.view.inputs(node)) == 1)
            return not moves or self.view.constant[node] or node.op != "call_function"

        starts = [softmax]
        for start in starts:  # scores may be put together in memory of their own
            for node in self.view.backward(start, stop):
                if ops.name_of(node) in ops.MATMUL and node not in self.view.by_node and node not in found:
                    found.append(node)
                starts += [n for n in self.sources.written(node) if n not in starts]
        with_sources = [n for n in found if all(self.sources.reach(t) for t in self.view.inputs(n)[-2:])]
        return sorted(with_sources, key=self.view.position.__getitem__)

    def is_causal(self, mask: fx.Node | None) -> bool:
        """The mask is made by comparing positions (search stops at projections and embeddings)."""
        if mask is None:
            return False
        known = self._causal.get(mask)
        if known is None:
            known = any(
                name.startswith("tri") or self._compares_positions(node)
                for node in self.view.backward(mask, lambda n: n in self.view.by_node or ops.name_of(n) == "embedding")
                if (name := ops.name_of(node)) in ops.COMPARE
            )
            self._causal[mask] = known
        return known

    def _compares_positions(self, node: fx.Node) -> bool:
        """Both sides of the comparison count positions along different axes."""
        sides = self.view.inputs(node)
        return len(sides) == 2 and sides[0] is not sides[1] and all(self._counts(s) for s in sides)

    def _counts(self, node: fx.Node) -> bool:
        for _ in range(32):
            name = ops.name_of(node)
            if name in ("arange", "cumsum"):
                return True
            inputs = self.view.inputs(node)
            if not inputs:
                return node.op == "placeholder" and not ops.is_activation(node)
            node = inputs[0]
        return False

    def _attention(self, core: Core) -> Attention | None:
        parts: dict[str, Part] = {}
        for role, value in (("q", core.q), ("k", core.k), ("v", core.v)):
            sources = self.sources.of(value)
            if sources:
                parts[role] = sources[0]
        if not parts:
            return None
        width = self._width(core)
        head_dim, value_dim = self._size(width), self._size(self.dims.axes(core.v)[-1])
        between: list[Norm] = []
        out = self._output_projection(core, between)
        if out is not None:
            parts["o"] = Part(out, out.rows)
        q = parts.get("q")
        lender = self._lender(parts)
        if lender is not None:
            parts = {r: p for r, p in parts.items() if r in ("q", "o")}
        first = q or next(iter(parts.values()))
        target = self.view.strip(first.projection.x, gather=True, dropout=False)
        key = parts.get("k") or parts.get("v")
        memory = self.view.strip(key.projection.x, gather=True) if key else None
        cross = memory is not None and q is not None and self._stream(target) is not self._stream(memory)
        trail = {r: self.sources.visited(v) for r, v in (("q", core.q), ("k", core.k)) if r == "q" or lender is None}
        inside: dict[str, list[Norm]] = {"k": []}
        for role, nodes in trail.items():
            inside[role] = [n for n in dict.fromkeys(self.view.norm_of[x] for x in nodes if x in self.view.norm_of)]
        spans = self._spans(core, parts, width)
        heads = self._count(spans.get("heads"))
        kv_heads = lender.kv_heads if lender else self._count(spans.get("kv_heads"))
        return Attention(
            core, parts, target, memory if cross else None, self.exit(out.node, target) if out else None, cross,
            heads, kv_heads, head_dim, value_dim, inside["q"], inside["k"], self._tables(core), between, lender, spans,
        )  # fmt: skip

    def _width(self, core: Core) -> Axis:
        """What the scores sum over."""
        width: Axis = self.dims.axes(core.q)[-1]
        if self.dims.symbolic(width):
            sdpa = ops.name_of(core.node) == "scaled_dot_product_attention"
            width = self.dims.axes(core.k)[-1 if sdpa else -2]
        return width

    def _lender(self, parts: dict[str, Part]) -> Attention | None:
        """The earlier self-attention whose keys and values, the very same products, a block with queries of its own reads. Several
        attentions over one product's queries, keys and values are parts of one block and lend nothing."""
        if not {"q", "k", "v"} <= parts.keys():
            return None
        first = self._first.get(parts["k"].projection)
        if first is None or first.cross or first is not self._first.get(parts["v"].projection) or "q" not in first.parts:
            return None
        return None if parts["q"].projection in {p.projection for p in first.parts.values()} else first

    def _spans(self, core: Core, parts: dict[str, Part], width: Axis) -> dict[str, tuple[Projection, dict[Leaf, int]]]:
        """The classes that the block's numbers are products of, with the projections that store them."""
        found = {}
        for name, role, operand in (("heads", "q", core.q), ("kv_heads", "k", core.k)):
            if (part := parts.get(role)) is not None:
                found[name] = part.projection, self.sources.heads(part, operand, width)
        for name, roles, axis in (("head_dim", "qk", width), ("value_dim", "v", self.dims.axes(core.v)[-1])):
            holder = next((parts[r].projection for r in roles if r in parts), None)
            if holder is not None:
                found[name] = holder, {leaf: leaf.size for leaf in self.dims.leaves(axis)}
        return found

    @staticmethod
    def _count(span: tuple[Projection, dict[Leaf, int]] | None) -> int | None:
        return None if span is None else prod(span[1].values())

    def _size(self, axis: Axis) -> int | None:
        return None if self.dims.symbolic(axis) else self.dims.size(axis)

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
            # other heads beside these, such as those of a convolution (ConvBERT, arXiv:2008.02496)
            step = step or next((u for u in users if ops.name_of(u) == "cat"), None)
            # halves of the heads that are taken from each other (differential attention, arXiv:2410.05258)
            step = step or next((u for u in users if ops.name_of(u) in ops.PARTS), None)
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
            inputs = [n for n in self.view.inputs(node) if not self.view.constant[n] and ops.is_activation(n)]
            moves = name in ops.SHAPE or name in ops.PARTS or name in ops.GATHER or ops.is_pointwise(node)
            if name == "cat":  # a cache of what is projected to keys and values later (latent attention) grows by the stream's own part
                inputs, moves = [n for n in inputs if n.op != "placeholder"], True
            elif name == "getitem":
                inputs, moves = node.all_input_nodes, True
            if node.op == "call_module" or (moves and len(inputs) == 1):
                node = node.all_input_nodes[0] if node.op == "call_module" else inputs[0]
                continue
            return node
        return node

    def _tables(self, core: Core) -> list[fx.Node]:
        """Float parameters that are looked up or added to make the mask: relative position tables."""
        if core.mask is None:
            return []

        def stop(node: fx.Node) -> bool:
            name = ops.name_of(node)
            products = name in ops.MATMUL or name in ("linear", "addmm")
            # these read sizes and types of their input, not its values
            return node.op == "placeholder" or products or name.startswith("new_") or name.endswith("_like")

        every = [n for start in (core.mask, *core.added) for n in self.view.backward(start, stop)]
        reached = (n for n in every if n.op == "get_attr" and n.meta.get("parameter"))
        found = dict.fromkeys(n for n in reached if n.meta["spec"].dtype.startswith(("float", "bfloat")))
        return list(found)


def _is_maximum(node: fx.Node, of: fx.Node) -> bool:
    """What is subtracted in front of a softmax so that no exponential overflows."""
    while ops.name_of(node) == "getitem":
        node = node.all_input_nodes[0]
    return ops.name_of(node) in ("max", "amax") and node.args[0] is of
