"""Items of list parameters that are more than numbers and words: slices of layers, and values by layer. No torch.

A parameter of type ``list`` with unit ``layers`` holds selectors of layers, as text. One with unit ``by layer`` holds values by layer, as plain data:
a number; ``("list", v, ...)``; ``("table", (first, last, step, v), ...)``; ``("ramp", a, b)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from surgery.core import ast
from surgery.core.printer import to_text

NESTED = ("layers", "by layer")
"""Units of list parameters whose items are read here."""

WANTED = {
    "layers": "a list of layers, as in `[layers[0..7], layers[4..11]]`",
    "by layer": "a list of numbers, lists, tables or ramps, one for each model",
}
EXAMPLES = {"layers": "[layers[0..7], layers[4..11]]", "by layer": "[ramp(1, 0), ramp(0, 1)]"}


def item(unit: str, value: ast.Value, resolve: Callable[[ast.Value], ast.Value]) -> Any:
    """The plain data of one item; None for a value that does not belong there. ``resolve`` puts values in the place of names."""
    value = resolve(value)
    if unit == "layers":
        if isinstance(value, ast.Name):
            return value.value
        plain = isinstance(value, ast.Selector) and value.raw is None and value.ref is None and not value.optional
        return to_text(value) if plain else None
    if isinstance(value, ast.Number):
        return float(value.value)
    if isinstance(value, ast.ListValue):
        return _all("list", [_number(resolve(v)) for v in value.items])
    if isinstance(value, ast.Table):
        entries = [(e.key.start, e.key.stop, e.key.step, _number(resolve(e.value))) for e in value.entries]
        return None if any(e[3] is None for e in entries) or not entries else ("table", *entries)
    if isinstance(value, ast.Call) and value.name == "ramp" and len(value.args) == 2 and not any(a.name for a in value.args):
        return _all("ramp", [_number(resolve(a.value)) for a in value.args])
    return None


def _number(value: ast.Value) -> float | None:
    return float(value.value) if isinstance(value, ast.Number) else None


def _all(kind: str, values: list[float | None]) -> tuple[Any, ...] | None:
    return None if not values or any(v is None for v in values) else (kind, *values)


def spread(value: Any) -> Any:
    """An item of unit ``by layer`` as :func:`surgery.core.spread.expand_per_layer` takes it."""
    if not isinstance(value, tuple | list):
        return value
    kind, *rest = value
    if kind == "list":
        return list(rest)
    if kind == "ramp":
        return ast.Call("ramp", tuple(ast.Arg("", ast.Number(v)) for v in rest))
    return ast.Table(tuple(ast.TableEntry(ast.Range(first, last, step), ast.Number(v)) for first, last, step, v in rest))
