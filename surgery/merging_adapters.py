"""``merge`` of adapters: opens the folders that a statement names and hands them to the pass."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from surgery import merging
from surgery.core import ast
from surgery.core.diagnostics import fail
from surgery.core.plan import PlanSite, PlanStep
from surgery.core.printer import to_text
from surgery.core.source import Span
from surgery.core.spec import Checked
from surgery.idle import idle
from surgery.model.adapter import Adapter, open_adapter
from surgery.model.program import Origin
from surgery.passes import registry
from surgery.passes.kinds import adapter, tie_config
from surgery.passes.kinds.adapter_join import AdapterInputs, Loaded
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.merge_inputs import Source
from surgery.passes.kinds.stack import StackMethod
from surgery.passes.operation import Resolved
from surgery.passes.resolve import pick
from surgery.passes.verify import verify

if TYPE_CHECKING:
    from surgery.session import Session


def names_adapters(session: Session, checked: Checked) -> bool:
    """Whether a merge is one of adapters. Raises S0780 for adapters beside something else and S0790 for a method of the other kind."""
    node, call = checked.node, checked.call
    assert isinstance(node, ast.Merge) and call is not None
    mine = [part for part in node.of if part.name in session.spec.adapters]
    cls = registry.get("merge", call.name)
    assert issubclass(cls, MergeMethod | StackMethod)
    if not mine:
        _checkpoints(cls, checked, node)
        return False
    other = next((part for part in node.of if part.name not in session.spec.adapters), None)
    if other is not None:
        raise fail(
            "S0780", f"`{mine[0].name}` is an adapter, and `{other.name}` is not", _span(other, node), "merged with an adapter",
            also=[(_span(mine[0], node), "this is the adapter")],
            help="merge adapters with adapters and checkpoints with checkpoints; `fold` puts a merged adapter into the weights",
        )  # fmt: skip
    if not bool(getattr(cls, "adapters", "")):
        fits = ", ".join(c.name for c in registry.methods().values() if issubclass(c, MergeMethod) and bool(getattr(c, "adapters", "")))
        raise fail(
            "S0790", f"merge {call.name} merges checkpoints, and `{mine[0].name}` is an adapter", call.span, "not for adapters",
            help=f"these merge adapters: {fits}",
        )  # fmt: skip
    if "vocab" in call.args:
        raise fail(
            "S0790", "`vocab` is about checkpoints, and adapters are merged here", call.spans.get("vocab", call.span), "nothing looks at this",
            help="leave it out",
        )  # fmt: skip
    return True


def _checkpoints(cls: type[MergeMethod | StackMethod], checked: Checked, node: ast.Merge) -> None:
    call = checked.call
    assert call is not None
    if not getattr(cls, "checkpoints", True):
        raise fail(
            "S0790", f"merge {call.name} merges adapters, and `{node.of[0].name}` is none", call.span, "for adapters only",
            help='open one with `adapter NAME = load("...")`; `merge linear` and its relatives merge checkpoints',
        )  # fmt: skip
    for name in ("rank", "factorwise"):
        if name in call.args and hasattr(cls, name):
            raise fail(
                "S0790", f"`{name}` is about adapters, and merge {call.name} merges checkpoints here", call.spans.get(name, call.span), "nothing looks at this",
                help="leave it out",
            )  # fmt: skip


def merge_adapters(session: Session, checked: Checked, position: int) -> None:
    """Resolves names and sites, merges, verifies, records."""
    node, call = checked.node, checked.call
    assert isinstance(node, ast.Merge) and call is not None
    program = session.program
    sites = pick(program, node.selectors, session.sink)
    if node.selectors and not sites:
        if not session.sink.failed:
            idle(session, checked, position)
        return
    loaded = tuple(_loaded(session, part, node) for part in node.of)
    cls = registry.get("merge", call.name)
    given = tuple(Source(i.adapter.name, {}, {}, i.weight, span=i.span) for i in loaded)
    methods, inputs = merging._inputs(program, cls, call, given, sites, node)
    seed = int(call.args.get("seed", 0) or 0)
    told: list[str] = []
    op = Resolved(
        verb="merge", name=node.name or _label(loaded), place="", sites=tuple(sites), methods=methods[:1],
        origin=Origin(span=node.span, verb="merge", method=call.name, note=node.doc), seed=seed, study=session.study,
        data=AdapterInputs(loaded, inputs.layers, inputs.factors), tell=told.append, warn=session.sink.add, claim=session.claims.append,
    )  # fmt: skip
    session.progress(f"merge {call.name} of {', '.join(i.adapter.name for i in loaded)}")
    session.enter("merge")
    ties = dict(program.aliases)
    changes = adapter.apply(program, op)
    tie_config.settle(program, ties)
    verify(program, f"`merge {call.name}`", node.span)
    key = f"{position}: merge {call.name}"
    session.resolved[key] = [*(f"{i.adapter.name} * {i.weight:g}" for i in loaded), *(c.role for c in changes)]
    session.seeds[key] = seed
    session.versions[f"merge/{call.name}"] = op.method.version
    session.plan.steps.append(
        PlanStep(
            span=node.span, verb="merge", method=call.name, params={**op.method.params(), **merging._columns(methods)},
            sites=tuple(
                PlanSite(role=c.role, path=c.path, rows=c.rows, shape_before=c.shape_before, shape_after=c.shape_after, added=c.added, removed=c.removed, trainable=c.trainable, note=c.note)
                for c in changes
            ),
            text=to_text(node), doc=node.doc, stage=checked.stage, facts=tuple(told),
        )
    )  # fmt: skip


def _label(loaded: tuple[Loaded, ...]) -> str:
    """What the merged adapter is called without `as`: one adapter keeps its name."""
    return loaded[0].adapter.name.rpartition(".")[2] if len(loaded) == 1 else "merged"


def _span(part: ast.Weighted, node: ast.Merge) -> Span:
    return part.span if part.span.end else node.span


def _loaded(session: Session, part: ast.Weighted, node: ast.Merge) -> Loaded:
    weight = 1.0 if part.weight is None else float(part.weight.value)
    opened = _opened(session, part.name)
    return Loaded(opened, weight, _span(part, node))


def _opened(session: Session, name: str) -> Adapter:
    """An adapter of the spec. What a lock keeps of it is its content, so that is hashed when weights may be read."""
    stated = session.spec.adapters[name]
    assert stated.call is not None
    source = stated.node.span.source.name
    base = Path() if source in ("<text>", "<stdin>", "<nowhere>") else Path(source).parent
    found = open_adapter(
        str(stated.call.get("ref")), name, base, stated.call.spans.get("ref", stated.node.span), task=stated.call.args.get("task")
    )
    if session.study is not None and name not in session.data.digests:
        session.data.digests[name] = found.digest()
    return found
