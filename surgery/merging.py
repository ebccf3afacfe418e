"""``merge``: opens the checkpoints that a statement names and hands them to the pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.core import ast
from surgery.core.diagnostics import fail
from surgery.core.plan import PlanSite, PlanStep
from surgery.core.printer import to_text
from surgery.core.spec import Checked
from surgery.model.program import Origin, Program
from surgery.passes import registry
from surgery.passes.kinds.merge import Inputs, Source
from surgery.passes.operation import Resolved
from surgery.passes.resolve import build, pick
from surgery.passes.verify import verify

if TYPE_CHECKING:
    from surgery.session import Session


def merge(session: Session, checked: Checked, position: int) -> None:
    """Resolves names and sites, merges, verifies, records."""
    from surgery.session import apply

    node, call = checked.node, checked.call
    assert isinstance(node, ast.Merge) and call is not None
    program = session.program
    sites = pick(program, node.selectors, session.sink)
    if node.selectors and not sites:
        return
    sources = tuple(_source(session, part, node) for part in node.of)
    cls = registry.get("merge", call.name)
    regions = [s for s in program.anatomy.sites if s.is_region and s.layer is not None and s.role.endswith(f"[{s.layer}]")]
    varied = any(isinstance(v, ast.ListValue | ast.Table | ast.Call) for v in call.values().values())
    methods = build(cls, call, regions if varied else [], {s.name: s.layers for s in program.anatomy.stacks})
    seed = int(call.args.get("seed", 0) or 0)
    origin = Origin(span=node.span, verb="merge", method=call.name, note=node.doc)
    layers: Any = tuple(zip(regions, methods, strict=True)) if varied else ()
    told: list[str] = []
    op = Resolved(
        verb="merge", name=node.name or call.name, place="", sites=tuple(sites), methods=methods[:1], origin=origin, seed=seed,
        study=session.study, data=Inputs(sources, layers), tell=told.append, warn=session.sink.add,
    )  # fmt: skip
    text = to_text(node)
    session.progress(f"merge {op.name}")
    session.enter("merge")
    changes = apply(program, op)
    verify(program, f"`merge {call.name}`", node.span)
    key = f"{position}: merge {call.name}"
    session.resolved[key] = [*(f"{s.name} * {s.weight:g}" for s in sources), *(c.role for c in changes if c.role)]
    session.seeds[key] = seed
    session.versions[f"merge/{call.name}"] = op.method.version
    session.plan.steps.append(
        PlanStep(
            span=node.span, verb="merge", method=call.name, params={**op.method.params(), **_columns(methods)},
            sites=tuple(PlanSite(role=c.role, path=c.path, rows=c.rows, shape_before=(), shape_after=(), added=0, removed=0, trainable=0, note=c.note) for c in changes if c.role),
            text=text, doc=node.doc, stage=checked.stage, facts=(*(c.note for c in changes if not c.role), *told),
        )
    )  # fmt: skip


def _columns(methods: Any) -> dict[str, Any]:
    """The parameters that differ from layer to layer, one value a layer."""
    first = methods[0].params()
    return {k: [m.params()[k] for m in methods] for k in first if any(m.params()[k] != first[k] for m in methods)}


def _source(session: Session, part: ast.Weighted, node: ast.Merge) -> Source:
    spec = session.spec
    weight = 1.0 if part.weight is None else float(part.weight.value)
    span = part.span if part.span.end else node.span
    if part.name in spec.models:
        if spec.models[part.name] is spec.model:
            return Source(part.name, {}, {}, weight, own=True, span=span)
        return Source(part.name, *_opened(session, spec.models[part.name]), weight, span=span)
    if part.name in spec.checkpoints:
        return Source(part.name, *_opened(session, spec.checkpoints[part.name]), weight, span=span)
    raise fail(
        "S0777", f"`{part.name}` is no checkpoint", span, "merged here",
        help='this version merges whole checkpoints: name one with `checkpoint NAME = load("...")`',
    )  # fmt: skip


def _opened(session: Session, stated: Checked) -> tuple[Any, Any]:
    """Expressions and ties of another checkpoint; each is opened once. The program is captured like the model itself, from its own config."""
    node = stated.node
    ref = node.ref if isinstance(node, ast.Model) else str(stated.call.get("ref")) if stated.call is not None else ""
    if ref not in session.opened:
        session.progress(f"opening {ref}")
        session.opened[ref] = session.open(ref, node.span)
    other: Program = session.opened[ref]
    mine = session.program.info
    if other.info.family != mine.family:
        raise fail(
            "S0774", f"{ref} is {other.info.family or 'a plain module'}, the model is {mine.family or 'a plain module'}", node.span,
            "named here", help="merge checkpoints of one architecture",
        )  # fmt: skip
    session.program.weights.twins.extend(t for t in other.weights.twins if t not in session.program.weights.twins)
    session.program.weights.notes.extend(n for n in other.weights.notes if n not in session.program.weights.notes)
    return other.weights, other.aliases
