"""From a checked statement to an operation on resolved sites: selectors, per-layer values, one method object per site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from surgery.core import ast
from surgery.core.diagnostics import Sink, SurgeryError, error, fail
from surgery.core.method import Method, MethodInfo
from surgery.core.plan import group_roles, plural
from surgery.core.selector import select
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.core.spec import Bound, Checked
from surgery.core.spread import expand_per_layer
from surgery.model.program import Origin, Program
from surgery.passes import registry
from surgery.passes.gone import explain
from surgery.passes.operation import Resolved


def created(program: Program) -> Mapping[str, list[Site]]:
    """What ``@name`` names: for each label of an attachment the sites of what it added, and the model's own parts that were made under it.

    The site of an attachment has op ``attachment``: its role is the site's role with the label behind it, its path the added module.
    """
    there = {s.role: s for s in program.anatomy.sites} if program.named else {}
    out = {label: found for label, roles in program.named.items() if (found := [there[r] for r in roles if r in there])}
    for a in program.attachments:
        site = replace(a.site, role=f"{a.site.role}.{a.name}", op="attachment", path=a.module, weight="", bias="", parameters=a.tensors)
        out.setdefault(a.name, []).append(site)
    return out


def pick(program: Program, selectors: Iterable[ast.Selector], sink: Sink) -> list[Site]:
    """The sites of several selectors in the order written, each once. Problems go to ``sink``."""
    names = created(program)
    chosen: dict[str, Site] = {}
    for selector in selectors:
        try:
            for site in select(program.anatomy, selector, names):
                chosen.setdefault(site.role, site)
        except SurgeryError as exc:
            sink.extend((explain(program, selector, names, exc) if program.gone else exc).diagnostics)
    return list(chosen.values())


def within(role: str, region: str) -> bool:
    """Whether a role is a region's own or of a part of it: ``layers[0].attn.q`` is within ``layers[0]``."""
    return role == region or role.startswith((region + ".", region + "["))


def resolve(program: Program, checked: Checked) -> Resolved:
    """Resolves one ``Operation``. Raises SurgeryError with every problem found (S03xx selectors, S02xx per-layer values).

    Neither sites nor methods where there are selectors, all of them marked ``?``, and they match nothing.
    """
    node, call = checked.node, checked.call
    assert isinstance(node, ast.Operation) and call is not None
    sink = Sink()
    sites = pick(program, node.selectors, sink)
    away: set[str] = set()
    for selector in node.except_:
        named = [s.role for s in pick(program, [selector, *_above(selector)], sink)]
        gone = {s.role for s in sites if any(within(s.role, role) for role in named)}
        if named and sites and not gone:
            sink.error(
                "S0313", f"`except` takes nothing away: {group_roles(named)[0]} is not in what was selected", selector.span,
                f"{plural(len(named), 'site')}, none of them selected", help="remove the clause, or name what was selected",
            )  # fmt: skip
        away |= gone
    kept = pick(program, node.keep, sink)
    sink.raise_if_failed()
    left = [s for s in sites if s.role not in away]
    if sites and not left:
        raise fail("S0310", "`except` takes away everything that was selected", node.span, f"{plural(len(sites), 'site')}, none is left")
    cls = registry.get(node.verb, call.name)
    stacks = {s.name: s.layers for s in program.anatomy.stacks}
    methods = build(cls, call, left, stacks) if left or not node.selectors else ()
    origin = Origin(span=node.span, verb=node.verb, method=call.name, note=node.doc)
    seed = call.args.get("seed", 0)
    return Resolved(
        verb=node.verb, name=node.name or call.name, place=node.place, sites=tuple(left), methods=methods, origin=origin,
        keep=tuple(kept), keep_own=node.keep_own, seed=int(seed or 0), statement=node,
    )  # fmt: skip


def _above(selector: ast.Selector) -> list[ast.Selector]:
    """What ``x.**`` takes parts from: behind ``except`` it stands for ``x`` whole, so that regions in it are taken away too."""
    *steps, last = selector.steps or (None,)
    if not isinstance(last, ast.Step) or last.name != "**" or not (steps or selector.ref):
        return []
    return [replace(selector, steps=tuple(s for s in steps if s is not None))]


def build(cls: type[Method], call: Bound, sites: list[Site], stacks: Mapping[str, int] | None = None) -> tuple[Method, ...]:
    """One method object per site (one in all when there are no sites), lists, tables and ramps spread over the sites."""
    assert isinstance(call.info, MethodInfo)
    columns: dict[str, list[Any]] = {}
    sink = Sink()
    count = max(1, len(sites))
    for name, value in call.values().items():
        if isinstance(value, ast.ListValue | ast.Table | ast.Call):
            info = call.info.param(name)
            assert info is not None
            try:
                column = expand_per_layer(value, sites, integer=info.type == "int", span=call.spans.get(name, call.span), stacks=stacks)
            except SurgeryError as exc:
                sink.extend(exc.diagnostics)
                continue
            for each in column:
                _within(name, each, info, call.spans.get(name, call.span), sink)
            columns[name] = column
        else:
            columns[name] = [value] * count
    sink.raise_if_failed()
    try:
        return tuple(cls(**{name: column[i] for name, column in columns.items()}) for i in range(count))
    except ValueError as exc:  # a method's own rule between its parameters (__post_init__)
        raise SurgeryError(error("S0250", f"{call.name}: {exc}", call.span, "these values do not go together")) from exc


def _within(name: str, value: Any, info: Any, span: Span, sink: Sink) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if (info.min is not None and value < info.min) or (info.max is not None and value > info.max):
        sink.error("S0251", f"`{name}` reaches {value:g}, which is outside of {_range(info)}", span, "spread over the layers")


def _range(info: Any) -> str:
    low = "-inf" if info.min is None else f"{info.min:g}"
    high = "inf" if info.max is None else f"{info.max:g}"
    return f"{low}..{high}"
