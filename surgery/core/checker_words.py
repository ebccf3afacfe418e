"""Values and parameters in words, for messages: what is there, what is wanted, and an example of it."""

from __future__ import annotations

import math

from surgery.core import ast, nested, units
from surgery.core.method import ParamInfo


def dimension(unit: str) -> str:
    """``plain``, ``share``, ``count`` or ``bytes`` for a unit as written (``""``, ``%``, ``k``, ``GiB``)."""
    return units.dimension(unit) or "plain"


def describe(value: ast.Value) -> str:
    """What a value is, in words."""
    if isinstance(value, ast.Number):
        return {"plain": "a number", "share": "a share", "count": "a count", "bytes": "a size in bytes"}[dimension(value.unit)]
    if isinstance(value, ast.Name):
        return f"the word `{value.value}`"
    if isinstance(value, ast.Call):
        return f"the call `{value.name}(...)`"
    return {ast.String: "text", ast.ListValue: "a list", ast.Table: "a table by layer", ast.Selector: "a selector"}.get(
        type(value), "a value"
    )


def wanted(info: ParamInfo) -> str:
    """What a parameter takes, in words."""
    if info.choices:
        return f"one of {', '.join(info.choices)}" + "".join(f" or {KINDS_IN_WORDS[t]}" for t in info.also)
    if info.unit == "%":
        return "a share between 0% and 100%"
    if info.unit == "bytes":
        return "a size in bytes"
    if info.unit == "tokens":
        return "a number of tokens"
    if info.unit in nested.NESTED:
        return nested.WANTED[info.unit]
    return KINDS_IN_WORDS.get(info.type, "a name") + "".join(f" or {KINDS_IN_WORDS[t]}" for t in info.also)


KINDS_IN_WORDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text in quotes", "list": "a list"}


def show(value: float | int | str | bool | None, unit: str = "") -> str:
    """A value as it is written in a spec."""
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return value
    if unit == "%":
        return f"{value * 100:.12g}%"
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.12g}"
    return str(value)


def example(info: ParamInfo) -> str:
    """``rank = 8``: the parameter with a value that is allowed."""
    if info.default is not None and not isinstance(info.default, list | tuple) and (info.unit != "%" or info.default):
        value = show(info.default, info.unit)
        return f'{info.name} = "{value}"' if info.type == "str" else f"{info.name} = {value}"
    if info.choices:
        return f"{info.name} = {info.choices[0]}"
    if info.unit == "%":
        return f"{info.name} = {show(_clamp(0.1, info), '%')}"
    if info.unit == "bytes":
        return f"{info.name} = 500MB"
    if info.unit in nested.NESTED:
        return f"{info.name} = {nested.EXAMPLES[info.unit]}"
    if info.type in ("int", "float"):
        return f"{info.name} = {show(_clamp(8, info))}"
    return {"bool": f"{info.name} = true", "str": f'{info.name} = "..."', "list": f"{info.name} = [1, 2]"}.get(
        info.type, f"{info.name} = ..."
    )


def _clamp(value: float, info: ParamInfo) -> float:
    low, high = limits(info)
    if low is not None and value < low:
        value = low
    if high is not None and value > high:
        value = high
    return math.ceil(value) if info.type == "int" else value


def limits(info: ParamInfo) -> tuple[float | None, float | None]:
    """Lowest and highest allowed number; a share is within [0, 1] in any case."""
    if info.unit != "%":
        return info.min, info.max
    return max(0.0, info.min or 0.0), min(1.0, 1.0 if info.max is None else info.max)
