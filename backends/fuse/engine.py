"""Runs the rules over the flat graph of a live root: find, apply, measure, take back what does not hold, and write down all of it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse.flatten import dtype_of, flatten_live
from surgery.backends.fuse.gate import NOT_RUN, TOLERANCE, Gate
from surgery.backends.fuse.rule import Match, Miss, Rule, Target
from surgery.backends.fuse.view import FuseView
from surgery.core.progress import report
from surgery.model.program import Program

ROUNDS = 6
"""How often a rule is asked again after it changed something; each round must find something new to go on."""

GATE = "numeric gate"

FUSIONS = "surgery.fusions"
"""Key of the report among the metadata of what is written: JSON, one record a rule."""


@dataclass(frozen=True)
class Fired:
    """One place that a rule rewrote, and what it became."""

    place: str
    what: str


@dataclass(frozen=True)
class FusionEntry:
    """What one rule did: where it fired, where it nearly did and why not, and the error that the gate measured of the graph with it (a share of
    the output's scale, against the graph before all rules); rules that were measured together have the same one."""

    rule: str
    doc: str
    fired: int = 0
    places: tuple[Fired, ...] = ()
    misses: tuple[Miss, ...] = ()
    error: float = 0.0
    tolerance: float = 0.0

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a report of text: one line of what fired, then one for each kind of near miss."""
        out = [f"{self.rule}: {self.fired} place{'' if self.fired == 1 else 's'}"] if self.fired else []
        kinds: dict[str, list[Miss]] = {}
        for miss in self.misses:
            kinds.setdefault(miss.condition, []).append(miss)
        for condition, group in kinds.items():
            more = f" and {len(group) - 1} more" if len(group) > 1 else ""
            detail = f" ({group[0].detail})" if group[0].detail else ""
            out.append(f"{self.rule}: not at {group[0].node_name}{more}: {condition}{detail}")
        return out


@dataclass(frozen=True)
class Fused:
    """The rewritten flat graph, which runs like the root it came from, and what every rule says."""

    graph: fx.GraphModule
    report: tuple[FusionEntry, ...] = ()

    def record(self) -> list[dict[str, Any]]:
        return [entry.record() for entry in self.report]

    def lines(self) -> list[str]:
        """Everything: what fired, and each kind of near miss."""
        return [line for entry in self.report for line in entry.lines()]

    def summary(self) -> list[str]:
        """One line of what fired, and one for each kind of near miss of each rule."""
        fired = ", ".join(f"{e.rule} {e.fired}" for e in self.report if e.fired)
        misses = [line for e in self.report for line in e.lines() if not line.startswith(f"{e.rule}: {e.fired} place")]
        return [f"fused: {fired}" if fired else "fused: nothing", *misses]


@cache
def rules() -> tuple[Rule, ...]:
    """All rules of this folder: every module with ``RULE`` or ``RULES``, by ``order`` and then by name."""
    import surgery.backends.fuse as package

    found: list[Rule] = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        found += [module.RULE] if hasattr(module, "RULE") else list(getattr(module, "RULES", ()))
    return tuple(sorted(found, key=lambda r: (r.order, r.name)))


def fuse(program: Program, root: fx.GraphModule, target: Target, only: Iterable[str] | None = None) -> Fused:
    """The fused flat graph of a live root, and the report.

    ``root`` has the program's flat inputs and outputs and real tensors; it is not changed, and the result shares its tensors. ``only``
    restricts the rules to these names. What all rules made is measured against the graph before them; where it does not hold, every rule is
    measured by itself, and what breaks the gate is found by halving, taken back, and reported as a near miss with the condition "numeric
    gate". Same inputs give the same graph.
    """
    report("fusing: reading the graph")
    graph = flatten_live(program, root)
    return fuse_flat(program, graph, target, only)


def fuse_flat(program: Program, graph: fx.GraphModule, target: Target, only: Iterable[str] | None = None) -> Fused:
    """:func:`fuse` on a graph that is flat already; ``graph`` is rewritten in place."""
    wanted = None if only is None else set(only)
    chosen = [r for r in rules() if target.backend in r.targets and (wanted is None or r.name in wanted)]
    gate = Gate(program, graph, dtype_of(graph))
    view = FuseView(graph, program, target)
    if not any(r.order == 0 for r in chosen):
        view.tidy()  # dead code is a rule of its own, which counts what it drops
    before = _copy(graph.graph)
    entries = _together(chosen, view, gate)
    if entries is None:
        _restore(view, before)
        entries = []
        for i, rule in enumerate(chosen):
            report(f"fusing: {rule.name}", i, len(chosen))
            entries.append(_run(rule, view, gate))
    return Fused(graph, tuple(entries))


def _together(chosen: Sequence[Rule], view: FuseView, gate: Gate) -> list[FusionEntry] | None:
    """All rules, and then one measurement of what they made together; None when it does not hold or a rule tripped. Then every rule has to be
    measured by itself, so that the places at fault are found and left out."""
    tolerance = TOLERANCE.get(view.target.precision, TOLERANCE["fp32"])
    found: list[tuple[Rule, list[Fired], list[Miss]]] = []
    try:
        for i, rule in enumerate(chosen):
            report(f"fusing: {rule.name}", i, len(chosen))
            fired: list[Fired] = []
            for _ in range(ROUNDS):
                matches, misses = _find(rule, view, {})
                if not matches:
                    break
                _apply(rule, view, {}, {m.node.name for m in matches}, fired)
            else:
                _, misses = _find(rule, view, {})
            found.append((rule, fired, misses))
    except Exception:  # one place must not cost the whole export: the careful way finds it and says what happened
        return None
    if not any(fired for _, fired, _ in found):
        return [FusionEntry(r.name, r.doc, 0, (), tuple(misses), 0.0, tolerance) for r, _, misses in found]
    report("fusing: measuring", len(chosen), len(chosen))
    error, _ = gate.error(view.graph)
    if error > tolerance:
        return None
    return [
        FusionEntry(r.name, r.doc, len(fired), tuple(fired), tuple(misses), error if fired else 0.0, tolerance) for r, fired, misses in found
    ]  # fmt: skip


@dataclass
class _State:
    fired: list[Fired] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    error: float = 0.0


def _run(rule: Rule, view: FuseView, gate: Gate) -> FusionEntry:
    tolerance = TOLERANCE.get(view.target.precision, TOLERANCE["fp32"])
    state = _State()
    misses: list[Miss] = []
    for _ in range(ROUNDS):
        matches, misses = _find(rule, view, state.broken)
        if not matches:
            break
        _round(rule, view, gate, tolerance, state, [m.node.name for m in matches])
    else:
        _, misses = _find(rule, view, state.broken)
    refused = [Miss(name, GATE, why) for name, why in state.broken.items()]
    return FusionEntry(
        rule.name, rule.doc, len(state.fired), tuple(state.fired), tuple([*misses, *refused]), state.error, tolerance
    )  # fmt: skip


def _find(rule: Rule, view: FuseView, broken: dict[str, str]) -> tuple[list[Match], list[Miss]]:
    matches: list[Match] = []
    misses: list[Miss] = []
    for found in rule.find(view):
        if isinstance(found, Miss):
            misses.append(found)
        elif view.where(found.node) not in broken:
            matches.append(found)
    return matches, misses


def _round(rule: Rule, view: FuseView, gate: Gate, tolerance: float, state: _State, names: Sequence[str]) -> None:
    """Applies the matches at nodes of these names; halves them until those that break the gate are found, and leaves those out."""
    before = _copy(view.graph.graph)
    fired: list[Fired] = []
    try:
        _apply(rule, view, state.broken, set(names), fired)
        error, where = gate.error(view.graph)
    except Exception as exc:  # a rule that trips over one place must not cost the whole export; the report says what happened
        error, where = NOT_RUN, f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"
    if error <= tolerance:
        state.fired += fired
        state.error = max(state.error, error)
        return
    _restore(view, before)
    if len(names) == 1:
        place = next((f.place for f in fired), names[0])
        state.broken[place] = where if error == NOT_RUN else f"{where}: error {error:.2g}, allowed {tolerance:.2g}"
        return
    half = len(names) // 2
    for part in (names[:half], names[half:]):
        _round(rule, view, gate, tolerance, state, part)


def _apply(rule: Rule, view: FuseView, broken: dict[str, str], names: set[str], fired: list[Fired]) -> None:
    for match in _find(rule, view, broken)[0]:
        if match.node.name in names and not match.node._erased:
            fired.append(Fired(view.where(match.node), match.what))
            match.apply()
    view.tidy()


def _copy(graph: fx.Graph) -> tuple[fx.Graph, dict[str, torch.Tensor]]:
    """The graph and the tensors that it reads, to come back to."""
    twin = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    result = twin.graph_copy(graph, values)
    old = next(n for n in reversed(graph.nodes) if n.op == "output")
    twin.output(result).meta.update(old.meta)
    owner = graph.owning_module
    tensors = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            value: Any = owner
            for part in str(node.target).split("."):
                value = getattr(value, part)
            tensors[str(node.target)] = value
    return twin, tensors


def _restore(view: FuseView, before: tuple[fx.Graph, dict[str, torch.Tensor]]) -> None:
    graph, tensors = before
    for name, value in tensors.items():
        path, _, leaf = name.rpartition(".")
        module = view.graph.get_submodule(path)
        if leaf not in module._parameters and leaf not in module._buffers:
            if isinstance(value, torch.nn.Parameter):
                module.register_parameter(leaf, value)
            elif isinstance(value, torch.Tensor):
                module.register_buffer(leaf, value)
    view.graph.graph = graph
    view.tidy()
