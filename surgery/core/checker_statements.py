"""Statements one by one: operations, merges, training, expectations, measures, outputs."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from surgery.core import ast
from surgery.core.catalogue import BACKENDS, BYTES, CHECKS, QUANTITIES, SHARE, Catalogue, Quantity
from surgery.core.checker_calls import Calls
from surgery.core.checker_names import Definition, Names, last_word_span
from surgery.core.checker_order import place
from surgery.core.checker_words import describe, dimension
from surgery.core.diagnostics import Fix
from surgery.core.method import MethodInfo
from surgery.core.near import near, suggestion
from surgery.core.source import Span
from surgery.core.spec import Checked

KEEPERS = frozenset({"prune", "share", "convert", "replace", "factorize", "skip"})
"""Verbs under which a selected site can be held back as it is."""
PLACE_MEANING = {"on": "the site itself", "after": "behind it", "before": "in front of it", "beside": "parallel to it"}


def _somewhere(info: MethodInfo) -> str:
    """A place where a method goes, from the example of its own page."""
    places = "|".join(info.places or ("on",))
    line = rf"^\s*{info.verb} {info.name}\b.*?\s((?:{places}) \S.*?)(?:\s+(?:as|using|keep|with)\s.*|\s+#.*)?$"
    found = re.search(line, info.doc, re.MULTILINE)
    return found.group(1) if found else f"{info.places[0] if info.places else 'on'} layers[*].ffn"


class Statements:
    """Checks the statements that do something; names are defined by the caller and, for ``as``, here."""

    def __init__(self, names: Names, catalogue: Catalogue) -> None:
        self.names = names
        self.sink = names.sink
        self.calls = Calls(names, catalogue)

    def check(self, node: ast.Statement, stage: str) -> Checked | None:
        """The checked statement; None when its call was not understood (reported)."""
        if isinstance(node, ast.Operation):
            return self._operation(node, stage)
        if isinstance(node, ast.Merge):
            return self._merge(node, stage)
        if isinstance(node, ast.Train):
            return self._plain(replace(node, selectors=self._selectors(node.selectors)), "train", stage)
        if isinstance(node, ast.Measure):
            node = replace(node, selectors=self._selectors(node.selectors))
            self._using(node.using, node.span)
            return self._plain(node, "measure", stage)
        if isinstance(node, ast.ExpectQuantity):
            return self._quantity(node, stage)
        if isinstance(node, ast.ExpectCheck):
            return self._check(node, stage)
        if isinstance(node, ast.Emit):
            bound = self.calls.entry(node.backend, BACKENDS, "S0213", "output", "outputs")
            return Checked(node, bound, stage=stage) if bound is not None else None
        return Checked(node, stage=stage)

    def _plain(self, node: ast.Train | ast.Measure, verb: str, stage: str) -> Checked | None:
        bound = self.calls.method(verb, node.method)
        return Checked(node, bound, stage=stage) if bound is not None else None

    # ------------------------------------------------------------ operations

    def _operation(self, node: ast.Operation, stage: str) -> Checked | None:
        bound = self.calls.method(node.verb, node.method)
        node = replace(
            node, selectors=self._selectors(node.selectors), keep=self._selectors(node.keep), except_=self._selectors(node.except_),
        )  # fmt: skip
        self._using(node.using, node.using_span if node.using_span.end else node.span)
        if bound is not None and isinstance(bound.info, MethodInfo):
            self._place(node, bound.info)
            if bound.info.needs_data and not node.using:
                known = list(self.names.scope.known("data"))
                help = f"write `using {known[0]}`" if known else 'define data, `data text = lines("calib.txt")`, and write `using text`'
                self.sink.error("S0230", f"`{bound.name}` needs data", place(node), "no `using`", help=help)
            self._unread(node, bound.info)
        if node.name:
            self._create(node, node.name, node.name_span if node.name_span.end else last_word_span(node.span, node.name))
        return Checked(node, bound, stage=stage) if bound is not None else None

    def _unread(self, node: ast.Operation, info: MethodInfo) -> None:
        """Reports clauses that the method would not look at."""
        what = f"`{node.verb} {info.name}`"
        if node.using and not (info.needs_data or info.takes_data):
            span = _within(node.using_span if node.using_span.end else node.span, node.using)
            self.sink.error("S0238", f"{what} reads no data", span, "nothing looks at this", help="leave `using` out")
        if node.keep and node.verb not in KEEPERS:
            help = "to leave parts out of what is selected, write `except` in place of `keep`"
            self.sink.error("S0238", f"{what} has nothing to keep", node.keep[0].span, "nothing looks at this", help=help)
        if node.keep_own and node.verb != "share":
            span = last_word_span(node.span, node.keep_own[0])
            self.sink.error("S0238", f"{what} has nothing to keep", span, "nothing is shared here", help="leave `keep own` out")

    def _create(self, node: ast.Statement, name: str, span: Span) -> None:
        self.names.define(Definition(name, "site", span, None, node))

    def _place(self, node: ast.Operation, info: MethodInfo) -> None:
        if not node.selectors:
            if info.needs_sites:
                self.sink.error(
                    "S0229", f"`{node.verb} {info.name}` does not say where", place(node), "no selector",
                    help=f"add for example `{_somewhere(info)}`",
                )  # fmt: skip
            return
        if node.place in info.places:
            return
        span = _place_span(node)
        if not info.places:
            self.sink.error("S0228", f"`{info.name}` takes no place", span, "not here", help=f"write `{node.verb} {info.name}` alone")
            return
        fits = [f"`{p}` ({PLACE_MEANING.get(p, p)})" for p in info.places]
        fix = Fix(span, info.places[0], safe=False) if len(info.places) == 1 and span.text == node.place else None
        self.sink.error(
            "S0228", f"`{info.name}` does not go `{node.place}` a site", span, "wrong place for this method",
            help=f"write {' or '.join(fits)}", fix=fix,
        )  # fmt: skip

    def _merge(self, node: ast.Merge, stage: str) -> Checked | None:
        bound = self.calls.method("merge", node.method)
        for part in node.of:
            self.names.lookup(
                part.name,
                _first(part.span if part.span.end else node.span, part.name),
                ("adapter", "checkpoint", "model", "site"),
                "an adapter or checkpoint",
            )
        node = replace(node, selectors=self._selectors(node.selectors))
        if node.name:
            self._create(node, node.name, last_word_span(node.span, node.name))
        return Checked(node, bound, stage=stage) if bound is not None else None

    def _using(self, name: str, span: Span) -> None:
        if name:
            self.names.lookup(name, _within(span, name), ("data",), "data")

    # ------------------------------------------------------------ selectors

    def _selectors(self, selectors: tuple[ast.Selector, ...]) -> tuple[ast.Selector, ...]:
        out = []
        for selector in selectors:
            if selector.ref is not None:
                self._reference(selector)
            self.calls.values.indexes(selector.steps)
            out.append(self.names.selector(selector))
        return tuple(out)

    def _reference(self, selector: ast.Selector) -> None:
        name = selector.ref or ""
        scope = self.names.scope
        span = Span(selector.span.source, selector.span.start, min(selector.span.end, selector.span.start + len(name) + 1))
        found = scope.names.get(name)
        if found is not None and found.kind == "site":
            return
        if found is not None:
            self.names.lookup(name, span, ("site",), "a created name")
            return
        later = scope.later.get(name)
        if later is not None and later.kind == "site":
            self.sink.error(
                "S0401", f"`@{name}` does not exist yet at this point", span, "used before it is created",
                also=[(later.span, f"`{name}` is created here")], help="move this statement below the one that creates it",
            )  # fmt: skip
            return
        known = list(scope.known("site"))
        help, notes = suggestion(name, known, "names created so far")
        fix = Fix(span, "@" + near(name, known)[0], safe=False) if help else None
        self.sink.error(
            "S0201",
            f"no statement creates `@{name}`",
            span,
            "not defined",
            help=help or ["a clause `as name` names what an operation creates"],
            notes=notes,
            fix=fix,
        )

    # ------------------------------------------------------------ expectations

    def _quantity(self, node: ast.ExpectQuantity, stage: str) -> Checked | None:
        info = QUANTITIES.get(node.quantity)
        node = replace(node, selectors=self._selectors(node.selectors))
        if node.of:
            span = _within(node.span, node.of)
            self.names.lookup(node.of, span, ("site", "stage"), "a created name")
        span = node.quantity_span if node.quantity_span.end else node.span
        if info is None:
            help, notes = suggestion(node.quantity, QUANTITIES, "quantities")
            close = near(node.quantity, QUANTITIES)
            if node.quantity in CHECKS:
                help = [f"`{node.quantity}` is a check and is not compared: `expect {node.quantity}`"]
            fix = Fix(span, close[0], safe=False) if close else None
            self.sink.error("S0215", f"there is no quantity `{node.quantity}`", span, "no such quantity", help=help, notes=notes, fix=fix)
            return None
        value = self._limit(node, info)
        return Checked(replace(node, value=value), stage=stage) if value is not None else None

    def _limit(self, node: ast.ExpectQuantity, info: Quantity) -> ast.Number | None:
        value, definition = self.names.value(node.value)
        span = node.value.span
        also = [(definition.span, f"`{definition.name}` is defined here")] if definition is not None else []
        example = {BYTES: "500MB", SHARE: "30%"}.get(info.dimension, "300k")
        if not isinstance(value, ast.Number):
            if isinstance(value, ast.Name):
                self.names.unknown(value.value, span, ("param", "let"), "a value")
            else:
                self.sink.error(
                    "S0220",
                    f"`{info.name}` is compared with a number, not {describe(value)}",
                    span,
                    "a number is expected here",
                    also=also,
                    help=f"write for example `expect {info.name} {node.compare} {example}`",
                )
            return None
        given = dimension(value.unit)
        text = value.text or str(value.value)
        if node.of_base and given != "share":
            self.sink.error(
                "S0232",
                "`of base` belongs to a percentage",
                span,
                f"{text} is {describe(value)}",
                also=also,
                help=f"write `expect {info.name} {node.compare} 50% of base`, or leave `of base` out",
            )
            return None
        if node.of_base and info.dimension == SHARE:
            self.sink.error(
                "S0232",
                f"`{info.name}` is a share already and has no `of base`",
                span,
                "a share of a share",
                also=also,
                help="leave `of base` out",
            )
            return None
        problem = ""
        help = f"write for example `{info.name} {node.compare} {example}`"
        if not math.isfinite(value.value) or value.value < 0:
            self.sink.error(
                "S0222", f"`{info.name}` is compared with a number of at least 0", span, "not a possible value", also=also, help=help
            )
            return None
        if info.dimension == BYTES and given not in ("bytes", "share") and value.value != 0:
            problem = "a size in bytes or a percentage"
        elif info.dimension == SHARE and not (given == "share" or (given == "plain" and 0 <= value.value <= 1)):
            problem = "a share between 0% and 100%"
        elif info.dimension not in (BYTES, SHARE) and given == "bytes":
            problem = "a count or a percentage"
        if problem:
            self.sink.error(
                "S0223", f"`{info.name}` is {problem}, not {describe(value)}", span, f"{text} is {describe(value)}", also=also, help=help
            )
            return None
        return value

    def _check(self, node: ast.ExpectCheck, stage: str) -> Checked | None:
        if node.check.name in QUANTITIES and node.check.name not in CHECKS:
            span = node.check.name_span if node.check.name_span.end else node.span
            self.sink.error(
                "S0214",
                f"`{node.check.name}` is a quantity and must be compared",
                span,
                "compared with what?",
                help=f"write for example `expect {node.check.name} <= 50% of base`",
            )
            return None
        bound = self.calls.entry(node.check, CHECKS, "S0214", "check", "checks")
        within: float | None = None
        if node.within is not None:
            value, _ = self.names.value(node.within)
            span = node.within.span if node.within.span.end else node.span
            if bound is not None and bound.name != "same_output":
                self.sink.error(
                    "S0231",
                    f"`within` says nothing about `{bound.name}`",
                    span,
                    "nothing is measured here",
                    help=f"write `expect {bound.name}` without `within`",
                )
            elif not isinstance(value, ast.Number) or dimension(value.unit) not in ("plain", "share") or not 0 <= value.value < math.inf:
                self.sink.error(
                    "S0220",
                    f"a tolerance is a small number, not {describe(value)}",
                    span,
                    "a number is expected here",
                    help="write for example `within 1e-6`",
                )
            else:
                within = float(value.value)
        return Checked(node, bound, stage=stage, within=within) if bound is not None else None


def _place_span(node: ast.Operation) -> Span:
    """The place word itself: it stands between the method and the first selector."""
    start = node.method.span.end
    end = min((s.span.start for s in node.selectors if s.span.end), default=node.span.end)
    text = node.span.source.text[start:end]
    at = text.rfind(node.place)
    return Span(node.span.source, start + at, start + at + len(node.place)) if at >= 0 and node.place else place(node)


def _within(span: Span, name: str) -> Span:
    return span if span.text == name else last_word_span(span, name)


def _first(span: Span, name: str) -> Span:
    """The name at the beginning of ``name * weight``."""
    return Span(span.source, span.start, span.start + len(name)) if span.text.startswith(name) else span
