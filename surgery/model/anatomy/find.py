"""The whole analysis: flat graph, blocks, layers, trunks, sites."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx

from surgery.core.site import Anatomy, Late, NodeRef, Site, Stack, Unresolved
from surgery.model.anatomy import ops
from surgery.model.anatomy.blocks import Attention, Blocks, FeedForward, whole
from surgery.model.anatomy.graphview import GraphView, ref_in
from surgery.model.anatomy.layers import ConvBlock, Layer, LayerStack, conv_blocks, find_stacks, layer_norms, make_units
from surgery.model.anatomy.mixers import Mixer, Mixers
from surgery.model.anatomy.modules import module_sites
from surgery.model.anatomy.outside import Outside, find_outside
from surgery.model.anatomy.products import Norm, Projection
from surgery.model.anatomy.sites import Builder, Names, post_norm
from surgery.model.anatomy.sources import Sources
from surgery.model.anatomy.trunks import Trunk, find_trunks
from surgery.model.program import Program
from surgery.model.walk import edits, tensors


def find_anatomy(program: Program) -> Anatomy:
    """Sites, stacks and what has no role, from the dataflow of a program's graph. Linear in the graph; deterministic."""
    dims = program.dims
    names = tensor_names(program, tuple(f"{n.target}." for n in dims.graph.nodes if n.op == "call_module"))
    view = GraphView(dims, program.aliases)
    blocks = Blocks(view, Sources(view, dims))
    return _Assembly(program, view, blocks, names).anatomy()


def tensor_names(program: Program, attached: tuple[str, ...] = ()) -> Names:
    """Names, shapes and dtypes of the program's own parameters, in state-dict order, without those under ``attached`` paths."""
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    own, buffers = tensors(program.graph)
    added = {t for a in program.attachments for t in a.tensors}
    order = [n for n in program.weights if n not in program.aliases and n not in added and (n in own or n not in buffers)]
    for name in order:
        shapes[name], dtypes[name] = tuple(program.weights[name].shape), program.weights[name].dtype
    seen: set[int] = set()
    for name, tensor in own.items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        first = program.aliases.get(name, name)
        if first not in shapes and first not in added and not first.startswith(attached):
            shapes[first], dtypes[first] = tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")
            order.append(first)
    return Names(shapes, dtypes, tuple(order), dict(program.aliases))


