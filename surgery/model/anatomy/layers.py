"""Repeated layers: which block stands in which layer of which stack, and what the stacks are called.

A layer is the outermost element of an indexed container (``encoder.layer.3``) that holds each kind of block in its own place
once; a container whose elements hold the same kind again in an inner container is a list of stages. Blocks outside of any indexed
container form layers in the order in which they run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from surgery.model.anatomy import ops
from surgery.model.anatomy.blocks import Attention, Exit, FeedForward
from surgery.model.anatomy.graphview import GraphView
from surgery.model.anatomy.mixers import Mixer
from surgery.model.anatomy.products import Norm, Projection


@dataclass(eq=False)
class ConvBlock:
    """Convolutions on one side of a residual addition; ``shortcut`` those on the other."""

    convs: list[Projection]
    shortcut: list[Projection]
    input: fx.Node
    exit: Exit


@dataclass(eq=False)
class Unit:
    """One block with everything that calls it; a block whose parameters are used again has several calls."""

    kind: str
    calls: list[Attention | FeedForward | ConvBlock | Mixer]
    projections: list[Projection]
    path: str
    order: int

    @property
    def block(self) -> Attention | FeedForward | ConvBlock | Mixer:
        return next((c for c in self.calls if c.exit is not None), self.calls[0])


@dataclass(eq=False)
class Layer:
    path: str
    index: int
    units: list[Unit] = field(default_factory=list)

    @property
    def first(self) -> int:
        return min(u.order for u in self.units) if self.units else 1 << 60


@dataclass(eq=False)
class LayerStack:
    """``container`` is the path of the indexed container; ``stage`` the (container, index) of the stage that holds it."""

    container: str
    layers: list[Layer]
    stage: tuple[str, int] | None = None
    name: str = "layers"
    trunk: str = ""

    @property
    def first(self) -> int:
        return min((la.first for la in self.layers), default=1 << 60)


def levels(path: str) -> list[tuple[str, int, str]]:
    """(container, index, element path) of every numbered part of a module path, outermost first."""
    parts = path.split(".")
    return [(".".join(parts[:i]), int(p), ".".join(parts[: i + 1])) for i, p in enumerate(parts) if p.isdigit()]


def common(paths: Iterable[str]) -> str:
    """Longest common module path."""
    split = [p.split(".") for p in paths]
    if not split:
        return ""
    shared: list[str] = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def make_units(view: GraphView, blocks: Sequence[tuple[str, Attention | FeedForward | ConvBlock | Mixer, list[Projection]]]) -> list[Unit]:
    """Blocks in order of execution; blocks of the same parameters under the same path become one unit (layers that share their
    weights have paths of their own and stay apart)."""
    found: dict[tuple[object, ...], Unit] = {}
    for kind, block, projections in sorted(blocks, key=lambda b: min(p.order for p in b[2])):
        key = (kind, *sorted({(p.weight, int(p.rows[0]), view.path(p.node, p.weight)) for p in projections}))
        unit = found.get(key)
        if unit is None:
            path = common(view.path(p.node, p.weight) for p in projections)
            order = min(view.position[p.node] for p in projections)
            found[key] = Unit(kind, [block], projections, path, order)
        else:
            unit.calls.append(block)
    return list(found.values())


def find_stacks(units: Sequence[Unit], modules: Iterable[str]) -> list[LayerStack]:
    """The stacks of layers that the units form; ``modules`` are all module paths that hold parameters."""
    inside: dict[str, dict[int, list[Unit]]] = {}
    chain: dict[Unit, list[tuple[str, int, str]]] = {}
    for unit in units:
        chain[unit] = levels(unit.path)
        for container, index, _ in chain[unit]:
            inside.setdefault(container, {}).setdefault(index, []).append(unit)
    staged = {c: _holds_stages(c, elements, chain) for c, elements in inside.items()}

    stacks: dict[str, LayerStack] = {}
    loose: list[Unit] = []
    for unit in units:
        chosen = next((i for i, level in enumerate(chain[unit]) if not staged[level[0]]), None)
        if chosen is None:
            loose.append(unit)
            continue
        container, index, path = chain[unit][chosen]
        stack = stacks.get(container)
        if stack is None:
            stage = chain[unit][chosen - 1][:2] if chosen else None
            stack = stacks[container] = LayerStack(container, _elements(container, modules), stage)
        layer = next((la for la in stack.layers if la.path == path), None)
        if layer is None:
            layer = Layer(path, index)
            stack.layers.append(layer)
        layer.units.append(unit)
    for stack in stacks.values():
        stack.layers.sort(key=lambda la: la.index)
        for rank, layer in enumerate(stack.layers):
            layer.index = rank
    result = [*stacks.values(), *_loose_stack(loose)]
    return sorted(result, key=lambda s: s.first)


def _holds_stages(container: str, elements: dict[int, list[Unit]], chain: dict[Unit, list[tuple[str, int, str]]]) -> bool:
    """Some element holds two blocks of one kind in different elements of one inner container."""
    for inside in elements.values():
        seen: dict[tuple[str, str], int] = {}
        for unit in inside:
            at = next(i for i, level in enumerate(chain[unit]) if level[0] == container)
            for inner, index, _ in chain[unit][at + 1 : at + 2]:
                if seen.setdefault((unit.kind, inner), index) != index:
                    return True
    return False


def _elements(container: str, modules: Iterable[str]) -> list[Layer]:
    prefix = f"{container}." if container else ""
    numbers = {int(head) for m in modules if m.startswith(prefix) and (head := m[len(prefix) :].split(".", 1)[0]).isdigit()}
    return [Layer(f"{prefix}{n}", n) for n in sorted(numbers)]


def _loose_stack(units: list[Unit]) -> list[LayerStack]:
    """Blocks outside of any indexed container: a new layer begins where a kind comes again."""
    layers: list[Layer] = []
    for unit in sorted(units, key=lambda u: u.order):
        if not layers or any(u.kind == unit.kind for u in layers[-1].units) or unit.kind == "attn":
            layers.append(Layer("", len(layers)))
        layers[-1].units.append(unit)
    if len(layers) < 2 and not any(u.kind == "attn" for la in layers for u in la.units):
        return []
    for layer in layers:
        layer.path = common(u.path for u in layer.units)
    return [LayerStack("", layers)]


def conv_blocks(view: GraphView, taken: set[Projection], joined: set[fx.Node]) -> list[ConvBlock]:
    """Residual additions whose sides run through convolutions that no other block has."""
    if not any(p.kind == "conv" for p in view.projections):
        return []
    found = []
    for node in view.nodes:
        if ops.name_of(node) != "add" or node in joined:
            continue
        sides = [n for n in view.inputs(node) if not view.constant[n] and ops.is_activation(n)]
        if len(sides) != 2:
            continue
        runs = [(_run_back(view, s), s) for s in sides]
        runs.sort(key=lambda r: -len(r[0][0]))
        ((main, start), output), ((other, origin), residual) = runs
        before = {*main} & {*other}  # a stem that both sides come from is no part of the block
        main = [p for p in main if p not in taken and p not in before]
        if start is not origin or not any(p.kind == "conv" for p in main):
            continue
        shortcut = [p for p in other if p not in taken and p not in main and p not in before]
        taken |= {*main, *shortcut}
        found.append(ConvBlock(main[::-1], shortcut[::-1], main[-1].x, Exit(output, residual, node, output)))
    return found


def _run_back(view: GraphView, node: fx.Node) -> tuple[list[Projection], fx.Node]:
    """Projections back along a line of single inputs, nearest first, and the value where the line starts."""
    met: list[Projection] = []
    for _ in range(200):
        projection = view.by_node.get(node)
        if projection is not None:
            met.append(projection)
            node = projection.x
            continue
        norm = view.norm_of.get(node)
        if norm is not None:
            node = norm.x
            continue
        inputs = [n for n in view.inputs(node) if not view.constant[n] and ops.is_activation(n)]
        name = ops.name_of(node)
        moves = name in ops.SHAPE or ops.is_pointwise(node) or node.op == "call_module"
        if not moves or not inputs:
            return met, node
        if len(inputs) == 2 and name == "mul":
            # a gate on the line (squeeze and excitation): follow the value, which the gate was made from
            inputs = sorted(inputs, key=lambda n: -view.position[n] if "sigmoid" not in ops.name_of(n) else 1)[:1]
        if len(inputs) != 1 or (len(ops.shape_of(inputs[0]) or ()) != len(ops.shape_of(node) or ()) and name not in ops.SHAPE):
            return met, node
        node = inputs[0]
    return met, node


def layer_norms(view: GraphView, stacks: Sequence[LayerStack], norms: Sequence[Norm]) -> tuple[dict[Layer, list[Norm]], list[Norm]]:
    """Norms with parameters by layer, in order of execution, and those outside of every layer."""
    by_path = {la.path: la for s in stacks for la in s.layers if la.path and s.container}
    spans = [(la.first, max(view.position[u.calls[0].exit.add] if u.calls[0].exit else u.order for u in la.units), la)
             for s in stacks if not s.container for la in s.layers if la.units]  # fmt: skip
    inside: dict[Layer, list[Norm]] = {}
    outside: list[Norm] = []
    for norm in sorted(norms, key=lambda n: view.position[n.out]):
        if not norm.weight:
            continue
        parts = view.path(norm.out, norm.weight).split(".")
        layer = next((by_path[p] for i in range(len(parts), 0, -1) if (p := ".".join(parts[:i])) in by_path), None)
        if layer is None:
            layer = _by_span(view, norm, spans)
        if layer is None:
            outside.append(norm)
        else:
            inside.setdefault(layer, []).append(norm)
    return inside, outside


def _by_span(view: GraphView, norm: Norm, spans: list[tuple[int, int, Layer]]) -> Layer | None:
    """The layer that a norm feeds (in front of its first block) or whose sum it reads, for layers without paths."""
    for _, _, layer in spans:
        for unit in layer.units:
            block = unit.calls[0]
            if block.exit is None:
                continue
            if view.strip(norm.out) is view.strip(block.input) and view.strip(norm.x) is view.strip(block.exit.residual):
                return layer
            if view.strip(norm.x) is block.exit.add and view.strip(block.input) is view.strip(block.exit.residual):
                return layer
    return None
