"""Building the sites of the anatomy from the blocks that were found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from torch import fx

from surgery.core.site import Measure, NodeRef, Site
from surgery.model.anatomy import ops
from surgery.model.anatomy.blocks import Attention, FeedForward, Part, whole
from surgery.model.anatomy.graphview import GraphView, ref_in
from surgery.model.anatomy.layers import ConvBlock, Unit
from surgery.model.anatomy.mixers import Mixer
from surgery.model.anatomy.products import Norm, Projection


@dataclass(frozen=True)
class Names:
    """What sites need to know about the stored tensors: shapes, dtypes by name."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    parameters: tuple[str, ...]
    aliases: dict[str, str]

    def under(self, path: str) -> tuple[str, ...]:
        return tuple(self._inside.get(path, ()))

    @cached_property
    def _inside(self) -> dict[str, list[str]]:
        """The parameters below each path."""
        found: dict[str, list[str]] = {}
        for name in self.parameters:
            at = name.find(".")
            while at >= 0:
                found.setdefault(name[:at], []).append(name)
                at = name.find(".", at + 1)
        return found


class Builder:
    """Makes sites; remembers which parameters they account for and which weight had which role first."""

    def __init__(self, view: GraphView, names: Names) -> None:
        self.view = view
        self.names = names
        self.sites: list[Site] = []
        self.claimed: dict[str, str] = {}
        self._first_role: dict[tuple[str, tuple[tuple[int, int], ...]], str] = {}
        self._calls: dict[tuple[str, str], list[fx.Node]] | None = None
        self._role_of: dict[Attention, str] = {}
        self.measures: dict[str, dict[str, Measure]] = {}

    # ---------------------------------------------------------------- single sites

    def add(self, site: Site) -> None:
        if not site.is_region and site.weight:
            key = (site.weight, site.rows)
            first = self._first_role.setdefault(key, site.role)
            if first != site.role:
                site = replace(site, tied_to=first)
        for name in (site.weight, site.bias):
            if name and not site.is_region:
                self.claimed.setdefault(name, site.role)
        self.sites.append(site)

    def part(self, role: str, part: Part, calls: Iterable[Part] = (), **more: Any) -> Site:
        """A projection or a slice of it."""
        p = part.projection
        stored = p.stored
        rows = () if part.whole else ranges(part.rows)
        width = len(part.rows)
        shape: tuple[int, ...]
        facts = dict(more.pop("facts", {}))
        if p.kind == "experts":
            shape = (stored[0], width, stored[p.in_axis])
            facts["experts"] = stored[0]
        elif p.kind == "conv":
            shape = (width, stored[p.in_axis], *stored[2:])
            facts |= conv_facts(p)
        else:
            shape = (width, stored[p.in_axis])
        nodes = [p.node, *(c.projection.node for c in calls), *self._other_calls(p)]
        return Site(
            role=role, op={"matmul": "linear"}.get(p.kind, p.kind), path=self.view.path(p.node, p.weight), weight=p.weight, bias=p.bias,
            rows=rows, out_axis=p.out_axis, in_axis=p.in_axis, shape=shape, dtype=self.names.dtypes.get(p.weight, ""),
            calls=origins(nodes), facts=facts, **more,
        )  # fmt: skip

    def _other_calls(self, p: Projection) -> list[fx.Node]:
        """Further calls of the same module: one that runs on two values (DeBERTa projects positions with its query and key
        weights) is one site with two calls, also where the value is the same for every batch. A weight tied to a module
        elsewhere has a path of its own and stays out."""
        if p.kind == "experts" or len(p.rows) != p.stored[p.out_axis]:
            return []
        if self._calls is None:
            self._calls = {}
            for node in self.view.nodes:
                at = {"linear": 1, "addmm": 2}.get(ops.name_of(node), 1 if ops.name_of(node) in ops.CONV else 0)
                if at:
                    weight = self.view.parameter_name(node.args[at])
                    self._calls.setdefault((self.view.path(node, weight), weight), []).append(node)
        found = self._calls.get((self.view.path(p.node), p.weight), [])
        return [n for n in found if ops.name_of(n) == ops.name_of(p.node)]

    def norm(self, role: str, norms: Sequence[Norm], **more: Any) -> Site:
        first = norms[0]
        facts = {"kind": first.kind, **more.pop("facts", {})}
        return Site(
            role=role, op="norm", path=self.view.path(first.out, first.weight), weight=first.weight, bias=first.bias,
            shape=self.names.shapes.get(first.weight, ()), dtype=self.names.dtypes.get(first.weight, ""),
            calls=origins(n.out for n in norms), facts=facts, **more,
        )  # fmt: skip

    def embedding(self, role: str, nodes: Sequence[fx.Node], **more: Any) -> Site:
        weight = self.view.parameter_name(nodes[0].args[0])
        return Site(
            role=role, op="embedding", path=self.view.path(nodes[0], weight), weight=weight, out_axis=1, in_axis=0,
            shape=tuple(reversed(self.names.shapes.get(weight, ()))), dtype=self.names.dtypes.get(weight, ""),
            calls=origins(nodes), **more,
        )  # fmt: skip

    def parameter(self, role: str, node: fx.Node, op: str = "param", graph: str = "", **more: Any) -> Site:
        """A bare parameter; of one that several graphs have under names of their own, its use in ``graph``."""
        name = str(node.target)
        own = next((n for n in self.view.tied.get(name, ()) if graph and n.startswith(graph + ".")), name)
        calls = origins(self.view.users(node))
        if own != name or (graph and name in self.view.tied):
            calls = tuple(c for c in calls if c.graph == graph) or calls
        return Site(
            role=role, op=op, path=own.rpartition(".")[0], weight=name, shape=self.names.shapes.get(name, ()),
            dtype=self.names.dtypes.get(name, ""), calls=calls, **more,
        )  # fmt: skip

    # ---------------------------------------------------------------- blocks

    def attention(self, base: str, unit: Unit, where: dict[str, Any]) -> None:
        """The region of an attention block and its projections."""
        block = unit.block
        assert isinstance(block, Attention)
        calls = [c for c in unit.calls if isinstance(c, Attention)]
        heads = {"heads": block.heads, "kv_heads": block.kv_heads, "head_dim": block.head_dim}
        members: list[Site] = []
        for role in ("q", "k", "v", "o"):
            part = block.parts.get(role)
            if part is not None:
                others = [c.parts[role] for c in calls if c is not block and role in c.parts]
                members.append(self.part(f"{base}.{role}", part, others, **heads, **where))
        for role, norms in (("q_norm", block.q_norms), ("k_norm", block.k_norms)):
            if norms and norms[0].weight:
                members.append(self.norm(f"{base}.{role}", norms[:1], **where))
        inner = [n for n in block.inner_norms if n.weight]
        for i, norm in enumerate(inner):
            members.append(self.norm(f"{base}.norm" + (f"[{i}]" if len(inner) > 1 else ""), [norm], **where))
        graph = block.core.node.meta["origin"].graph if block.core.node.meta.get("origin") else ""
        tables = [t for t in block.tables if str(t.target) not in self.claimed or self._reads_own(t, graph)]
        for i, table in enumerate(tables):
            members.append(self.parameter(f"{base}.bias" + (f"[{i}]" if len(tables) > 1 else ""), table, "bias", graph, **where))
        for i, sink in enumerate(block.core.sinks):
            members.append(self.parameter(f"{base}.sinks" + (f"[{i}]" if len(block.core.sinks) > 1 else ""), sink, "bias", graph, **where))
        facts: dict[str, object] = {"causal": block.core.causal, "cross": block.cross, "gated": False, "calls": len(unit.calls)}
        self._role_of |= dict.fromkeys(calls, base)
        self._measure(base, block)
        if block.lender is not None:
            facts["kv_of"] = self._role_of.get(block.lender, "")
        if block.value_dim != block.head_dim:
            facts["value_dim"] = block.value_dim
        cores = origins(n for c in calls for core in (c.core, *c.also) for n in (*core.scores, core.node))
        self._region(base, unit, block.input, block.exit, members, facts, heads | where | {"calls": cores})

    def _measure(self, base: str, block: Attention) -> None:
        """Notes what the block's numbers are products of, unless one of them is no such product or stands in no tensor."""
        wanted = {"heads": block.heads, "kv_heads": block.kv_heads, "head_dim": block.head_dim, "value_dim": block.value_dim}
        found: dict[str, Measure] = {}
        if block.lender is not None:
            lent = self.measures.get(self._role_of.get(block.lender, ""), {})
            found |= {n: lent[n] for n in ("kv_heads", "value_dim") if n in lent}
        for name, (projection, units) in block.spans.items():
            stored = self.view.dims.leaves(self.view.dims.parameter(projection.weight)[projection.out_axis])
            at = tuple(stored.index(leaf) for leaf in units if leaf in stored)
            if name not in found and len(at) == len(units) and prod(stored[i].size for i in at) == wanted[name]:
                found[name] = projection.weight, projection.out_axis, at
        if all(n in found for n, value in wanted.items() if value is not None):
            self.measures[base] = found

    def _reads_own(self, table: fx.Node, graph: str) -> bool:
        """Whether a layer reads a shared table under a name of its own (and is not handed what another layer made of it)."""
        return bool(graph) and any(n.startswith(graph + ".") for n in self.view.tied.get(str(table.target), ()))

    def feed_forward(self, base: str, unit: Unit, where: dict[str, Any]) -> None:
        """The region of a feed-forward block, its projections, its router and experts."""
        block = unit.block
        assert isinstance(block, FeedForward)
        calls = [c for c in unit.calls if isinstance(c, FeedForward)]
        members: list[Site] = []
        if block.router is not None:
            others = [c.router for c in calls if c is not block and c.router is not None]
            members.append(self.part(f"{base}.router", block.router, others, facts={"top_k": block.top_k}, **where))
        stem = f"{base}.experts" if block.experts else base
        for role in ("up", "gate", "down"):
            part = block.parts.get(role)
            if part is not None:
                others = [c.parts[role] for c in calls if c is not block and role in c.parts]
                members.append(self.part(f"{stem}.{role}", part, others, **where))
        inner = [n for n in block.norms if n.weight]
        for i, norm in enumerate(inner):
            members.append(self.norm(f"{base}.norm" + (f"[{i}]" if len(inner) > 1 else ""), [norm], **where))
        facts: dict[str, object] = {"activation": block.activation, "gated": block.gated, "calls": len(unit.calls)}
        facts["width"] = len(block.parts["up"].rows)
        if block.experts:
            facts |= {"experts": block.experts, "top_k": block.top_k}
            members.insert(1 if block.router else 0, self._experts(stem, members, facts, where))
        self._region(base, unit, block.input, block.exit, members, facts, where)

    def mixer(self, base: str, unit: Unit, where: dict[str, Any]) -> None:
        """The region of a mixer: ``in`` (numbered where several read its input), ``out``, what stands between and bare parameters."""
        block = unit.block
        assert isinstance(block, Mixer)
        calls = [c for c in unit.calls if isinstance(c, Mixer) and c is not block]
        members: list[Site] = []
        for word, own, others in (
            ("in", block.ins, [c.ins for c in calls]), ("proj", block.inner, [c.inner for c in calls]), ("out", [block.out], [[c.out] for c in calls]),
        ):  # fmt: skip
            for i, p in enumerate(own):
                role = f"{base}.{word}" + (f"[{i}]" if len(own) > 1 else "")
                members.append(self.part(role, whole(p), [whole(o[i]) for o in others if i < len(o)], **where))
        inner = [n for n in block.norms if n.weight]
        for i, norm in enumerate(inner):
            members.append(self.norm(f"{base}.norm" + (f"[{i}]" if len(inner) > 1 else ""), [norm], **where))
        for i, table in enumerate(block.tables):
            members.append(self.parameter(f"{base}.param" + (f"[{i}]" if len(block.tables) > 1 else ""), table, **where))
        self._region(base, unit, block.input, block.exit, members, {"mixer": True, "calls": len(unit.calls)}, where)

    def _experts(self, role: str, members: list[Site], facts: dict[str, object], where: dict[str, Any]) -> Site:
        inside = [m for m in members if m.op == "experts"]
        names = tuple(dict.fromkeys(n for m in inside for n in (m.weight, m.bias) if n))
        return Site(role=role, op="region", path=inside[0].path, parameters=names, facts=dict(facts), **where)

    def convolutions(self, base: str, unit: Unit, where: dict[str, Any], start: int) -> int:
        """The convolutions of a residual block as ``conv[i]`` and ``shortcut``; gives the next free index."""
        block = unit.block
        assert isinstance(block, ConvBlock)
        at = start
        for projection in block.convs:
            role = f"{base}.conv[{at}]" if projection.kind == "conv" else f"{base}.proj[{at}]"
            self.add(self.part(role, whole(projection), **where))
            at += 1
        for i, projection in enumerate(block.shortcut):
            role = f"{base}.shortcut" + (f"[{i}]" if len(block.shortcut) > 1 else "")
            self.add(self.part(role, whole(projection), **where))
        return at

    def loose_convolutions(self, base: str, projections: Sequence[Projection], where: dict[str, Any], start: int) -> None:
        """Convolutions of a layer that belong to no block of it."""
        by_weight: dict[str, list[Projection]] = {}
        for projection in projections:
            by_weight.setdefault(projection.weight, []).append(projection)
        for i, same in enumerate(by_weight.values()):
            self.add(self.part(f"{base}.conv[{start + i}]", whole(same[0]), [whole(p) for p in same[1:]], **where))

    def _region(
        self, role: str, unit: Unit, source: fx.Node, exit: Any, members: list[Site], facts: dict[str, object], more: dict[str, Any]
    ) -> None:
        path = unit.path
        inside = dict.fromkeys(n for m in members for n in (m.weight, m.bias) if n)
        places: dict[str, Any] = {"input": None, "output": None, "residual": None, "norm_output": None}
        if exit is not None:
            after = post_norm(self.view, source, exit)
            facts["norm"] = "post" if after is not None else ("pre" if self.normed(source, exit.residual) else "none")
            places = self.places(source, exit.output, exit.residual, after)
        self.add(Site(role=role, op="region", path=path, parameters=tuple(inside), facts=facts, **places, **more))
        for member in members:
            self.add(member)

    # ---------------------------------------------------------------- places

    def normed(self, source: fx.Node, residual: fx.Node) -> bool:
        """The block reads a norm of the stream, not the stream."""
        norm = self.view.norm_of.get(source)
        return norm is not None and self.view.strip(norm.x) is self.view.strip(residual)

    def places(self, source: fx.Node, output: fx.Node, residual: fx.Node, after: fx.Node | None) -> dict[str, Any]:
        """References inside the innermost GraphModule that sees both the input and the output."""
        graphs = list(dict.fromkeys(r.graph for r in output.meta.get("refs", ())))
        seen = [g for g in graphs if ref_in(source, g) is not None]
        graph = seen[0] if seen else (graphs[0] if graphs else "")
        return {
            "input": ref_in(source, graph, last=True),
            "output": ref_in(output, graph),
            "residual": ref_in(residual, graph, last=True),
            "norm_output": None if after is None else ref_in(after, graph),
        }


