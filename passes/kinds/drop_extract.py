"""One extraction: layers and branches are bypassed, and everything that only they needed leaves the program."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from surgery.core.diagnostics import fail
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model.program import Program
from surgery.passes.kinds import attach
from surgery.passes.kinds.drop_config import drop_layers
from surgery.passes.kinds.drop_graph import (
    Cut,
    Taken,
    branch_cut,
    bypass,
    conflicts,
    graphs_around,
    layer_cuts,
    narrow,
    outputs_of,
    remove_module,
    remove_unread,
    sweep,
    trim,
)
from surgery.passes.kinds.drop_rename import moved_paths, rename
from surgery.passes.kinds.drop_signature import drop_inputs, drop_outputs, leaves, loose_outputs


def is_layer(site: Site) -> bool:
    """Whether a site is one whole layer of a stack."""
    return site.is_region and site.layer is not None and site.role == f"{site.stack}[{site.layer}]"


@dataclass
class Extraction:
    """``plan`` finds what has to be cut and refuses what cannot; ``run`` does it. Afterwards ``removed`` holds the parameters that
    are gone with their elements, ``inputs`` and ``outputs`` the places of flat values that the program's call no longer has,
    ``layers`` and ``branches`` what was bypassed."""

    program: Program
    span: Span
    layers: list[Site] = field(default_factory=list)
    branches: list[Site] = field(default_factory=list)
    removed: dict[str, int] = field(default_factory=dict)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    # ------------------------------------------------------------ planning

    def plan(self, layers: Sequence[Site], branches: Sequence[Site]) -> list[Cut]:
        """The cuts in order of execution. Raises S0473 and S0477; changes nothing."""
        self.layers, self.branches = list(layers), list(branches)
        found = [c for s in layers for c in layer_cuts(self.program, s, self.span)]
        found += [branch_cut(self.program, s, self.span) for s in branches]
        order: dict[fx.Node, int] = {}
        for path in {c.graph for c in found}:
            order |= {n: i for i, n in enumerate(self.program.module(path).graph.nodes)}
        found.sort(key=lambda c: (c.graph, order[c.node]))
        loose = loose_outputs(self.program)
        for path in dict.fromkeys(c.graph for c in found):
            clash = conflicts(self.program.module(path), [c for c in found if c.graph == path], set() if path else loose)
            for reader, cut in clash:
                raise self._needed(reader, cut, path)
        return found

    def _needed(self, reader: fx.Node, cut: Cut, path: str) -> Exception:
        place = attach.join(path, str(reader.target)) if reader.op == "call_module" else ""
        who = next((s.role for s in self.program.anatomy.sites if is_layer(s) and place and s.path == place), "")
        who = who or ("an output of the model" if reader.op == "output" else reader.name)
        return fail(
            "S0477", f"{cut.site.role} cannot be dropped alone: {who} needs something else that it computes", self.span, "dropped here",
            help=f"keep {cut.site.role}: what all layers share is computed there once",
        )  # fmt: skip

    # ------------------------------------------------------------ doing

    def run(self, layers: Sequence[Site], branches: Sequence[Site]) -> None:
        """Take the parts out. ``program`` is whole again afterwards, its anatomy to be found anew."""
        program, taken = self.program, Taken()
        stacks = {s.name: (s.layers, s.path) for s in program.anatomy.stacks}
        every = [s for s in program.anatomy.sites if is_layer(s)]
        cuts = self.plan(layers, branches)
        made = self._made_by(branches)
        places = self._outputs_by_layer(cuts)
        bypass(program, cuts)
        inner = {path: self._no_longer_needed(path, nodes) for path, nodes in made.items()}
        self.outputs = sorted({*places, *self._outputs_of(inner)})
        drop_outputs(program, self.outputs, self.span, self._what())
        paths = dict.fromkeys(c.graph for c in cuts if c.graph)
        for path, gone in inner.items():
            if gone:
                narrow(program, path, gone)
        for path in paths:
            sweep(program, path, taken)
            trim(program, path)
        lost = [*layers, *self._idle_layers(every, paths)]
        for path in dict.fromkeys([*(p.rpartition(".")[0] for p in paths), ""]):
            for prefix, _ in reversed(graphs_around(program, attach.join(path, "_"))):
                sweep(program, prefix, taken)
        holders = [n for n in program.graph.graph.nodes if n.op == "placeholder"]
        self.inputs = drop_inputs(program, holders, self.span, self._what())
        for site in lost:
            if site.path and isinstance(attach.parent_module(program, site.path), fx.GraphModule):
                self.removed |= remove_module(program, site.path)
        self.removed |= remove_unread(program, taken)
        self._number(lost, every, stacks)
        program.schedules = [(m, tuple(n for n in t if program.aliases.get(n, n) in program.weights)) for m, t in program.schedules]
        program.touch()

    def _what(self) -> str:
        return (self.layers or self.branches)[0].role

    def _made_by(self, branches: Sequence[Site]) -> dict[str, set[fx.Node]]:
        """For each graph of a called layer what the scores and products of its bypassed attention are made from."""
        found: dict[str, set[fx.Node]] = {}
        for site in branches:
            if site.output is not None and site.output.graph:
                cores = [self.program.node(ref) for ref in site.calls if ref.graph == site.output.graph]
                found.setdefault(site.output.graph, set()).update(_ancestors(cores))
        return found

    def _no_longer_needed(self, path: str, made: set[fx.Node]) -> set[int]:
        """The places of the results of a called graph that only bypassed branches made, and only the model's cache and tuples by
        layer take: keys and values of an attention that goes."""
        values = outputs_of(self.program.module(path))
        maybe = {j for j, n in enumerate(values) if n in made and self._only_loose(path, j)}
        live = _ancestors(n for j, n in enumerate(values) if j not in maybe)
        return {j for j in maybe if values[j] not in live}

    def _calls(self, path: str) -> list[tuple[str, fx.Node]]:
        return [
            (graph, node) for graph, holder in graphs_around(self.program, path)
            for node in holder.graph.find_nodes(op="call_module", target=attach.relative(path, graph))
        ]  # fmt: skip

    def _only_loose(self, path: str, index: int) -> bool:
        """Whether a result of a called graph goes nowhere but to outputs by layer."""
        loose, results = loose_outputs(self.program), outputs_of(self.program.graph)
        end = self.program.graph.graph.output_node()
        for graph, call in self._calls(path):
            for user in call.users:
                if user.target is not operator.getitem or graph:
                    return False
                if user.args[1] != index:
                    continue
                if any(u is not end for u in user.users) or any(n is user and i not in loose for i, n in enumerate(results)):
                    return False
        return True

    def _outputs_by_layer(self, cuts: Sequence[Cut]) -> list[int]:
        """The places of outputs that a dropped layer gives itself: its cache, its entry in a tuple by layer."""
        loose, kinds = loose_outputs(self.program), leaves(self.program.signature.out_spec)
        dropped = {c.node for c in cuts if c.node.op == "call_module" and is_layer(c.site)}
        places = []
        for i, node in enumerate(outputs_of(self.program.graph)):
            if i in loose and isinstance(node, fx.Node):
                maker = node.args[0] if node.target is operator.getitem else node
                if maker in dropped and (kinds[i].kind == "item" or node is not maker):
                    places.append(i)
        return places

    def _outputs_of(self, inner: dict[str, set[int]]) -> list[int]:
        """The places of the outputs that are results of called graphs at the places ``inner``."""
        narrowed = {call: gone for path, gone in inner.items() for graph, call in self._calls(path) if not graph}
        places = []
        for i, node in enumerate(outputs_of(self.program.graph)):
            if isinstance(node, fx.Node) and node.target is operator.getitem and node.args[1] in narrowed.get(node.args[0], ()):  # type: ignore[call-overload]
                places.append(i)
        return places

    def _idle_layers(self, every: Sequence[Site], paths: Iterable[str]) -> list[Site]:
        """Layers that give back what they take, now that their branches are gone: they go, too."""
        found = []
        for site in every:
            if site.path not in paths:
                continue
            values = outputs_of(self.program.module(site.path))
            if len(values) == 1 and isinstance(values[0], fx.Node) and values[0].op == "placeholder":
                bypass(self.program, layer_cuts(self.program, _returning(site, values[0]), self.span))
                found.append(site)
        return found

    def _number(self, lost: Sequence[Site], every: Sequence[Site], stacks: dict[str, tuple[int, str]]) -> None:
        """Remaining layers move up; the config learns how many there are."""
        gone: dict[str, tuple[int, set[int]]] = {}
        containers: dict[str, None] = {}
        for site in lost:
            assert site.layer is not None
            gone.setdefault(site.stack, (stacks[site.stack][0], set()))[1].add(site.layer)
            container, _, leaf = site.path.rpartition(".")
            if leaf.isdigit() and container == stacks[site.stack][1]:
                containers[container] = None
        roles: dict[str, str] = {}
        for stack, (_, layers) in gone.items():
            left = [s for s in every if s.stack == stack and s.layer not in layers]
            roles |= {s.role: f"{stack}[{i}]" for i, s in enumerate(left) if s.layer != i}
        rename(self.program, moved_paths(self.program, list(containers)), roles)
        if gone:
            drop_layers(self.program, gone)


def _returning(site: Site, node: fx.Node) -> Site:
    from dataclasses import replace

    from surgery.core.site import NodeRef

    ref = NodeRef(site.path, node.name)
    return replace(site, input=ref, output=ref)


def _ancestors(nodes: Iterable[object]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = [n for n in nodes if isinstance(n, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen
