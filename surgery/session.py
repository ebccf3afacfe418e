"""One walk over a checked spec: statements run top to bottom on a Program, each is resolved, applied, verified, recorded.

The walk touches no weight; ``plan`` stops after it, ``compile`` then realises and emits what the walk left.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from surgery.backends import registry as backends
from surgery.core import ast
from surgery.core.diagnostics import Diagnostic, Label, Sink, SurgeryError, error
from surgery.core.method import Method
from surgery.core.plan import Expectation, Plan, PlanSite, PlanStep, Totals
from surgery.core.printer import to_text
from surgery.core.source import Span
from surgery.core.spec import Checked, Spec
from surgery.expecting import failed, judge
from surgery.idle import idle
from surgery.merging import merge
from surgery.model import cost, past
from surgery.model.claims import Claim
from surgery.model.data_open import Shelf
from surgery.model.program import Origin, Program
from surgery.model.study import Study
from surgery.passes import registry
from surgery.passes.expect import measure, parameter_sizes
from surgery.passes.kinds import tie_config, tie_fold
from surgery.passes.operation import Resolved, SiteChange
from surgery.passes.resolve import build, pick, resolve
from surgery.passes.verify import verify

CHANGES_MODEL = (ast.Operation, ast.Merge)
ATTACHING = ("adapt", "insert", "freeze", "unfreeze")


@dataclass(frozen=True)
class Emission:
    """One ``emit`` with the program as the lines above left it; ``folded`` is a copy in which everything that can fold is folded, where the
    output wants that and something is attached."""

    checked: Checked
    program: Program
    base: Program
    folded: Program | None = None


@dataclass
class Session:
    """State of one walk. ``base`` is a copy of the program before the first statement when ``keep_base``; ``study`` is there when
    weights may be read; ``claims`` are what passes promised of their changes, to be measured before anything is emitted;
    ``totals`` are the params, bytes and flops per token before the first statement; ``folds`` the position of every ``fold`` with
    the program right before it and right after it (when ``keep_base``); ``open`` gives the
    program of another reference, ``opened`` keeps them; ``data`` opens what `using` names."""

    spec: Spec
    program: Program
    plan: Plan
    keep_base: bool = False
    base: Program | None = None
    emissions: list[Emission] = field(default_factory=list)
    checks: list[tuple[Checked, Program, int]] = field(default_factory=list)
    resolved: dict[str, list[str]] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    folds: list[tuple[int, Program, Program]] = field(default_factory=list)
    sink: Sink = field(default_factory=Sink)
    progress: Callable[..., None] = lambda *what: None
    study: Study | None = None
    claims: list[Claim] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)
    open: Callable[[str, Any], Program] = lambda ref, span: _closed(ref, span)
    opened: dict[str, Program] = field(default_factory=dict)
    stretches: list[tuple[Program, Program]] = field(default_factory=list)
    _stretch: Program | None = None
    data: Shelf = field(default_factory=lambda: Shelf({}))

    def run(self) -> None:
        """Walks every statement. A statement that fails is reported and the rest still run where that makes sense;
        raises SurgeryError with all findings at the end when there was an error."""
        self.program.past = past.begin(self.program)
        sizes = parameter_sizes(self.program)
        params_before = sum(sizes.values())
        trainable_before = sum(n for name, n in sizes.items() if name not in self.program.frozen)
        bytes_before = cost.bytes_of(self.program)
        counted = cost.count(self.program)
        flops_before, self.plan.flops_unit = counted.per_token, counted.unit
        self.totals = {"params": params_before, "bytes": bytes_before, "flops": flops_before}
        if self.keep_base or any(isinstance(c.node, ast.ExpectQuantity) and c.node.of_base for c in self.spec.statements):
            self.base = self.program.copy()
        broken = self.sink.failed
        lost: set[str] = set()  # names that a failed statement would have made: that they are missing is no finding of its own
        for position, checked in enumerate(self.spec.statements):
            handler = HANDLERS.get(type(checked.node))
            if handler is None:
                continue
            if broken and isinstance(checked.node, ast.ExpectQuantity | ast.ExpectCheck):
                continue  # what an expectation would find now says nothing about the spec
            try:
                handler(self, checked, position)
            except SurgeryError as exc:
                self.sink.extend(d for d in exc.diagnostics if not _follows(d, lost))
                if exc.exit_code == 2:
                    raise
                if made := getattr(checked.node, "name", "") or (checked.call.name if checked.call is not None else ""):
                    lost.add(made)  # what is attached without a name is called as its method
            broken |= self.sink.failed and not isinstance(checked.node, ast.ExpectQuantity | ast.ExpectCheck)
        if not broken:
            sizes = parameter_sizes(self.program)
            self.plan.totals = Totals(
                params_before=params_before,
                params_after=sum(sizes.values()),
                trainable_before=trainable_before,
                trainable=sum(n for name, n in sizes.items() if name not in self.program.frozen),
                bytes_before=bytes_before,
                bytes_after=cost.bytes_of(self.program),
                flops_per_token_before=flops_before,
                flops_per_token_after=cost.flops_per_token(self.program),
            )
        if self._stretch is not None:
            self.stretches.append((self._stretch, self.program))
        self.plan.diagnostics = list(self.sink.items)

    def enter(self, verb: str) -> None:
        """Called before a statement of ``verb`` changes the program: keeps what it was before and after statements that only attach."""
        if not self.keep_base:
            return
        if verb in ATTACHING:
            if self._stretch is None:
                self._stretch = self.program.copy() if self.plan.steps else self.base
        elif self._stretch is not None:
            self.stretches.append((self._stretch, self.program.copy()))
            self._stretch = None

    def changes_later(self, position: int) -> bool:
        """Whether a statement after ``position`` changes the model (then what stands now must be kept by a copy)."""
        return any(isinstance(c.node, CHANGES_MODEL) for c in self.spec.statements[position + 1 :])

    def snapshot(self, position: int) -> Program:
        return self.program.copy() if self.changes_later(position) else self.program


def _follows(found: Diagnostic, lost: set[str]) -> bool:
    """Whether a finding only says that something is missing which a statement that failed would have made."""
    said = {"S0306": "`@{}`", "S0870": "`live` names `{}`,"}.get(found.code)
    return said is not None and any(said.format(name) in found.message for name in lost)


def _closed(ref: str, span: Any) -> Program:
    raise SurgeryError(error("S0777", f"`{ref}` cannot be opened here", span, help="run the spec through plan or compile"))


def operate(session: Session, checked: Checked, position: int) -> None:
    """resolve -> apply -> verify -> record: the passes of one operation."""
    node = checked.node
    assert isinstance(node, ast.Operation) and checked.call is not None
    found = resolve(session.program, checked)
    if node.selectors and not found.sites:
        return idle(session, checked, position)
    told: list[str | Callable[[], str]] = []
    data = session.data.open(node.using, session.program) if node.using else None
    op = replace(
        found, data=data, study=session.study, claim=session.claims.append, warn=session.sink.add, tell=told.append, later=told.append,
        base=session.totals,
    )  # fmt: skip
    before = session.program.copy() if node.verb == "fold" and session.keep_base else None
    text = to_text(node)
    session.progress(f"{node.verb} {op.name}")
    session.enter(node.verb)
    try:
        changes = apply(session.program, op)
    except SurgeryError as exc:
        raise placed(exc, node.span) from exc
    verify(session.program, f"`{node.verb} {checked.call.name}`", node.span)
    if before is not None:
        session.folds.append((position, before, session.snapshot(position)))
    key = f"{position}: {node.verb} {checked.call.name}"
    session.resolved[key] = [c.role + _rows(c) for c in changes]
    session.seeds[key] = op.seed
    session.versions[f"{node.verb}/{checked.call.name}"] = op.method.version
    session.plan.steps.append(
        PlanStep(
            span=node.span, verb=node.verb, method=checked.call.name, params=_params(op),
            sites=tuple(_plan_site(c) for c in changes), text=text, doc=node.doc, stage=checked.stage,
            facts=(*_facts(op, changes), *(line if isinstance(line, str) else line() for line in told)),
        )
    )  # fmt: skip


def placed(fault: SurgeryError, span: Span) -> SurgeryError:
    """The same fault; weights and values that are not finite, which are found far below the statement, point at the statement that reads them."""
    found = [
        replace(d, labels=(Label(span, "needs its values"),)) if d.code in ("S0752", "S0753") and not d.labels else d
        for d in fault.diagnostics
    ]
    return SurgeryError(*found, exit_code=fault.exit_code)


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Runs the kind's machinery; every kind is one module of ``passes/kinds``."""
    kind = importlib.import_module(f"surgery.passes.kinds.{op.method.kind}")
    ties = dict(program.aliases)
    changes: list[SiteChange] = kind.apply(program, op)
    tie_config.settle(program, ties)
    return changes


def _rows(change: SiteChange) -> str:
    return "".join(f"[{a}:{b}]" for a, b in change.rows)


def _params(op: Resolved) -> dict[str, Any]:
    """One value per parameter; those that differ by site are lists in site order."""
    columns = [m.params() for m in op.methods]
    out = {}
    for name in columns[0]:
        values = [c[name] for c in columns]
        out[name] = values[0] if all(v == values[0] for v in values) else values
    return out


def _plan_site(c: SiteChange) -> PlanSite:
    return PlanSite(
        role=c.role, path=c.path, rows=c.rows, shape_before=c.shape_before, shape_after=c.shape_after,
        added=c.added, removed=c.removed, trainable=c.trainable, note=c.note,
    )  # fmt: skip


IDENTITY = {
    "exact": "output at init: unchanged",
    "near": "output at init: unchanged up to {bound:.0e}",
    "changed": "output at init: changes by design",
}


def _facts(op: Resolved, changes: list[SiteChange]) -> tuple[str, ...]:
    cls: type[Method] = type(op.method)
    if op.verb not in ("adapt", "insert") or cls.kind == "state":
        return ()
    worst = max(op.methods, key=lambda m: list(IDENTITY).index(m.identity))
    # widening takes the branch into the block that it stands beside; behind a product its own first one can be packed
    folds = {"after": "gemm", "before": "none"}.get(op.place, "widen") if cls.fold_class == "widen" else cls.fold_class
    return (f"{IDENTITY[worst.identity].format(bound=worst.identity_bound)}; folds: {folds}",)


def carry(session: Session, checked: Checked, position: int) -> None:
    """``train``: the method travels with the emitted module."""
    node, call = checked.node, checked.call
    assert isinstance(node, ast.Train) and call is not None
    cls = registry.get("train", call.name)
    sites = pick(session.program, node.selectors, session.sink)
    if node.selectors and not sites and not session.sink.failed:
        return idle(session, checked, position)
    origin = Origin(span=node.span, verb="train", method=call.name, note=node.doc)
    op = Resolved(
        verb="train", name=call.name, place="on", sites=tuple(sites), methods=build(cls, call, [])[:1] * max(1, len(sites)), origin=origin
    )
    changes = apply(session.program, op)
    method = session.program.schedules[-1][0]
    key = f"{position}: train {call.name}"
    session.resolved[key] = [s.role for s in sites]
    session.versions[f"train/{call.name}"] = method.version
    facts = tuple(c.note for c in changes if c.note)
    session.plan.steps.append(
        PlanStep(
            span=node.span, verb="train", method=call.name, params=method.params(), text=to_text(node), doc=node.doc,
            stage=checked.stage, facts=facts,
        )
    )  # fmt: skip


def expect_quantity(session: Session, checked: Checked, position: int) -> None:
    node = checked.node
    assert isinstance(node, ast.ExpectQuantity)
    sites = None
    if node.selectors:
        problems = Sink()
        sites = pick(session.program, node.selectors, problems)
        problems.raise_if_failed()  # a selector with `?` may name nothing: that counts 0
    if node.of and node.of not in session.program.named and not any(a.name == node.of for a in session.program.attachments):
        session.sink.error(
            "S0605", f"nothing in the model is named `{node.of}`", node.span, "no statement above left anything of this name",
            help="name what an operation creates with `as`; what was folded or removed no longer counts",
        )  # fmt: skip
        return
    found = measure(session.program, node.quantity, sites, node.of)
    if found.value is None:
        session.checks.append((checked, session.snapshot(position), len(session.plan.expectations)))
        session.plan.expectations.append(
            Expectation(to_text(node).removeprefix("expect "), None, None, None, "measured by compile", node.span)
        )
        return
    result = judge(session, node, found)
    session.plan.expectations.append(result)
    if not result.ok:
        session.sink.add(failed(result, node))


def expect_check(session: Session, checked: Checked, position: int) -> None:
    node = checked.node
    assert isinstance(node, ast.ExpectCheck)
    session.checks.append((checked, session.snapshot(position), len(session.plan.expectations)))
    session.plan.expectations.append(
        Expectation(to_text(node).removeprefix("expect "), None, None, checked.within, "measured by compile", node.span)
    )


def schedule_emission(session: Session, checked: Checked, position: int) -> None:
    node = checked.node
    assert isinstance(node, ast.Emit) and checked.call is not None
    backends.require(checked.call.name, node.span)
    params = {k: v for k, v in checked.call.values().items() if v is not None}
    backend = backends.get(checked.call.name, node.span)
    facts = _told(session, backend, params, checked.call.spans.get("live", node.span), node.span)
    folded: Program | None = None
    changes: list[SiteChange] = []
    if backend.folds and params.get("live") is not True and session.program.attachments:
        folded, changes = _folded(session.program, node.span, params.get("live"))
    if (check := getattr(backend, "check", None)) is not None and not session.sink.failed:
        check(session.program if folded is None else folded, node.span)
        facts = (*facts, *_open_counts(session))
    if session.keep_base:
        assert session.base is not None
        session.emissions.append(Emission(checked, session.snapshot(position), session.base, folded))
    session.plan.steps.append(
        PlanStep(
            span=node.span, verb="emit", method=checked.call.name, params={**params, "to": node.to}, text=to_text(node), doc=node.doc,
            stage=checked.stage, facts=(*(_settled(session.program, folded, changes, params.get("live")) if folded is not None else ()), *facts),
        )
    )  # fmt: skip


def _told(session: Session, backend: Any, params: dict[str, Any], place: Span, span: Span) -> tuple[str, ...]:
    """What a backend says of an output while it is planned. Raises S0870 for a `live` that names nothing, and what the backend raises."""
    from surgery.folding import live_modules, refuse_unknown

    live = params.get("live")
    refuse_unknown(session.program, live, place)
    if (tell := getattr(backend, "plan", None)) is None or session.sink.failed:
        return ()
    return tuple(tell(session.program, params, live_modules(session.program, live), span))


def _open_counts(session: Session) -> tuple[str, ...]:
    """A line of the plan where only compile knows how many units each layer loses, on which a config may not agree."""
    if session.study is not None or not any(s.verb == "prune" and s.params.get("scope") == "global" for s in session.plan.steps):
        return ()
    return (
        "checked with the same count in every layer: compile chooses the counts, and refuses (S0862) those that the config has no word for",
    )


def _folded(program: Program, span: Span, live: Any) -> tuple[Program, list[SiteChange]]:
    """A copy with everything folded that can fold and is not ``live``, and what became of each attachment."""
    from surgery.folding import fold_all, live_names

    copy = program.copy()
    return copy, fold_all(copy, Origin(span=span, verb="emit", method="fold"), live_names(live))


def _settled(program: Program, folded: Program, changes: list[SiteChange], live: Any) -> tuple[str, ...]:
    """What folding for an output leaves live, and which tied tensors are two in it."""
    apart = [n for n in program.aliases if n not in folded.aliases and n in folded.weights]
    sizes = {n: math.prod(folded.weights[n].shape) for n in apart}
    return (
        *_kept_live(program, changes, live),
        *(f"folded for this output, {n} is no longer tied: {size:,} parameters more" for n, size in sizes.items()),
    )


def _kept_live(program: Program, changes: list[SiteChange], live: Any) -> tuple[str, ...]:
    """What an output that folds leaves live, and why, for the plan. ``changes`` are those of :func:`_folded`."""
    from surgery.folding import live_names, staying

    kept = tie_fold.stay_live(program) if not live else []
    count = f"{len(kept)} adapter{'s stay' if len(kept) > 1 else ' stays'}"
    shared = (f"{count} live: layers share the weights that {'they change' if len(kept) > 1 else 'it changes'}",) if kept else ()
    return (*shared, *staying(program, changes, live_names(live), {a.module for a in kept}))


Handler = Callable[[Session, Checked, int], None]

HANDLERS: dict[type[ast.Statement], Handler] = {
    ast.Operation: operate,
    ast.Merge: merge,
    ast.Train: carry,
    ast.ExpectQuantity: expect_quantity,
    ast.ExpectCheck: expect_check,
    ast.Emit: schedule_emission,
}