def post_norm(view: GraphView, source: fx.Node, exit: Any) -> fx.Node | None:
    """Output of the norm that alone reads the sum, when the block itself reads the stream un-normed; else None."""
    if view.strip(source) is not view.strip(exit.residual):
        return None
    norms = {view.norm_of.get(u) or view.norm_inner.get(u) for u in _readers(view, exit.add)}
    found = [n for n in norms if n is not None and view.strip(n.x) is exit.add]
    if len(found) != 1:
        return None
    statistics = {"pow", "mean", "var", "sub", "square"}
    outside = [
        u for u in _readers(view, exit.add) if u is not found[0].out and u not in found[0].inner and ops.name_of(u) not in statistics
    ]
    return None if [u for u in outside if u.op != "output"] else found[0].out


def _readers(view: GraphView, node: fx.Node) -> list[fx.Node]:
    """Users of a value, through casts and views."""
    found: list[fx.Node] = []
    stack = [node]
    while stack:
        for user in view.users(stack.pop()):
            if ops.name_of(user) in ops.SHAPE and ops.name_of(user) != "dropout":
                stack.append(user)
            else:
                found.append(user)
    return found


def origins(nodes: Iterable[fx.Node]) -> tuple[NodeRef, ...]:
    """The tree nodes that flat nodes come from, each once."""
    return tuple(dict.fromkeys(n.meta["origin"] for n in nodes if n.meta.get("origin")))


def ranges(rows: np.ndarray[Any, Any]) -> tuple[tuple[int, int], ...]:
    """Half-open runs of sorted row numbers."""
    if not len(rows):
        return ()
    breaks = np.flatnonzero(np.diff(rows) != 1) + 1
    return tuple((int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks))


def conv_facts(p: Projection) -> dict[str, object]:
    """Stride, padding, dilation and groups of a convolution."""
    args = p.node.args
    name = ops.name_of(p.node)
    rank = len(p.stored) - 2

    def each(value: Any) -> Any:
        return (value,) * rank if isinstance(value, int) else (tuple(value) * rank if len(value) == 1 else tuple(value))

    def get(at: int, key: str, default: Any) -> Any:
        return args[at] if len(args) > at else p.node.kwargs.get(key, default)

    padding = get(4, "padding", 0)
    facts: dict[str, object] = {"stride": each(get(3, "stride", 1)), "padding": padding if isinstance(padding, str) else each(padding)}
    transposed = "transpose" in name
    facts["groups"] = get(6 if transposed else (8 if name == "convolution" else 6), "groups", 1)
    facts["dilation"] = each(get(7 if transposed else 5, "dilation", 1))
    if transposed or (name == "convolution" and bool(get(6, "transposed", False))):
        facts["transposed"] = True
    return facts
