"""``merge``: opens the checkpoints that a statement names and hands them to the pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.core import ast, nested
from surgery.core.diagnostics import fail
from surgery.core.method import Method
from surgery.core.plan import PlanSite, PlanStep
from surgery.core.printer import to_text
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.core.spec import Bound, Checked
from surgery.core.spread import expand_per_layer
from surgery.idle import idle
from surgery.model.program import Origin, Program
from surgery.passes import registry
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.merge_inputs import Inputs, Source
from surgery.passes.kinds.stack import Stacking, StackMethod
from surgery.passes.kinds.stack_order import order_of
from surgery.passes.operation import Resolved
from surgery.passes.resolve import build, pick
from surgery.passes.verify import verify

if TYPE_CHECKING:
    from surgery.session import Session


def merge(session: Session, checked: Checked, position: int) -> None:
    """Resolves names and sites, merges, verifies, records."""
    from surgery.merging_adapters import merge_adapters, names_adapters
    from surgery.session import apply

    node, call = checked.node, checked.call
    assert isinstance(node, ast.Merge) and call is not None
    if names_adapters(session, checked):
        return merge_adapters(session, checked, position)
    program = session.program
    sites = pick(program, node.selectors, session.sink)
    if node.selectors and not sites:
        if not session.sink.failed:
            idle(session, checked, position)
        return
    sources = tuple(_source(session, part, node) for part in node.of)
    cls = registry.get("merge", call.name)
    data: Any
    if issubclass(cls, StackMethod):
        methods, data = _stacking(program, cls, call, sources, node)
    else:
        methods, data = _inputs(program, cls, call, sources, sites, node)
    seed = int(call.args.get("seed", 0) or 0)
    origin = Origin(span=node.span, verb="merge", method=call.name, note=node.doc)
    told: list[str] = []
    op = Resolved(
        verb="merge", name=node.name or call.name, place="", sites=tuple(sites), methods=methods[:1], origin=origin, seed=seed,
        study=session.study, data=data, tell=told.append, warn=session.sink.add, claim=session.claims.append,
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
            sites=tuple(PlanSite(role=c.role, path=c.path, rows=c.rows, shape_before=(), shape_after=(), added=c.added, removed=c.removed, trainable=c.trainable, note=c.note) for c in changes if c.role),
            text=text, doc=node.doc, stage=checked.stage, facts=(*(c.note for c in changes if not c.role), *told),
        )
    )  # fmt: skip


def _inputs(
    program: Program, cls: Any, call: Bound, sources: tuple[Source, ...], sites: list[Site], node: ast.Merge
) -> tuple[tuple[Method, ...], Inputs]:
    """The methods and factors of the layers that a statement speaks of: all of them, or those with a selected part."""
    chosen = {(s.stack, s.layer) for s in sites}
    regions = [
        s for s in program.anatomy.sites
        if s.is_region and s.layer is not None and s.role.endswith(f"[{s.layer}]") and (not sites or (s.stack, s.layer) in chosen)
    ]  # fmt: skip
    stacks = {s.name: s.layers for s in program.anatomy.stacks}
    varied = any(isinstance(v, ast.ListValue | ast.Table | ast.Call) for v in call.values().values())
    methods = build(cls, call, regions if varied else [], stacks)
    layers: Any = tuple(zip(regions, methods, strict=True)) if varied else ()
    if issubclass(cls, MergeMethod) and (why := cls.together(methods)):
        raise fail("S0250", f"{call.name}: {why}", call.span, "these values do not go together")
    given = call.args.get("weights")
    if given is None:
        return methods, Inputs(sources, layers)
    span = call.spans.get("weights", node.span)
    if len(given) != len(sources):
        raise fail("S0775", f"factors for {len(given)} models, and {len(sources)} are named", span, "one for each model")
    if any(part.weight is not None for part in node.of):
        raise fail("S0775", "factors stand behind `of` and in `weights`", span, "given twice", help="leave one of the two out")
    columns = [expand_per_layer(nested.spread(v), regions, span=span, stacks=stacks) for v in given]
    factors = tuple((s, tuple(float(c[i]) for c in columns)) for i, s in enumerate(regions))
    return methods, Inputs(sources, layers, factors)


def _stacking(program: Program, cls: Any, call: Bound, sources: tuple[Source, ...], node: ast.Merge) -> tuple[tuple[Method, ...], Stacking]:
    """The order of the layers, and a method for each layer of the result where parameters differ by layer."""
    programs = tuple(program if s.own or s.program is None else s.program for s in sources)
    order = order_of(program, sources, programs, call.args.get("slices"), call.spans.get("slices", node.span))
    varied = any(isinstance(v, ast.ListValue | ast.Table | ast.Call) for v in call.values().values())
    methods = build(cls, call, order.sites() if varied else [], {order.stack: len(order.layers)})
    return methods, Stacking(sources, programs, order, tuple(m for m in methods if isinstance(m, StackMethod)))


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
        return _other(part.name, _opened(session, spec.models[part.name]), weight, span)
    if part.name in spec.checkpoints:
        return _other(part.name, _opened(session, spec.checkpoints[part.name]), weight, span)
    raise fail(
        "S0777", f"`{part.name}` is no checkpoint", span, "merged here",
        help='name a checkpoint, `checkpoint NAME = load("...")`, or an adapter that is stored, `adapter NAME = load("...")`',
    )  # fmt: skip


def _other(name: str, program: Program, weight: float, span: Span) -> Source:
    return Source(name, program.weights, program.aliases, weight, span=span, program=program)


def _opened(session: Session, stated: Checked) -> Program:
    """Another checkpoint; each is opened once. The program is captured like the model itself, from its own config."""
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
    return other
