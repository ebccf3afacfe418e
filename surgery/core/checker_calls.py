"""Calls against what they call: does it exist, are the arguments its parameters, is any missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from surgery.core import ast
from surgery.core.catalogue import Catalogue, Entry
from surgery.core.checker_names import Names
from surgery.core.checker_values import BAD, Values
from surgery.core.checker_words import example, wanted
from surgery.core.diagnostics import Fix
from surgery.core.method import MethodInfo, ParamInfo
from surgery.core.near import near, quoted, suggestion
from surgery.core.source import Span
from surgery.core.spec import Bound


def call_span(call: ast.Call) -> Span:
    return call.name_span if call.name_span.end else call.span


class Calls:
    """Binds calls of one file; reports to the sink of ``names``."""

    def __init__(self, names: Names, catalogue: Catalogue) -> None:
        self.names = names
        self.sink = names.sink
        self.values = Values(names)
        self.catalogue = catalogue

    def method(self, verb: str, call: ast.Call) -> Bound | None:
        """The call of a method of ``verb``; None after a report that there is none of that name."""
        info = self.catalogue.get(verb, call.name)
        if info is None:
            self._no_method(verb, call)
            return None
        return self.bind(call, info, _leading(info))

    def _no_method(self, verb: str, call: ast.Call) -> None:
        here = self.catalogue.names(verb)
        span = call_span(call)
        elsewhere = self.catalogue.verbs_of(call.name)
        if not here:
            message = f"there is no method `{call.name}` for `{verb}`: this version has no method for this verb yet"
            help = [f"`{call.name}` belongs to {quoted(elsewhere)}"] if elsewhere else ["`surgery methods` lists what there is"]
            self.sink.error("S0211", message, span, "no such method", help=help, notes=[f"methods of {verb}: none"])
            return
        help, notes = suggestion(call.name, here, f"methods of {verb}")
        fix = Fix(span, near(call.name, here)[0], safe=False) if help else None
        if elsewhere:
            help.insert(0, f"`{call.name}` belongs to {quoted(elsewhere)}: `{elsewhere[0]} {call.name} ...`")
        self.sink.error("S0211", f"there is no method `{call.name}` for `{verb}`", span, "no such method", help=help, notes=notes, fix=fix)

    def entry(self, call: ast.Call, table: Mapping[str, Entry], code: str, what: str, plural: str) -> Bound | None:
        """The call of an entry of one of the language's own tables."""
        info = table.get(call.name)
        if info is None:
            help, notes = suggestion(call.name, table, plural)
            close = near(call.name, table)
            fix = Fix(call_span(call), close[0], safe=False) if close else None
            self.sink.error(code, f"there is no {what} `{call.name}`", call_span(call), f"no such {what}", help=help, notes=notes, fix=fix)
            return None
        return self.bind(call, info, info.positional)

    def bind(self, call: ast.Call, info: MethodInfo | Entry, positional: tuple[str, ...]) -> Bound:
        """Typed arguments of a call; every wrong one is reported and left out."""
        known: dict[str, ParamInfo] = {p.name: p for p in info.params}
        args: dict[str, Any] = {}
        spans: dict[str, Span] = {}
        seen: dict[str, Span] = {}
        free = list(positional)
        misplaced = False
        for arg in call.args:
            place = arg.name_span if arg.name else arg.value.span
            name = arg.name
            if not name:
                if not free or any(n not in positional for n in seen):
                    misplaced = True
                    self._positional(call, arg, known, seen)
                    continue
                name = free.pop(0)
            param = known.get(name)
            if param is None:
                self._unknown(call, name, place, known)
                continue
            if name in seen:
                self.sink.error(
                    "S0218", f"`{name}` is given twice", place, "given again here", also=[(seen[name], "first given here")],
                    help="keep one of the two",
                )  # fmt: skip
                continue
            seen[name] = place
            value = self.values.convert(param, arg.value)
            if value is not BAD:
                args[name] = value
                spans[name] = arg.value.span
        missing = [p for p in info.params if p.required and p.name not in seen]
        if missing and not misplaced:
            self._missing(call, missing, positional)
        if isinstance(info, MethodInfo):
            self._amounts(info, spans)
        return Bound(call.name, info, args, spans, call.span)

    def _amounts(self, info: MethodInfo, spans: Mapping[str, Span]) -> None:
        given = [n for n in info.one_of if n in spans]
        if len(given) > 1:
            both = quoted(given, "and")
            self.sink.error(
                "S0272", f"{both} both say how much `{info.verb} {info.name}` removes", spans[given[1]], "said again here",
                also=[(spans[given[0]], "said here")], help=f"keep one of {both}",
            )  # fmt: skip

    def _positional(self, call: ast.Call, arg: ast.Arg, known: dict[str, ParamInfo], seen: dict[str, Span]) -> None:
        free = [p for n, p in known.items() if n not in seen and not any(a.name == n for a in call.args)]
        free.sort(key=lambda p: not _may_be(p, arg.value))  # stable: the first that the value suits
        text = arg.value.span.text if arg.value.span.end else "..."
        if not known:
            self.sink.error("S0219", f"`{call.name}` takes no parameters", arg.value.span, "unexpected", help=f"write `{call.name}`")
            return
        shown = text if len(text) < 40 else "..."
        help = f"write `{free[0].name} = {shown}`" if free else f"every parameter of `{call.name}` is given already"
        notes = [f"parameters of {call.name}: {', '.join(known)}"]
        self.sink.error(
            "S0219", f"a parameter of `{call.name}` has no name", arg.value.span, "which parameter is this?", help=help, notes=notes
        )

    def _unknown(self, call: ast.Call, name: str, place: Span, known: dict[str, ParamInfo]) -> None:
        if not known:
            self.sink.error(
                "S0212",
                f"`{call.name}` has no parameter `{name}`",
                place,
                "unknown parameter",
                notes=[f"`{call.name}` takes no parameters"],
            )
            return
        help, notes = suggestion(name, known, f"parameters of {call.name}")
        close = near(name, known)
        fix = Fix(place, close[0], safe=False) if close else None
        self.sink.error("S0212", f"`{call.name}` has no parameter `{name}`", place, "unknown parameter", help=help, notes=notes, fix=fix)

    def _missing(self, call: ast.Call, missing: list[ParamInfo], positional: tuple[str, ...]) -> None:
        names = quoted([p.name for p in missing], "and")
        shown = ", ".join(example(p).removeprefix(f"{p.name} = ") if p.name in positional else example(p) for p in missing)
        notes = [f"{p.name}: {p.help or wanted(p)}" for p in missing]
        self.sink.error(
            "S0217", f"`{call.name}` needs {names}", call_span(call), "not given" if len(missing) == 1 else "not all given",
            help=f"write for example `{call.name}({shown})`", notes=notes,
        )  # fmt: skip


def _leading(info: MethodInfo) -> tuple[str, ...]:
    """A method's first parameter may stand without its name when it is required and a word or a text, as in ``objective(ln_dpo)``."""
    first = info.params[0] if info.params else None
    return (first.name,) if first is not None and first.required and first.type in ("name", "str") else ()


def _may_be(info: ParamInfo, value: ast.Value) -> bool:
    """Whether a value without a name could be meant for a parameter: it is the default, or of a likely kind."""
    if not isinstance(value, ast.Number):
        return info.type == ("str" if isinstance(value, ast.String) else "name")
    return info.type in ("int", "float") and (info.unit == "%") == (value.unit == "%" or 0 < value.value < 1) and info.name != "seed"
