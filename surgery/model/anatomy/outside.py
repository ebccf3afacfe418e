"""What stands outside of the layers: embeddings, stems, final norms, poolers, heads, and the joints between stages.

These roles are places in front of, between and behind the stacks and origins of indices. Dimension classes know neither (a table's rows
are ``indexed`` whether tokens, positions or types are looked up), so the graph is followed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from surgery.model.anatomy import ops
from surgery.model.anatomy.graphview import GraphView
from surgery.model.anatomy.layers import LayerStack
from surgery.model.anatomy.products import Norm, Projection
from surgery.model.anatomy.trunks import Trunk


@dataclass(eq=False)
class Outside:
    """One part outside of the layers: ``what`` is a projection, a norm, an embedding call or a bare parameter."""

    role: str
    what: Projection | Norm | fx.Node
    trunk: str
    order: int
    facts: dict[str, object] = field(default_factory=dict)


def find_outside(
    view: GraphView, trunks: Sequence[Trunk], claimed: set[Projection], norms: Sequence[Norm], tables: set[fx.Node], inside: Sequence[str]
) -> list[Outside]:
    """Roles of everything outside of the layers; ``inside`` are the paths of the layers, ``tables`` are relative biases."""
    finder = _Finder(view, trunks, inside)
    found = [*finder.embeddings(tables), *finder.projections(claimed), *finder.norms(norms), *finder.parameters(tables)]
    return sorted(found, key=lambda o: o.order)


class _Finder:
    def __init__(self, view: GraphView, trunks: Sequence[Trunk], inside: Sequence[str]) -> None:
        self.view = view
        self.trunks = trunks
        self.inside = tuple(f"{p}." for p in inside)
        self.stages = {stage: s for t in trunks for s in t.stacks if (stage := _stage_path(s))}

    def in_layer(self, path: str) -> bool:
        return f"{path}.".startswith(self.inside) if self.inside else False

    def trunks_after(self, node: fx.Node) -> list[Trunk]:
        return [t for t in self.trunks if node in t.before]

    def trunk_before(self, node: fx.Node) -> Trunk | None:
        """The trunk whose last residual addition is nearest behind a value."""
        exits = {e: t for t in self.trunks for e in t.exits}
        reached = [(self.view.position[n], exits[n]) for n in self.view.backward(node, exits.__contains__) if n in exits]
        return max(reached, key=lambda r: r[0])[1] if reached else None

    def stage_of(self, path: str) -> LayerStack | None:
        return next((s for p, s in self.stages.items() if f"{path}.".startswith(f"{p}.")), None)

    # ---------------------------------------------------------------- embeddings

    def embeddings(self, tables: set[fx.Node]) -> Iterator[Outside]:
        by_weight: dict[fx.Node, list[fx.Node]] = {}
        for node in self.view.embeddings:
            weight = self.view.parameter(node.args[0])
            if weight is not None and weight not in tables:
                by_weight.setdefault(weight, []).append(node)
        kinds = {w: _index_kind(self.view, nodes[0].args[1], w) for w, nodes in by_weight.items()}
        kinds = _one_vocabulary(self.view, kinds, by_weight)
        for weight, nodes in by_weight.items():
            if self.in_layer(str(weight.target).rpartition(".")[0]):
                continue
            trunks = {t.name for n in nodes for t in self.trunks_after(n)}
            trunk = trunks.pop() if len(trunks) == 1 else ""
            yield Outside(f"embed.{kinds[weight]}", nodes[0], trunk, self.view.position[nodes[0]], {"also": nodes[1:]})

    # ---------------------------------------------------------------- projections

    def projections(self, claimed: set[Projection]) -> Iterator[Outside]:
        seen: set[tuple[str, int]] = set()
        for projection in self.view.projections:
            path = self.view.path(projection.node, projection.weight)
            key = (projection.weight, int(projection.rows[0]))
            if projection in claimed or self.in_layer(path) or key in seen:
                continue
            seen.add(key)
            order = self.view.position[projection.node]
            after = self.trunks_after(projection.node)
            stage = self.stage_of(path)
            if stage is not None and not (after and stage.first > order and stage.stage and stage.stage[1] == 0):
                yield Outside(f"{stage.name.rpartition('.')[0]}.downsample", projection, stage.trunk, order)
            elif after:
                trunk = after[0].name if len(after) == 1 else ""
                yield Outside(self._entry(projection), projection, trunk, order)
            elif self.trunks and (before := self.trunk_before(projection.x)) is not None:
                role = self._end(projection)
                if role:
                    yield Outside(role, projection, before.name, order)
            elif not self.trunks:
                role = "conv" if projection.kind == "conv" else self._end(projection)
                if role:
                    yield Outside(role, projection, "", order)

    def _entry(self, projection: Projection) -> str:
        """A projection in front of the first layer."""
        source = self.view.strip(projection.x)
        if projection.kind != "conv":
            return "embed.projection"
        args = projection.node.args
        kernel = projection.stored[2:]
        stride = args[3] if len(args) > 3 else projection.node.kwargs.get("stride", 1)
        strides = [stride] * len(kernel) if isinstance(stride, int) else list(stride)  # type: ignore[call-overload]
        strides = strides * len(kernel) if len(strides) == 1 else strides
        patches = source.op == "placeholder" and tuple(strides) == tuple(kernel) and any(n > 1 for n in kernel)
        return "embed.patch" if patches else "embed.conv"

    def _end(self, projection: Projection) -> str:
        """A projection behind the last layer: head, pooler, or the transform in front of a head."""
        last, activated = self._ahead(projection.node)
        selected = self._selects_token(projection.x)
        if last:
            return "pooler" if activated and selected else "head"
        if selected:
            return "pooler"
        return "head.transform" if activated else ""

    def _ahead(self, start: fx.Node) -> tuple[bool, bool]:
        """Whether no projection follows, and whether an activation does."""
        seen = {start}
        stack = [start]
        last, activated = True, False
        while stack:
            node = stack.pop()
            for user in self.view.users(node):
                if user in seen:
                    continue
                seen.add(user)
                if user in self.view.by_node and user is not start:
                    last = False
                    continue
                activated = activated or ops.name_of(user) in ops.ACTIVATIONS
                stack.append(user)
        return last, activated

    def _selects_token(self, node: fx.Node) -> bool:
        """Between the stack and the value one position is taken or all are averaged."""
        exits = set().union(*(t.exits for t in self.trunks))
        for _ in range(64):
            if node in exits or node in self.view.by_node:
                return False
            name = ops.name_of(node)
            if name in ("select", "mean", "index", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "argmax"):
                return True
            norm = self.view.norm_of.get(node)
            inputs = [norm.x] if norm else [n for n in self.view.inputs(node) if not self.view.constant[n] and ops.is_activation(n)]
            if not inputs:
                return False
            node = inputs[0]
        return False

    # ---------------------------------------------------------------- norms and parameters

    def norms(self, norms: Sequence[Norm]) -> Iterator[Outside]:
        seen: set[str] = set()
        for norm in norms:
            if not norm.weight or norm.weight in seen:
                continue
            seen.add(norm.weight)
            path = self.view.path(norm.out, norm.weight)
            if self.in_layer(path):
                continue
            order = self.view.position[norm.out]
            after = self.trunks_after(norm.out)
            stage = self.stage_of(path)
            if stage is not None and not (after and stage.stage and stage.stage[1] == 0 and stage.first > order):
                yield Outside(f"{stage.name.rpartition('.')[0]}.downsample.norm", norm, stage.trunk, order)
            elif after:
                yield Outside("embed.norm", norm, after[0].name if len(after) == 1 else "", order)
            else:
                before = self.trunk_before(norm.x)
                behind = self._behind_projection(norm.x)
                yield Outside("head.norm" if behind and before else "norm", norm, before.name if before else "", order)

    def _behind_projection(self, node: fx.Node) -> bool:
        exits = set().union(*(t.exits for t in self.trunks)) if self.trunks else set()
        for _ in range(64):
            if node in exits:
                return False
            if node in self.view.by_node:
                return True
            inputs = [n for n in self.view.inputs(node) if not self.view.constant[n] and ops.is_activation(n)]
            if not inputs:
                return False
            node = inputs[0]
        return False

    def parameters(self, tables: set[fx.Node]) -> Iterator[Outside]:
        """Bare parameters added to or joined with the stream in front of the layers: positions, class tokens."""
        known = {self.view.parameter(n.args[0]) for n in self.view.embeddings}
        for node in self.view.nodes:
            if node.op != "get_attr" or not node.meta.get("parameter") or node in tables or node in known:
                continue
            if self.in_layer(str(node.target)):
                continue
            found = self._meeting(node)
            if found is None:
                continue
            user, name = found
            after = self.trunks_after(user)
            if not after:
                continue
            role = {"cat": "embed.cls", "add": "embed.positions"}.get(name, "")
            if role == "embed.positions" and not _per_position(node, user):
                continue
            if role:
                yield Outside(role, node, after[0].name if len(after) == 1 else "", self.view.position[user])

    def _meeting(self, node: fx.Node) -> tuple[fx.Node, str] | None:
        """The op at which a parameter meets data, through views and parts of itself."""
        for _ in range(16):
            users = [u for u in self.view.users(node)]
            if not users:
                return None
            user = users[0]
            name = ops.name_of(user)
            if name in ("cat", "concat"):
                return user, "cat"
            if name in ops.SHAPE or name in ops.PARTS or name in ops.GATHER or self.view.constant[user]:
                node = user
                continue
            return user, name
        return None


def _stage_path(stack: LayerStack) -> str:
    if stack.stage is None:
        return ""
    container, index = stack.stage
    return f"{container}.{index}" if container else str(index)


def _per_position(node: fx.Node, user: fx.Node) -> bool:
    shape = ops.shape_of(node)
    return shape is not None and len(shape) >= 2 and any(n != 1 for n in shape[:-1])


def _index_kind(view: GraphView, index: object, weight: fx.Node) -> str:
    """``tokens``, ``positions`` or ``types`` by where the indices come from."""
    node = index
    rows = (ops.shape_of(weight) or (0,))[0]
    for _ in range(64):
        if not isinstance(node, fx.Node):
            break
        name = ops.name_of(node)
        if name in ("arange", "cumsum"):
            return "positions"
        if name in ("zeros", "new_zeros", "zeros_like", "ones", "full"):
            return "types"
        if node.op == "placeholder":
            return "positions" if "position" in str(node.target) else "tokens"
        if node.op == "get_attr":
            # a table of positions has a row for each index of the buffer; a buffer of type numbers is longer than its table
            length = (ops.shape_of(node) or (0,))[-1]
            return "positions" if isinstance(length, int) and length <= rows else "types"
        inputs = ops.tensors(node)
        if not inputs:
            break
        node = next((n for n in inputs if ops.name_of(n) == "cumsum"), inputs[0])
    return "tokens"


def _one_vocabulary(view: GraphView, kinds: dict[fx.Node, str], nodes: dict[fx.Node, list[fx.Node]]) -> dict[fx.Node, str]:
    """Of several tables of indices that are added together only the largest is the vocabulary."""
    for weight, kind in kinds.items():
        if kind != "tokens":
            continue
        mine = set(_sum_roots(view, nodes[weight][0]))
        for other, its in kinds.items():
            if other is weight or its != "tokens" or not mine & set(_sum_roots(view, nodes[other][0])):
                continue
            if (ops.shape_of(weight) or (0,))[0] < (ops.shape_of(other) or (0,))[0]:
                kinds[weight] = "types"
    return kinds


def _sum_roots(view: GraphView, node: fx.Node) -> list[fx.Node]:
    """The additions that an embedding goes into."""
    found = []
    for _ in range(8):
        step = next((u for u in view.users(node) if ops.name_of(u) in ("add", *ops.SHAPE)), None)
        if step is None:
            break
        if ops.name_of(step) == "add":
            found.append(step)
        node = step
    return found
