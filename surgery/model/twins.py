"""Runs of a flat graph that are copies of one another: layers whose bodies are equal, called in the same way.

A run is what one call of a GraphModule became. Two runs are twins when they have the same operations in the same order, on the same sizes, with
arguments that correspond: a node of the one stands where the node at the same place of the other does, and what comes from outside is paired.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

LEAST = 8
"""So many runs must look alike before anybody compares them: of fewer, telling that they are copies takes as long as reading them."""


@dataclass(eq=False)
class Run:
    """Consecutive nodes that come from one GraphModule. ``key`` is equal for twins; it is empty for what is never one."""

    nodes: list[fx.Node]
    key: tuple[object, ...] = ()
    outer: dict[fx.Node, None] = field(default_factory=dict)
    """What its nodes read from outside, in order; known where a run has a kind."""
    calls: list[tuple[Any, Any, Any]] = field(default_factory=list)
    """Arguments and spec of each node, once twins were looked for."""
    kind: Run | None = None
    """The first run of those whose classes are copies of one another, itself included."""


def runs(graph: fx.Graph) -> list[Run]:
    """The graph's nodes in order, cut where the GraphModule changes; nodes of the root are runs without a key."""
    found: list[Run] = []
    nodes: list[fx.Node] = []
    at: str | None = None
    for node in graph.nodes:
        origin = node.meta.get("origin")
        path = None if origin is None else origin.graph
        if path != at or not found:
            found.append(Run([], (path,) if path else ()))
            nodes, at = found[-1].nodes, path
        nodes.append(node)
    keys: dict[tuple[object, ...], list[Run]] = {}
    named = [run for run in found if run.key]
    for run in named:
        run.key = ()
    if len(named) >= LEAST:
        for run in named:
            run.key = tuple([id(n.target) if n.op == "call_function" else (n.op, n.meta.get("parameter")) for n in run.nodes])
            keys.setdefault(run.key, []).append(run)
    for same in keys.values():
        if len(same) < LEAST:
            for run in same:
                run.key = ()
    return found


def outside(run: Run) -> Iterable[fx.Node]:
    """What the nodes of a run read that is not of the run, each once."""
    own = set(run.nodes)
    for node in run.nodes:
        for source in node._input_nodes:
            if source not in own:
                run.outer[source] = None
    return run.outer


def pairs(one: Run, other: Run) -> dict[fx.Node, fx.Node] | None:
    """Each node that ``one`` has or reads, and what stands in its place in ``other``; None when the two are no twins."""
    found = dict(zip(one.nodes, other.nodes, strict=True))
    inside = len(found)
    known, replaced = found.__getitem__, fx.node.map_arg
    if not one.calls:
        one.calls = [(n._args, n._kwargs, n.meta["spec"]) for n in one.nodes]
    for (args, kwargs, spec), b in zip(one.calls, other.nodes, strict=True):
        its = b.meta["spec"]
        if spec is not its and spec != its:
            return None
        try:
            if replaced(args, known) != b._args or ((kwargs or b._kwargs) and replaced(kwargs, known) != b._kwargs):
                return None
        except KeyError:  # it reads something from outside for the first time
            if not _same((args, kwargs), (b._args, b._kwargs), found):
                return None
    if len(found) > inside:
        own = set(other.nodes)
        outer = list(found.values())[inside:]
        if not own.isdisjoint(outer) or len(set(outer)) < len(outer):
            return None
        if any(a is not b and a.meta.get("spec") != b.meta.get("spec") for a, b in list(found.items())[inside:]):
            return None
    return found


def _same(a: Any, b: Any, found: dict[fx.Node, fx.Node]) -> bool:
    kind = type(a)
    if kind is not type(b):
        return False
    if kind is fx.Node:
        return found.setdefault(a, b) is b
    if kind is int or kind is str:
        return bool(a == b)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all([_same(x, y, found) for x, y in zip(a, b, strict=True)])
    if isinstance(a, dict):
        return a.keys() == b.keys() and all([_same(v, b[k], found) for k, v in a.items()])
    if kind is slice:
        return _same((a.start, a.stop, a.step), (b.start, b.stop, b.step), found)
    return a is b or bool(a == b)


class Lost(Exception):
    """What was found lies further away than the neighbours of its run."""


class Copies:
    """Which runs an analysis of the graph may copy from which, and what stands in the place of what.

    A run is a copy of an earlier one where both are of one kind, and so are the runs in front of them and those behind them, where these read the
    same values from elsewhere, and where what others read of them stands at the same places. Then all that is found near the one is found near the
    other, so many nodes further.
    """

    def __init__(self, every: list[Run]) -> None:
        self.runs = every
        self.of: dict[int, int] = {}
        """Number of a run -> number of the run that it is a copy of."""
        self._place: dict[fx.Node, tuple[int, int]] = {}
        self._maps: dict[int, dict[fx.Node, fx.Node]] = {}
        self._elsewhere: set[fx.Node] = set()
        known = [r.kind is not None for r in every]
        inner = [i for i in range(2, len(known) - 1) if known[i - 1] and known[i] and known[i + 1]]
        if len(inner) < 2:
            return
        self._sets = {j: set(every[j].nodes) for i in inner for j in (i - 2, i - 1, i, i + 1, i + 2) if j < len(every)}
        signs = {j: self._sign(j) for j in dict.fromkeys(j for i in inner for j in (i - 1, i, i + 1))}
        first: dict[object, int] = {}
        for i in inner:
            at = first.setdefault((signs[i - 1], signs[i], signs[i + 1]), i)
            if at != i:
                self.of[i] = at
        self._elsewhere = {n for r in every if r.key for n in r.nodes} if self.of else set()
        for j in {j + d for j in self.of.values() for d in (-1, 0, 1)}:
            self._place.update((n, (j, k)) for k, n in enumerate(every[j].nodes))

    def _sign(self, i: int) -> tuple[object, ...]:
        """What a run reads and who reads of it, so that only runs in the same surroundings have the same."""
        run, own, before, after = self.runs[i], self._sets[i], self._sets[i - 1], self._sets.get(i + 1, ())
        reads: list[object] = [run.kind]
        for node in run.outer:
            alone = node.op == "placeholder" and all(u in own or u.op == "output" for u in node.users)
            reads.append("own" if alone else self.runs[i - 1].nodes.index(node) if node in before else node)
        for k, node in enumerate(run.nodes):
            others = [u for u in node.users if u not in own]
            if others:
                reads.append((k, *["next" if u in after else u for u in others]))
        return tuple(reads)

    def node(self, i: int, node: fx.Node) -> fx.Node:
        """What stands at run ``i`` in the place that a node has at the run that ``i`` is a copy of. :class:`Lost` where that cannot be said."""
        j = self.of[i]
        run, k = self._place.get(node, (-9, 0))
        if -1 <= run - j <= 1:
            return self.runs[i + run - j].nodes[k]
        found = self._maps.get(i)
        if found is None:
            around = [(self.runs[j + d].outer, self.runs[i + d].outer) for d in (-1, 1, 0)]
            found = self._maps[i] = {a: b for mine, its in around for a, b in zip(mine, its, strict=True)}
        twin = found.get(node)
        if twin is None:
            if node in self._elsewhere:
                raise Lost
            twin = node
        return twin

    def names(self, i: int) -> dict[str, str]:
        """The parameters that the run behind a copy reads first -> those that the copy reads in their place."""
        mine, its = self.runs[self.of[i]].nodes, self.runs[i].nodes
        return {str(a.target): str(b.target) for a, b in zip(mine, its, strict=True) if a.op == "get_attr"}