class _Assembly:
    def __init__(self, program: Program, view: GraphView, blocks: Blocks, names: Names) -> None:
        self.program = program
        self.view = view
        self.blocks = blocks
        self.names = names
        self.builder = Builder(view, names)
        self.loose: dict[Layer, list[Projection]] = {}

    def anatomy(self) -> Anatomy:
        view = self.view
        found: list[tuple[str, Any, list[Projection]]] = []
        for a in self.blocks.attentions:
            found.append(("cross" if a.cross else "attn", a, list({p.projection: None for p in a.parts.values()})))
        for f in self.blocks.feed_forwards:
            members = [*f.parts.values(), *([f.router] if f.router else [])]
            found.append(("ffn", f, list({p.projection: None for p in members})))
        taken = {p for _, _, ps in found for p in ps}
        joined = {b.exit.add for _, b, _ in found if b.exit is not None}
        for m in Mixers(view, self.blocks.sources, taken, joined).found:
            found.append(("mixer", m, m.projections))
            taken |= set(m.projections)
            joined.add(m.exit.add)
        for c in conv_blocks(view, taken, joined):
            found.append(("conv", c, [*c.convs, *c.shortcut]))
        units = make_units(view, found)
        paths = {n.rpartition(".")[0] for n in self.names.parameters}
        stacks = find_stacks(units, sorted(paths))
        trunks = find_trunks(view, stacks)
        stacks = [s for t in trunks for s in t.stacks]
        claimed = {p for _, _, ps in found for p in ps} | taken
        inner = {n for a in self.blocks.attentions for n in (*a.q_norms, *a.k_norms, *a.inner_norms)}
        inner |= {n for f in self.blocks.feed_forwards for n in f.norms}
        inner |= {n for kind, m, _ in found if kind == "mixer" for n in m.norms}
        free = [n for n in view.norms if n not in inner]
        within, without = layer_norms(view, stacks, free)
        tables = {t for a in self.blocks.attentions for t in a.tables}
        inside = [la.path for s in stacks for la in s.layers if la.path]
        outside = find_outside(view, trunks, claimed, without, tables, inside)
        self.loose = _by_layer(view, stacks, [p for p in view.projections if p.kind == "conv" and p not in claimed])
        self._write(trunks, outside, within)
        # from the flat graph alone, which stays as it is when the program changes
        modules = Late(lambda: module_sites(view, self.builder, self.names))
        return Anatomy(
            tuple(self.builder.sites),
            tuple(Stack(s.name, len(s.layers), s.container) for s in stacks),
            self._unresolved(),
            modules,
            self.builder.measures,
        )

    # ---------------------------------------------------------------- order of the model

    def _write(self, trunks: list[Trunk], outside: list[Outside], norms: dict[Layer, list[Norm]]) -> None:
        roles = _unique_roles(outside)
        pending = list(zip(outside, roles, strict=True))
        for trunk in trunks:
            for stack in trunk.stacks:
                early = [p for p in pending if p[0].order < stack.first]
                pending = [p for p in pending if p[0].order >= stack.first]
                for item, role in early:
                    self._outside(item, role)
                for layer in stack.layers:
                    self._layer(stack, layer, norms.get(layer, []))
        for item, role in pending:
            self._outside(item, role)

    def _outside(self, item: Outside, role: str) -> None:
        facts = {"trunk": item.trunk} if item.trunk else {}
        if isinstance(item.what, Projection):
            self.builder.add(self.builder.part(role, whole(item.what), facts=facts))
        elif isinstance(item.what, Norm):
            self.builder.add(self.builder.norm(role, [item.what], facts=facts))
        elif item.what.op == "get_attr":
            self.builder.add(self.builder.parameter(role, item.what, facts=facts))
        else:
            also = [n for n in item.facts.get("also", ()) if isinstance(n, fx.Node)]  # type: ignore[attr-defined]
            self.builder.add(self.builder.embedding(role, [item.what, *also], facts=facts))

    def _layer(self, stack: LayerStack, layer: Layer, norms: list[Norm]) -> None:
        base = f"{stack.name}[{layer.index}]"
        where: dict[str, Any] = {"stack": stack.name, "layer": layer.index}
        units = sorted(layer.units, key=lambda u: u.order)
        at = len(self.builder.sites)
        counts = Counter(u.kind for u in units)
        rank: Counter[str] = Counter()
        convs = 0
        for unit in units:
            name = unit.kind if counts[unit.kind] == 1 else f"{unit.kind}[{rank[unit.kind]}]"
            rank[unit.kind] += 1
            if isinstance(unit.block, Attention):
                self.builder.attention(f"{base}.{name}", unit, where)
            elif isinstance(unit.block, FeedForward):
                self.builder.feed_forward(f"{base}.{name}", unit, where)
            elif isinstance(unit.block, Mixer):
                self.builder.mixer(f"{base}.{name}", unit, where)
            else:
                convs = self.builder.convolutions(base, unit, where, convs)
        self.builder.loose_convolutions(base, self.loose.get(layer, []), where, convs)
        by_weight: dict[str, list[Norm]] = {}
        for norm in norms:
            by_weight.setdefault(norm.weight, []).append(norm)
        for i, same in enumerate(by_weight.values()):
            self.builder.add(self.builder.norm(f"{base}.norm[{i}]", same, **where))
        members = self.builder.sites[at:]
        self.builder.sites.insert(at, self._layer_region(base, layer, units, members, where))

    def _layer_region(self, role: str, layer: Layer, units: list[Any], members: list[Site], where: dict[str, Any]) -> Site:
        inside = self.names.under(layer.path) if layer.path else ()
        parameters = tuple(dict.fromkeys([*inside, *(n for m in members for n in (m.weight, m.bias) if n)]))
        blocks = [u.block for u in units]
        facts: dict[str, object] = {"calls": max((len(u.calls) for u in units), default=1)}
        styles = {m.facts["norm"] for m in members if m.is_region and "norm" in m.facts}
        if len(styles) == 1:
            facts["norm"] = styles.pop()
        places = self._layer_places(layer, [b for b in blocks if b.exit is not None])
        return Site(role=role, op="region", path=layer.path, parameters=parameters, facts=facts, **places, **where)

    def _layer_places(self, layer: Layer, blocks: list[Any]) -> dict[str, Any]:
        module = _graph_module(self.program, layer.path) if layer.path else None
        first = blocks[0] if blocks else None
        stream = self.view.strip(first.exit.residual, dropout=False) if first is not None else None
        if isinstance(first, ConvBlock):
            stream = first.input
        if module is not None:
            holders = [n for n in module.graph.nodes if n.op == "placeholder"]
            source = ref_in(stream, layer.path, last=False) if stream is not None else None
            names = {n.name for n in holders}
            entry = source if source is not None and source.node in names else None
            if entry is None and holders:
                entry = NodeRef(layer.path, holders[0].name)
            returned = next(iter(module.graph.output_node().all_input_nodes), None)
            return {"input": entry, "output": NodeRef(layer.path, returned.name) if returned is not None else None}
        if stream is None:
            return {}
        last = max(blocks, key=lambda b: self.view.position[b.exit.add])
        end = post_norm(self.view, last.input, last.exit) or self.view.after_activation(last.exit.add, isinstance(last, ConvBlock))
        found = self.builder.places(stream, end, stream, None)
        return {"input": found["input"], "output": found["output"]}

    # ---------------------------------------------------------------- what is left

    def _unresolved(self) -> tuple[Unresolved, ...]:
        used = {str(n.target): n for n in self.view.nodes if n.op == "get_attr"}
        left = []
        for name in self.names.parameters:
            if name in self.builder.claimed or edits(self.program.module(name.rpartition(".")[0])) is not None:
                continue  # what stands on top of the model has no role in it
            node = used.get(name)
            if node is None or not self.view.users(node):
                left.append(Unresolved(name, "no operation of the captured call reads it"))
                continue
            reader = self.view.users(node)[0]
            at = reader.meta["origin"]
            place = f"{at.graph}::{at.node}" if at.graph else at.node
            left.append(Unresolved(name, f"read by {ops.name_of(reader)} at {place}, which fits no role"))
        return tuple(left)


