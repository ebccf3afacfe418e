"""``show``, ``select`` and ``diff``: looking at models, artifacts, specs and plans without changing anything."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from surgery.core import ast
from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.near import near, quoted
from surgery.core.plan import group_roles, plural, size
from surgery.core.site import Site
from surgery.core.source import Source
from surgery.dimensions import dims_json, dims_text, groups_json, groups_text
from surgery.grammar.parser import parse
from surgery.model.program import Origin, Program
from surgery.opening import open_program
from surgery.passes.expect import attached_to, parameter_sizes
from surgery.passes.resolve import created


def site_json(site: Site) -> dict[str, Any]:
    """A site in the shape of schema ``surgery.show/1``."""
    return {
        "role": site.role, "path": site.path, "op": site.op, "rows": [list(r) for r in site.rows], "shape": list(site.shape),
        "dtype": site.dtype, "heads": site.heads, "kv_heads": site.kv_heads, "head_dim": site.head_dim, "tied_to": site.tied_to,
    }  # fmt: skip


@dataclass
class Shown:
    """What ``show`` found."""

    program: Program
    blame: bool = False
    only: str = ""
    """With ``blame`` or ``dims``: a glob, only tensors of these names."""
    dims: bool = False
    """The dimension classes in place of the parts."""

    def as_json(self) -> dict[str, Any]:
        """Schema ``surgery.show/1``; with ``blame`` it has the key ``blame``: for each tensor that a statement made or changed its ``name``,
        ``shape``, ``statements`` (``file``, ``line``, ``column``, ``verb``, ``method``, oldest first) and ``value``, the lines of its expression.
        """
        from surgery.model import cost

        p = self.program
        if self.dims:
            return dims_json(p, self.only)
        found = {
            "schema": "surgery.show/1",
            "family": p.info.family,
            "params": sum(parameter_sizes(p).values()),
            "bytes": cost.bytes_of(p),
            "stacks": [{"name": s.name, "layers": s.layers} for s in p.anatomy.stacks],
            "sites": [site_json(s) for s in p.anatomy.sites],
            "unresolved": [{"path": u.path, "why": u.why} for u in p.anatomy.unresolved],
        }
        return found | {"blame": self._blame_json()} if self.blame else found

    def render_text(self) -> str:
        from surgery.model import cost

        p = self.program
        if self.dims:
            return dims_text(p, self.only)
        if self.only:
            return "\n".join(self._blame()) + "\n"
        params = sum(parameter_sizes(p).values())
        lines = [f"{p.info.ref}: {p.info.family or 'module'} ({p.info.architecture}), {params:,} parameters, {size(cost.bytes_of(p))}"]
        stacks = ", ".join(f"{s.name} ({plural(s.layers, 'layer')})" for s in p.anatomy.stacks)
        lines.append(f"stacks: {stacks or 'none'}")
        found = cost.count(p)
        lines.append(f"flops per {found.unit}: {found.per_token:,}{found.at}")
        lines += [f"note: {note}" for note in p.info.notes]
        lines += ["", *self._table()]
        if p.attachments:
            lines += ["", "added by surgery:"]
            for label, sites in created(p).items():
                lines.append(f"  @{label}: {', '.join(group_roles([s.role for s in sites]))}")
        if p.anatomy.unresolved:
            lines += ["", "without a role (select them by path, in quotes):"]
            lines += [f"  {u.path}: {u.why}" for u in p.anatomy.unresolved]
        if self.blame:
            lines += ["", *self._blame()]
        return "\n".join(lines) + "\n"

    def _table(self) -> list[str]:
        """One row per group of sites that differ only in their layer."""
        groups: dict[tuple[Any, ...], list[Site]] = {}
        for s in self.program.anatomy.sites:
            tail = s.role.partition("]")[2] if "[" in s.role else s.role
            head = s.role.partition("[")[0] if "[" in s.role else ""
            groups.setdefault((head, tail, s.op, s.shape, s.heads, s.kv_heads, s.rows, "kv_of" in s.facts), []).append(s)
        rows = []
        for sites in groups.values():
            s = sites[0]
            facts = []
            if s.heads and s.is_region:
                facts.append(
                    f"{s.heads} heads" + (f", {s.kv_heads} kv heads" if s.kv_heads not in (None, s.heads) else "") + f" of {s.head_dim}"
                )
            if s.facts.get("kv_of"):
                facts.append(f"keys and values of {', '.join(group_roles(list(dict.fromkeys(str(x.facts['kv_of']) for x in sites))))}")
            if s.rows:
                facts.append("rows " + ", ".join(f"{a}:{b}" for a, b in s.rows[:3]) + (" ..." if len(s.rows) > 3 else ""))
            if s.tied_to:
                facts.append(f"tied to {s.tied_to}")
            role = ", ".join(group_roles([x.role for x in sites]))
            rows.append((role, s.op, " x ".join(map(str, s.shape)), s.path if len(sites) == 1 else _stem(sites), "; ".join(facts)))
        widths = [max((len(r[i]) for r in rows), default=0) for i in range(4)]
        return ["  " + "  ".join(f"{cell:<{w}}" for cell, w in zip(r, [*widths, 0], strict=True)).rstrip() for r in rows]

    def _blamed(self) -> list[tuple[str, list[Origin]]]:
        """The tensors that a statement made or changed, those that were asked for, with the statements, oldest first."""
        named = set(matching(self.program, self.only)) if self.only else None
        found = ((name, self.program.journal.of(name)) for name in self.program.weights if named is None or name in named)
        return [(name, list(origins)) for name, origins in found if origins]

    def _blame_json(self) -> list[dict[str, Any]]:
        from surgery.model.weights import describe

        weights = self.program.weights
        return [
            {
                "name": name, "shape": list(weights[name].shape), "value": describe(weights[name]).splitlines(),
                "statements": [
                    {"file": o.span.source.name, "line": o.span.line, "column": o.span.column, "verb": o.verb, "method": o.method} for o in origins
                ],
            }
            for name, origins in self._blamed()
        ]  # fmt: skip

    def _blame(self) -> list[str]:
        """For each tensor that a statement made or changed: the expression and the statements, oldest first."""
        from surgery.model.weights import describe

        lines = ["made or changed by:"]
        for name, origins in self._blamed():
            lines.append(f"  {name} {list(self.program.weights[name].shape)}")
            lines += [f"    {o.span}  {o.verb} {o.method}" for o in origins]
            lines += [f"      {row}" for row in describe(self.program.weights[name]).splitlines()]
        what = f"none of the {plural(len(matching(self.program, self.only)), 'tensor')} of this name" if self.only else "nothing"
        return lines if len(lines) > 1 else [f"{what} was made or changed by surgery"]


def _stem(sites: list[Site]) -> str:
    """The common form of several paths: what differs becomes ``*``."""
    parts = [s.path.split(".") for s in sites]
    if len({len(p) for p in parts}) != 1:
        return sites[0].path + " ..."
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in zip(*parts, strict=True))


def show(ref: Any, *, blame: bool = False, only: str = "", dims: bool = False, allow_code: bool = False, use_cache: bool = True) -> Shown:
    """The anatomy of a model or artifact, or with ``dims`` its dimension classes, from headers alone."""
    program, _ = open_program(ref, allow_code=allow_code, use_cache=use_cache)
    program.anatomy  # noqa: B018  found here, so that its findings are raised here
    if only and not matching(program, only):
        close = near(only.strip("*"), program.weights)
        raise fail(
            "S0315", f"no tensor of {ref} is called `{only}`",
            help=[f"did you mean {quoted(close)}?" if close else "`surgery show MODEL --dims` lists the parameters",
                  "these are names of the state dict, * stands for anything; `surgery select` takes roles such as `layers[0].attn.q`"],
        )  # fmt: skip
    return Shown(program, blame, only, dims)


def matching(program: Program, only: str) -> list[str]:
    """The tensors whose name, or a name they are tied to, a glob matches."""
    tied = [first for name, first in program.aliases.items() if fnmatchcase(name, only)]
    return list(dict.fromkeys([n for n in program.weights if fnmatchcase(n, only) or n in tied]))


@dataclass
class Selected:
    """What a selector names."""

    selector: str
    sites: list[Site]
    program: Program
    dims: bool = False

    def as_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"schema": "surgery.select/1", "selector": self.selector, "sites": [site_json(s) for s in self.sites]}
        return found | {"classes": groups_json(self.program, self.sites)} if self.dims else found

    def render_text(self) -> str:
        lines = [f"{self.selector}: {plural(len(self.sites), 'site')}"]
        width = max((len(s.role) for s in self.sites), default=0)
        for s in self.sites:
            rows = " rows " + ", ".join(f"{a}:{b}" for a, b in s.rows) if s.rows else ""
            extra = sum(len(a.tensors) for a in attached_to(self.program, s))
            lines.append(
                f"  {s.role:<{width}}  {s.op:<9} {' x '.join(map(str, s.shape)):<14} {s.path}{rows}"
                + (f"  (+{extra} added)" if extra else "")
            )
        text = "\n".join(line.rstrip() for line in lines) + "\n"
        return f"{text}\n{groups_text(self.program, self.sites)}" if self.dims else text


def parse_selector(text: str) -> ast.Selector:
    """A selector on its own, by way of a statement that holds it. Raises S01xx for a syntax error."""
    source = Source("<selector>", f"surg 1\nfreeze all on {text}\n")
    tree, found = parse(source)
    if found:
        raise SurgeryError(*found)
    node = tree.statements[-1]
    alone = isinstance(node, ast.Operation) and not (node.using or node.keep or node.keep_own or node.except_ or node.name)
    if len(tree.statements) != 2 or not alone or not isinstance(node, ast.Operation) or len(node.selectors) != 1:
        raise fail("S0311", f"`{text}` is not one selector", help="write one selector, for example `layers[*].attn.{q, v}`")
    return node.selectors[0]


def select(selector: str, model: Any, *, dims: bool = False, allow_code: bool = False, use_cache: bool = True) -> Selected:
    """The sites that a selector names on a model, with ``dims`` also what goes together with their units. Raises S03xx with the counts of
    each step when it names nothing."""
    from surgery.core.selector import select as find

    tree = parse_selector(selector)
    program, _ = open_program(model, allow_code=allow_code, use_cache=use_cache)
    return Selected(selector, list(find(program.anatomy, tree, created(program))), program, dims)


@dataclass
class Difference:
    """What differs between two specs, plans or artifacts: lines of (what, in A, in B)."""

    a: str
    b: str
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"schema": "surgery.diff/1", "a": self.a, "b": self.b, "differences": [{"what": w, "a": x, "b": y} for w, x, y in self.rows]}

    def render_text(self) -> str:
        if not self.rows:
            return f"{self.a} and {self.b} do not differ\n"
        lines = [f"--- {self.a}", f"+++ {self.b}"]
        for what, x, y in self.rows:
            lines.append(what)
            lines += [f"  - {x}"] * bool(x) + [f"  + {y}"] * bool(y)
        return "\n".join(lines) + "\n"


def facts_of(ref: str, *, allow_code: bool = False, use_cache: bool = True) -> dict[str, str]:
    """Comparable facts of a spec (resolved on its own model), a saved plan, an artifact or a model."""
    path = Path(ref)
    if path.is_file() and path.suffix == ".json":
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as exc:
            raise _no_plan(ref, str(exc)) from None
        if not isinstance(data, dict) or data.get("schema") != "surgery.plan/1":
            raise _no_plan(ref)
        try:
            return plan_facts(data)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise _no_plan(ref, "it does not have the shape of its schema") from None
    if path.is_file() and path.suffix == ".surg":
        from surgery.driver import plan

        return plan_facts(plan(path, allow_code=allow_code, use_cache=use_cache).as_json())
    program, _ = open_program(ref, allow_code=allow_code, use_cache=use_cache)
    return program_facts(program)


def _no_plan(ref: str, why: str = "") -> SurgeryError:
    help = "save one with `surgery plan SPEC --out plan.json`"
    return fail("S0312", f"{ref} is not a saved plan" + (f": {why}" if why else ""), help=help, exit_code=2)


def plan_facts(data: Mapping[str, Any]) -> dict[str, str]:
    facts = {f"model {k}": str(v) for k, v in data["model"].items() if k in ("ref", "hash", "params")}
    for key, value in (data.get("totals") or {}).items():
        facts[f"total {key}"] = f"{value:,}"
    counts: dict[str, int] = {}
    for step in data["steps"]:
        name = f"{step['verb']} {step['method']}"
        counts[name] = counts.get(name, 0) + 1
        label = name if counts[name] == 1 else f"{name} ({counts[name]})"
        facts[f"{label} params"] = json.dumps(step["params"], sort_keys=True)
        for site in step["sites"]:
            facts[f"{label} on {site['role']}"] = (
                f"{site['shape_before']} -> {site['shape_after']}, +{site['added']} -{site['removed']}, {site['trainable']} train"
            )
    for e in data["expect"]:
        facts[f"expect {e['text']}"] = str(e["value"])
    return facts


def program_facts(program: Program) -> dict[str, str]:
    sizes = parameter_sizes(program)
    facts = {
        "family": program.info.family,
        "total params": f"{sum(sizes.values()):,}",
        "total trainable": f"{sum(n for k, n in sizes.items() if k not in program.frozen):,}",
        "model hash": program.info.hash,
    }
    for site in program.anatomy.sites:
        if not site.is_region:
            facts[f"site {site.role}"] = f"{site.path} {list(site.shape)} {site.dtype}"
    for a in program.attachments:
        facts[f"added {a.module}"] = f"{a.method.verb} {a.method.name} {json.dumps(a.method.params(), sort_keys=True)}"
    for name, expr in program.weights.items():
        facts[f"tensor {name}"] = f"{list(expr.shape)} {expr.dtype} ({math.prod(expr.shape):,})"
    return facts


def diff(a: str, b: str, *, allow_code: bool = False, use_cache: bool = True) -> Difference:
    """What differs between two specs, plans, artifacts or models, sorted by what."""
    left = facts_of(a, allow_code=allow_code, use_cache=use_cache)
    right = facts_of(b, allow_code=allow_code, use_cache=use_cache)
    rows = [(k, left.get(k, ""), right.get(k, "")) for k in dict.fromkeys([*left, *right]) if left.get(k) != right.get(k)]
    return Difference(a, b, rows)
