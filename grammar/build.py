"""Makes the syntax tree: one method per rule of surg.lark, called with the rule's children and its place.

What the grammar cannot say (a unit that does not exist, a clause written twice) is reported here; the statement is then
dropped by the parser, so later stages see sound nodes only.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from surgery.core import ast, units
from surgery.core.diagnostics import Diagnostic, Fix, error
from surgery.core.source import Source, Span
from surgery.grammar.lexer import Token
from surgery.grammar.words import near

MAX_NUMBER = 40
"""Characters of the longest literal: no quantity of a model needs more."""

_NUMBER = re.compile(r"(-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)(.*)")
_ESCAPES = {'"': '"', "\\": "\\", "n": "\n", "t": "\t", "r": "\r"}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|.)", re.DOTALL)


class _Clause(NamedTuple):
    """A clause on its way to its statement: ``kind`` is the field, ``value`` its content."""

    kind: str
    value: Any
    span: Span
    word: str


class Builder:
    """Node factory for one source; problems go to ``problems``."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.problems: list[Diagnostic] = []

    def _span(self, start: int, end: int) -> Span:
        return Span(self.source, start, end)

    def _at(self, token: Token) -> Span:
        return Span(self.source, token[2], token[3])

    # ------------------------------------------------------------ values

    def number(self, children: list[Token], start: int, end: int) -> ast.Number:
        text = children[0][1]
        span = self._span(start, end)
        if len(text) > MAX_NUMBER:
            self.problems.append(
                error(
                    "S0119",
                    "a number is too long",
                    span,
                    f"{len(text)} characters",
                    help=f"use at most {MAX_NUMBER} characters; `1e-4` and `1.1B` are short forms",
                )
            )
            return ast.Number(0, span=span)
        if children[0][0] == "INT":
            return ast.Number(int(text), "", text, span=span)
        match = _NUMBER.fullmatch(text)
        assert match is not None, text
        digits, unit = match.groups()
        try:
            return ast.Number(units.scale(digits, unit), unit, text, span=span)
        except OverflowError:
            self.problems.append(error("S0119", f"the number `{text}` is too large", span, "beyond what a float holds"))
        except KeyError:
            self.problems.append(self._unknown_unit(digits, unit, span))
        return ast.Number(0, span=span)

    def _unknown_unit(self, digits: str, unit: str, span: Span) -> Diagnostic:
        place = Span(self.source, span.end - len(unit), span.end)
        if unit.startswith("_"):
            return error(
                "S0119", f"`{span.text}` is no number", place, "digits cannot be grouped",
                help=f"write `{span.text.replace('_', '')}`, or a unit: 10k, 1.1B",
            )  # fmt: skip
        fix = None
        same = [known for known in units.UNITS if known.lower() == unit.lower()]
        if unit.lower() in ("percent", "pct"):
            same = ["%"]
        if len(same) == 1:
            fix = Fix(place, same[0])
        offers = same or near(unit, units.UNITS)
        helps = [f"did you mean `{digits}{offers[0]}`?"] if offers else []
        helps.append("units are % for shares, k M B T for counts, KB MB GB TB KiB MiB GiB TiB for bytes")
        return error("S0120", f"there is no unit `{unit}`", place, "unknown unit", help=helps, fix=fix)

    def string(self, children: list[Token], start: int, end: int) -> ast.String:
        return ast.String(self._text(children[0]), span=self._span(start, end))

    def _text(self, token: Token) -> str:
        """Content of a string literal."""
        body = token[1][1:-1]
        if "\0" in body:
            at = token[2] + 1 + body.index("\0")
            self.problems.append(
                error("S0121", "a NUL byte in a string", Span(self.source, at, at + 1), "here", help="remove it; a spec is plain text")
            )
        if "\\" not in body:
            return body
        base = token[2] + 1

        def replace(match: re.Match[str]) -> str:
            code = match.group(1)
            if code in _ESCAPES:
                return _ESCAPES[code]
            if len(code) == 5:
                number = int(code[1:], 16)
                if number and not 0xD800 <= number <= 0xDFFF:
                    return chr(number)
            self.problems.append(
                error(
                    "S0117", f"there is no escape `{match.group()}`", Span(self.source, base + match.start(), base + match.end()), "unknown escape",
                    help=['write `\\\\` for a backslash (or `/` in a path)', 'the escapes are \\" \\\\ \\n \\t \\r \\uXXXX'],
                )
            )  # fmt: skip
            return ""

        return _ESCAPE.sub(replace, body)

    def list_(self, children: list[ast.Value], start: int, end: int) -> ast.ListValue:
        return ast.ListValue(tuple(children), span=self._span(start, end))

    def table(self, children: list[ast.TableEntry], start: int, end: int) -> ast.Table:
        return ast.Table(tuple(children), span=self._span(start, end))

    def entry(self, children: list[Any], start: int, end: int) -> ast.TableEntry:
        return ast.TableEntry(children[0], children[1], span=self._span(start, end))

    def path_value(self, children: list[Any], start: int, end: int) -> ast.Value:
        steps = children[0]
        if all(isinstance(step, ast.Step) and step.index is None and step.name[0] != "*" for step in steps):
            return ast.Name(".".join(step.name for step in steps), span=self._span(start, end))
        return ast.Selector(steps, span=self._span(start, end))

    # ------------------------------------------------------------ calls

    def bare_call(self, children: list[Token], start: int, end: int) -> ast.Call:
        return ast.Call(children[0][1], (), self._at(children[0]), bare=True, span=self._span(start, end))

    def call(self, children: list[Any], start: int, end: int) -> ast.Call:
        name, *args = children
        seen: dict[str, ast.Arg] = {}
        for arg in args:
            if not arg.name:
                if seen:
                    last = next(reversed(seen.values()))
                    self.problems.append(
                        error(
                            "S0128", "a value without a name stands behind a named one", arg.span, "which parameter is this?",
                            also=[(last.span, "named from here on")], help="put values without a name first, or write `name = value`",
                        )
                    )  # fmt: skip
                    break
            elif arg.name in seen:
                self.problems.append(
                    error(
                        "S0124", f"`{arg.name}` is given twice", arg.name_span, "second time",
                        also=[(seen[arg.name].name_span, "first time")], help="keep one of them",
                    )
                )  # fmt: skip
            else:
                seen[arg.name] = arg
        return ast.Call(name[1], tuple(args), self._at(name), span=self._span(start, end))

    def named_argument(self, children: list[Any], start: int, end: int) -> ast.Arg:
        return ast.Arg(children[0][1], children[1], self._at(children[0]), span=self._span(start, end))

    def positional_argument(self, children: list[Any], start: int, end: int) -> ast.Arg:
        return ast.Arg("", children[0], span=self._span(start, end))

    def dotted(self, children: list[Token], start: int, end: int) -> ast.Name:
        return ast.Name(".".join(token[1] for token in children), span=self._span(start, end))

    # ------------------------------------------------------------ selectors

    def path(self, children: list[Any], start: int, end: int) -> tuple[Any, ...]:
        return tuple(children)

    def step(self, children: list[Any], start: int, end: int) -> ast.Step:
        return ast.Step(children[0][1], children[1] if len(children) > 1 else None, span=self._span(start, end))

    def set_step(self, children: list[Any], start: int, end: int) -> ast.SetStep:
        index = children.pop() if isinstance(children[-1], ast.Index) else None
        return ast.SetStep(tuple(children), index, span=self._span(start, end))

    def index_all(self, children: list[Any], start: int, end: int) -> ast.Index:
        return ast.Index((), span=self._span(start, end))

    def index(self, children: list[ast.Range], start: int, end: int) -> ast.Index:
        return ast.Index(tuple(children), span=self._span(start, end))

    def _whole(self, token: Token) -> int:
        if len(token[1]) > 12:
            self.problems.append(error("S0119", "an index is too long", self._at(token), f"{len(token[1])} characters"))
            return 0
        return int(token[1])

    def range_one(self, children: list[Token], start: int, end: int) -> ast.Range:
        at = self._whole(children[0])
        return ast.Range(at, at, span=self._span(start, end))

    def range_closed(self, children: list[Token], start: int, end: int) -> ast.Range:
        first, last, *step = children
        return ast.Range(self._whole(first), self._whole(last), self._step(step), span=self._span(start, end))

    def range_open(self, children: list[Token], start: int, end: int) -> ast.Range:
        first, *step = children
        return ast.Range(self._whole(first), None, self._step(step), span=self._span(start, end))

    def _step(self, tokens: list[Token]) -> int:
        if not tokens:
            return 1
        step = self._whole(tokens[0])
        if step < 1:
            self.problems.append(
                error(
                    "S0135",
                    "the step of a range must be at least 1",
                    self._at(tokens[0]),
                    f"is {step}",
                    help="ranges run upwards: `[0..10 by 2]`",
                )
            )
            return 1
        return step

    def reference(self, children: list[Any], start: int, end: int) -> tuple[str, tuple[Any, ...]]:
        return children[0][1], tuple(children[1:])

    def path_selector(self, children: list[Any], start: int, end: int) -> ast.Selector:
        return ast.Selector(children[0], optional=len(children) > 1, span=self._span(start, end))

    def reference_selector(self, children: list[Any], start: int, end: int) -> ast.Selector:
        name, steps = children[0]
        return ast.Selector(steps, ref=name, optional=len(children) > 1, span=self._span(start, end))

    def raw_selector(self, children: list[Any], start: int, end: int) -> ast.Selector:
        return ast.Selector(raw=self._text(children[0]), optional=len(children) > 1, span=self._span(start, end))

    # ------------------------------------------------------------ clauses

    def _clause(self, kind: str, word: str, value: Any, start: int, end: int) -> _Clause:
        return _Clause(kind, value, self._span(start, end), word)

    def place(self, children: list[Any], start: int, end: int) -> _Clause:
        return self._clause("place", children[0][1], (children[0][1], tuple(children[1:])), start, end)

    def on(self, children: list[Any], start: int, end: int) -> _Clause:
        return self._clause("selectors", "on", tuple(children), start, end)

    def using(self, children: list[Any], start: int, end: int) -> _Clause:
        return self._clause("using", "using", children[0], start, end)

    def keep(self, children: list[Any], start: int, end: int) -> _Clause:
        return self._clause("keep", "keep", tuple(children), start, end)

    def keep_own(self, children: list[ast.Name], start: int, end: int) -> _Clause:
        return self._clause("keep_own", "keep own", tuple(name.value for name in children), start, end)

    def except_(self, children: list[Any], start: int, end: int) -> _Clause:
        return self._clause("except_", "except", tuple(children), start, end)

    def as_(self, children: list[Token], start: int, end: int) -> _Clause:
        return self._clause("name", "as", children[0], start, end)

    def for_(self, children: list[ast.Name], start: int, end: int) -> _Clause:
        return self._clause("of", "for", children[0].value, start, end)

    def of_base(self, children: list[Any], start: int, end: int) -> _Clause:
        return self._clause("of_base", "of base", True, start, end)

    def of_list(self, children: list[ast.Weighted], start: int, end: int) -> _Clause:
        return self._clause("of", "of", tuple(children), start, end)

    def weighted(self, children: list[Any], start: int, end: int) -> ast.Weighted:
        return ast.Weighted(children[0].value, children[1] if len(children) > 1 else None, span=self._span(start, end))

    def _clauses(self, clauses: list[_Clause]) -> dict[str, _Clause]:
        """Clauses by kind; a second one of a kind is reported."""
        found: dict[str, _Clause] = {}
        for clause in clauses:
            first = found.setdefault(clause.kind, clause)
            if first is not clause:
                what = (
                    f"`{clause.word}` is written twice"
                    if first.word == clause.word
                    else f"`{first.word}` and `{clause.word}` are both given"
                )
                self.problems.append(
                    error(
                        "S0125", what, clause.span, "second time", also=[(first.span, "first time")],
                        help="a clause stands once in a statement; its selectors are separated by commas",
                    )
                )  # fmt: skip
        return found

    # ------------------------------------------------------------ statements

    def edition(self, children: list[Token], start: int, end: int) -> ast.Edition:
        return ast.Edition(self._whole(children[0]), span=self._span(start, end))

    def import_(self, children: list[Token], start: int, end: int) -> ast.Import:
        return ast.Import(self._text(children[0]), children[1][1], self._at(children[0]), span=self._span(start, end))

    def param(self, children: list[Any], start: int, end: int) -> ast.Param:
        return ast.Param(children[0][1], children[1] if len(children) > 1 else None, span=self._span(start, end))

    def let(self, children: list[Any], start: int, end: int) -> ast.Let:
        return ast.Let(children[0][1], children[1], span=self._span(start, end))

    def model(self, children: list[Token], start: int, end: int) -> ast.Model:
        name = children[1][1] if len(children) > 1 else ""
        return ast.Model(self._text(children[0]), name, self._at(children[0]), span=self._span(start, end))

    def data(self, children: list[Any], start: int, end: int) -> ast.Data:
        return ast.Data(children[0][1], children[1], children[2] if len(children) > 2 else None, span=self._span(start, end))

    def load(self, children: list[Any], start: int, end: int) -> ast.Load:
        return ast.Load(children[0][1], children[1][1], children[2], span=self._span(start, end))

    def operation(self, children: list[Any], start: int, end: int) -> ast.Operation:
        verb, method, *rest = children
        clauses = self._clauses(rest)
        fields: dict[str, Any] = {kind: clause.value for kind, clause in clauses.items()}
        fields["place"], fields["selectors"] = fields.get("place", ("", ()))
        if "name" in fields:
            token = fields["name"]
            fields["name"], fields["name_span"] = token[1], self._at(token)
        if "using" in fields:
            fields["using"], fields["using_span"] = fields["using"].value, fields["using"].span
        return ast.Operation(verb[1], method, verb_span=self._at(verb), span=self._span(start, end), **fields)

    def merge(self, children: list[Any], start: int, end: int) -> ast.Merge:
        method, *rest = children
        fields = {kind: clause.value for kind, clause in self._clauses(rest).items()}
        if "name" in fields:
            fields["name"] = fields["name"][1]
        if "of" not in fields:
            fields["of"] = ()
            self.problems.append(
                error(
                    "S0136",
                    "the merge does not say of what",
                    self._span(start, end),
                    "no `of`",
                    help=f"name what to merge: `merge {method.name} of first * 0.5, second * 0.5`",
                )
            )
        return ast.Merge(method, span=self._span(start, end), **fields)

    def train(self, children: list[Any], start: int, end: int) -> ast.Train:
        fields = {kind: clause.value for kind, clause in self._clauses(children[1:]).items()}
        return ast.Train(children[0], span=self._span(start, end), **fields)

    def expect_quantity(self, children: list[Any], start: int, end: int) -> ast.ExpectQuantity:
        quantity = children[0]
        compare = next(c for c in children if type(c) is tuple and c[0] == "COMPARE")
        value = children[children.index(compare) + 1]
        fields = {kind: clause.value for kind, clause in self._clauses([c for c in children if isinstance(c, _Clause)]).items()}
        return ast.ExpectQuantity(quantity[1], compare[1], value, quantity_span=self._at(quantity), span=self._span(start, end), **fields)

    def expect_check(self, children: list[Any], start: int, end: int) -> ast.ExpectCheck:
        return ast.ExpectCheck(children[0], children[1] if len(children) > 1 else None, span=self._span(start, end))

    def measure(self, children: list[Any], start: int, end: int) -> ast.Measure:
        fields = {kind: clause.value for kind, clause in self._clauses(children[1:]).items()}
        if "using" in fields:
            fields["using"] = fields["using"].value
        return ast.Measure(children[0], span=self._span(start, end), **fields)

    def emit(self, children: list[Any], start: int, end: int) -> ast.Emit:
        return ast.Emit(children[0], self._text(children[1]), self._at(children[1]), span=self._span(start, end))

    def stage_head(self, children: list[Token], start: int, end: int) -> ast.Stage:
        return ast.Stage(children[0][1], (), span=self._span(start, end))