def _by_layer(view: GraphView, stacks: list[LayerStack], projections: list[Projection]) -> dict[Layer, list[Projection]]:
    """Projections by the layer whose path they stand under."""
    layers = {la.path: la for s in stacks for la in s.layers if la.path}
    found: dict[Layer, list[Projection]] = {}
    for projection in projections:
        parts = view.path(projection.node, projection.weight).split(".")
        layer = next((layers[p] for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in layers), None)
        if layer is not None:
            found.setdefault(layer, []).append(projection)
    return found


def _graph_module(program: Program, path: str) -> fx.GraphModule | None:
    try:
        found = program.module(path)
    except AttributeError:
        return None
    return found if isinstance(found, fx.GraphModule) else None


def _unique_roles(items: list[Outside]) -> list[str]:
    """A bare role where one trunk has it, the trunk's name in front where several do, an index where one trunk has several."""
    trunks: dict[str, set[str]] = {}
    for item in items:
        trunks.setdefault(item.role, set()).add(item.trunk)
    named = [f"{i.trunk}.{i.role}" if i.trunk and len(trunks[i.role]) > 1 else i.role for i in items]
    counts = Counter(named)
    rank: Counter[str] = Counter()
    result = []
    for item, name in zip(items, named, strict=True):
        many = counts[name] > 1 or item.role in ("conv", "embed.conv")
        result.append(f"{name}[{rank[name]}]" if many else name)
        rank[name] += 1
    return result
