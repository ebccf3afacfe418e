"""Values against the parameters they are given to: type, unit, range, choices, per-layer forms."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from surgery.core import ast, nested
from surgery.core.checker_names import CONSTANTS, Definition, Names
from surgery.core.checker_ranges import overlapping
from surgery.core.checker_words import describe, dimension, example, limits, show, wanted
from surgery.core.diagnostics import Fix
from surgery.core.method import ParamInfo
from surgery.core.near import near, suggestion
from surgery.core.source import Span

BAD: Any = object()
"""What a conversion gives when it has reported a problem."""

Also = list[tuple[Span, str]]


class Values:
    """Converts values for parameters; reports to the sink of ``names``."""

    def __init__(self, names: Names) -> None:
        self.names = names
        self.sink = names.sink

    def convert(self, info: ParamInfo, written: ast.Value) -> Any:
        """The Python value of an argument (see :class:`surgery.core.spec.Bound`), or ``BAD`` after a report."""
        value, definition = self.names.value(written)
        span, also = written.span, _origin(definition)
        if isinstance(written, ast.Name) and self.names.scope.is_broken(written.value):
            return BAD
        if isinstance(value, ast.Name) and value.value == "none" and info.type != "name":
            if not info.required and info.default is None:
                return None
            return self._wrong(info, value, span, also)
        if isinstance(value, ast.Selector) and _word(value):
            value = ast.Name(_word(value), span=value.span)
        layered = (
            isinstance(value, ast.Table) or (isinstance(value, ast.ListValue) and "list" not in (info.type, *info.also)) or _is_ramp(value)
        )
        if layered:
            return self._per_layer(info, value, span, also)
        return self._scalar(info, value, span, also)

    # ------------------------------------------------------------ scalars

    def _scalar(self, info: ParamInfo, value: ast.Value, span: Span, also: Also) -> Any:
        if "int" in info.also and isinstance(value, ast.Number):
            return self._number(replace(info, type="int", choices=(), also=()), value, span, also)
        if "list" in info.also and isinstance(value, ast.ListValue):
            return self._list(info, value, also)
        if info.choices or info.type == "name":
            return self._choice(info, value, span, also)
        if info.type in ("int", "float"):
            return self._number(info, value, span, also)
        if info.type == "bool" and isinstance(value, ast.Name) and value.value in ("true", "false"):
            return value.value == "true"
        if info.type == "str" and isinstance(value, ast.String):
            return value.value
        if info.type == "list" and isinstance(value, ast.ListValue):
            return self._list(info, value, also)
        if info.type == "list" and info.unit == "layers" and isinstance(value, ast.Selector):
            return self._list(info, ast.ListValue((value,), span=value.span), also)
        return self._wrong(info, value, span, also)

    def _list(self, info: ParamInfo, value: ast.ListValue, also: Also) -> Any:
        out: list[Any] = []
        for item in value.items:
            inner, definition = self.names.value(item)
            if info.unit in nested.NESTED:
                plain = nested.item(info.unit, item, self.names.deep)
                if plain is None:
                    return self._wrong(info, inner, item.span, also + _origin(definition))
                out.append(plain)
                continue
            if isinstance(inner, ast.Number | ast.String):
                out.append(inner.value)
            elif isinstance(inner, ast.Name):
                out.append({"true": True, "false": False, "none": None}.get(inner.value, inner.value))
            elif isinstance(inner, ast.Selector) and inner.ref is not None and not inner.steps:
                out.append(f"@{inner.ref}")
            elif isinstance(inner, ast.ListValue):
                deeper = self._list(info, inner, also)
                if deeper is BAD:
                    return BAD
                out.append(deeper)
            else:
                self._wrong(replace(info, type="float"), inner, item.span, also + _origin(definition))
                return BAD
        return tuple(out)

    def _choice(self, info: ParamInfo, value: ast.Value, span: Span, also: Also) -> Any:
        if isinstance(value, ast.Name):
            if value.value == "none" and not info.required and info.default is None and "none" not in info.choices:
                return None
            if not info.choices or value.value in info.choices:
                return value.value
            help, notes = suggestion(value.value, info.choices, f"`{info.name}` is one of")
            fix = Fix(span, near(value.value, info.choices)[0], safe=False) if help and not also else None
            self.sink.error(
                "S0221", f"`{info.name}` cannot be `{value.value}`", span, "no such value", also=also, help=help, notes=notes, fix=fix
            )
            return BAD
        if isinstance(value, ast.String) and value.value in info.choices:
            fix = None if also else Fix(span, value.value)
            self.sink.error(
                "S0220", f"`{info.name}` is a name, not text", span, "quotes are for text and paths", also=also,
                help=f"write `{info.name} = {value.value}` without quotes", fix=fix,
            )  # fmt: skip
            return BAD
        if isinstance(value, ast.Number) and str(value.value) in info.choices:
            return str(value.value)
        return self._wrong(info, value, span, also)

    def _wrong(self, info: ParamInfo, value: ast.Value, span: Span, also: Also) -> Any:
        if isinstance(value, ast.Name) and info.type in ("int", "float") and value.value not in CONSTANTS:
            self.names.unknown(value.value, span, ("param", "let"), "a value")
            return BAD
        help, fix = [f"write for example `{example(info)}`"], None
        if info.type == "str" and isinstance(value, ast.Name) and value.value not in CONSTANTS:
            help, fix = [f'text stands in quotes: `{info.name} = "{value.value}"`'], None if also else Fix(span, f'"{value.value}"')
        elif info.type == "bool" and isinstance(value, ast.Name) and value.value.lower() in ("yes", "on", "no", "off", "true", "false"):
            help = [f"write `{info.name} = {'true' if value.value.lower() in ('yes', 'on', 'true') else 'false'}`"]
        self.sink.error(
            "S0220",
            f"`{info.name}` is {wanted(info)}, not {describe(value)}",
            span,
            f"{wanted(info)} is expected here",
            also=also,
            help=help,
            fix=fix,
        )
        return BAD

    # ------------------------------------------------------------ numbers

    def _number(self, info: ParamInfo, value: ast.Value, span: Span, also: Also) -> Any:
        if not isinstance(value, ast.Number):
            return self._wrong(info, value, span, also)
        given = dimension(value.unit)
        if not self._unit_fits(info, value, given, span, also):
            return BAD
        number = value.value
        if isinstance(number, float) and not math.isfinite(number):
            self.sink.error("S0222", f"`{info.name}` is too large a number", span, "beyond what can be computed with", also=also)
            return BAD
        low, high = limits(info)
        below, above = low is not None and number < low, high is not None and number > high
        if below or above:
            return self._range(info, value, low, high, below, span, also)
        if info.type == "int":
            if isinstance(number, float) and not number.is_integer():
                options = [show(math.floor(number)), show(math.ceil(number))]
                self.sink.error(
                    "S0220", f"`{info.name}` is a whole number, not {value.text or show(number)}", span, "not a whole number", also=also,
                    help=f"the nearest are `{info.name} = {options[0]}` and `{info.name} = {options[1]}`",
                )  # fmt: skip
                return BAD
            return int(number)
        return float(number)

    def _unit_fits(self, info: ParamInfo, value: ast.Number, given: str, span: Span, also: Also) -> bool:
        text, number = value.text or show(value.value), value.value
        if info.unit == "%":
            if given == "share" or (given == "plain" and 0 <= number <= 1):
                return True
            if given == "plain":
                right = f"{text}%" if 1 < number <= 100 else None
                help = f"write `{info.name} = {right}`" if right else f"write for example `{example(info)}`"
                fix = Fix(span, right, safe=False) if right and not also else None
                self.sink.error(
                    "S0223",
                    f"`{info.name}` is a share, and {text} is not between 0 and 1",
                    span,
                    wanted(info),
                    also=also,
                    help=help,
                    fix=fix,
                )
                return False
            says = "a share"
        elif info.unit == "bytes":
            if given == "bytes" or (given == "plain" and number == 0):
                return True
            says = "a size in bytes"
        else:
            if given in ("plain", "count"):
                return True
            says = "a number of tokens" if info.unit == "tokens" else "a count" if info.type == "int" else "a plain number"
        help = f"write for example `{example(info)}`"
        if info.unit == "bytes" and given in ("plain", "count"):
            help = f"say which unit: `{info.name} = {text.rstrip('kKMGTB')}MB` or `{text.rstrip('kKMGTB')}MiB`"
        elif given == "share" and info.type == "float" and info.unit == "":
            help = f"write `{info.name} = {show(number)}`"
        self.sink.error(
            "S0223", f"`{info.name}` is {says}, not {describe(value)}", span, f"{text} is {describe(value)}", also=also, help=help,
        )  # fmt: skip
        return False

    def _range(self, info: ParamInfo, value: ast.Number, low: float | None, high: float | None, below: bool, span: Span, also: Also) -> Any:
        bound = low if below else high
        assert bound is not None
        if low is not None and high is not None:
            says = f"between {show(low, info.unit)} and {show(high, info.unit)}"
        else:
            says = f"{'at least' if below else 'at most'} {show(bound, info.unit)}"
        self.sink.error(
            "S0222", f"`{info.name}` must be {says}", span, "too small" if below else "too large", also=also,
            help=f"the nearest allowed value is `{info.name} = {show(bound, info.unit)}`",
        )  # fmt: skip
        return BAD

    # ------------------------------------------------------------ values by layer

    def _per_layer(self, info: ParamInfo, value: ast.Value, span: Span, also: Also) -> Any:
        if not info.per_layer:
            what = "a ramp over the layers" if isinstance(value, ast.Call) else describe(value)
            if info.type == "list":
                return self._wrong(info, value, span, also)
            self.sink.error(
                "S0224", f"`{info.name}` has one value for all layers", span, f"{what} gives one for each", also=also,
                help=[f"write for example `{example(info)}`", "for other values on other layers, write one statement for each group of layers"],
            )  # fmt: skip
            return BAD
        if isinstance(value, ast.ListValue):
            return self._layer_list(info, value, span, also)
        if isinstance(value, ast.Table):
            return self._table(info, value, span, also)
        assert isinstance(value, ast.Call)
        return self._ramp(info, value, span, also)

    def _leaf(self, info: ParamInfo, item: ast.Value, also: Also) -> ast.Value | None:
        inner, definition = self.names.value(item)
        if self._scalar(info, inner, item.span, also + _origin(definition)) is BAD:
            return None
        return inner

    def _layer_list(self, info: ParamInfo, value: ast.ListValue, span: Span, also: Also) -> Any:
        if not value.items:
            self.sink.error(
                "S0226",
                f"the list for `{info.name}` is empty",
                span,
                "no value for any layer",
                also=also,
                help=f"write for example `{example(info)}`",
            )
            return BAD
        items = [self._leaf(info, v, also) for v in value.items]
        return BAD if any(v is None for v in items) else replace(value, items=tuple(v for v in items if v is not None))

    def _table(self, info: ParamInfo, value: ast.Table, span: Span, also: Also) -> Any:
        if not value.entries:
            self.sink.error(
                "S0226",
                f"the table for `{info.name}` is empty",
                span,
                "no value for any layer",
                also=also,
                help=f"write for example `{example(info)}`",
            )
            return BAD
        keys = [e.key for e in value.entries]
        fine = all([self.range(k) for k in keys])
        fine = self._overlaps(keys, span) and fine
        entries = []
        for entry in value.entries:
            leaf = self._leaf(info, entry.value, also)
            fine = fine and leaf is not None
            if leaf is not None:
                entries.append(replace(entry, value=leaf))
        return replace(value, entries=tuple(entries)) if fine else BAD

    def _ramp(self, info: ParamInfo, value: ast.Call, span: Span, also: Also) -> Any:
        named = [a for a in value.args if a.name]
        if len(value.args) != 2 or named:
            what = "takes its ends without names" if named else f"takes two values, not {len(value.args)}"
            self.sink.error(
                "S0227", f"`ramp` {what}", span, "first and last value", also=also,
                help=f"`{info.name} = ramp(4, 16)` goes from 4 at the first matched layer to 16 at the last",
            )  # fmt: skip
            return BAD
        if info.type not in ("int", "float"):
            return self._wrong(info, value, span, also)
        ends = [self._leaf(info, a.value, also) for a in value.args]
        if any(e is None for e in ends):
            return BAD
        return replace(value, args=tuple(replace(a, value=e) for a, e in zip(value.args, ends, strict=True) if e is not None))

    def range(self, key: ast.Range) -> bool:
        """Reports a range that holds no index."""
        if key.step < 1:
            self.sink.error(
                "S0226", "the step of a range must be at least 1", key.span, f"by {key.step}", help="write `by 2` for every second one"
            )
            return False
        if key.stop is not None and key.stop < key.start and (key.stop < 0) == (key.start < 0):
            back = f"{key.stop}..{key.start}"
            self.sink.error(
                "S0226",
                f"the range {key.start}..{key.stop} is empty",
                key.span,
                "runs backwards",
                help=f"write `{back}`",
                fix=Fix(key.span, back, safe=False) if key.step == 1 else None,
            )
            return False
        return True

    def _overlaps(self, keys: Sequence[ast.Range], span: Span) -> bool:
        for first, second, index in overlapping(keys):
            place = second.span if second.span.end else span
            self.sink.error(
                "S0225", f"layer {index} has two values in this table", place, "second value",
                also=[(first.span, "first value")] if first.span.end else (), help="make the ranges meet without overlap, as in `{0..3: 4, 4..11: 8}`",
            )  # fmt: skip
            return False
        return True

    def indexes(self, steps: Iterable[ast.Step | ast.SetStep]) -> None:
        """Reports empty ranges in the brackets of selector steps."""
        for step in steps:
            if step.index is not None:
                for key in step.index.ranges:
                    self.range(key)
            if isinstance(step, ast.SetStep):
                for member in step.members:
                    self.indexes(member)


def _is_ramp(value: ast.Value) -> bool:
    return isinstance(value, ast.Call) and value.name == "ramp"


def _word(value: ast.Selector) -> str:
    step = value.steps[0] if len(value.steps) == 1 and value.raw is None and value.ref is None and not value.optional else None
    return step.name if isinstance(step, ast.Step) and step.index is None and "*" not in step.name else ""


def _origin(definition: Definition | None) -> Also:
    if definition is None:
        return []
    if definition.set_at is not None:
        return [(definition.set_at, f"`{definition.name}` is set here")]
    return [(definition.span, f"`{definition.name}` is defined here")]
