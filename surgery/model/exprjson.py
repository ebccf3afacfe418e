"""Size expressions as plain data, and back, without ever handing text to sympy's parser (which evaluates Python).

An expression is an int, a symbol's name, or ``[operator, argument, ...]`` with an operator listed here. Expressions are
rebuilt without evaluation, so that what is written again is what was read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import sympy
from torch.utils._sympy import functions as sizes

_SYMBOL = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_MAX_INT = 1 << 63
_MAX_POWER = 16
_MAX_DEPTH = 48
_TORCH_FUNCTIONS = (
    "FloorDiv", "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "IntTrueDiv", "FloatTrueDiv", "Mod", "PythonMod", "ModularIndexing",
    "PowByNatural", "RoundToInt", "ToFloat", "TruncToInt", "Max", "Min", "Where", "Identity",
)  # fmt: skip
_FUNCTIONS: dict[str, Any] = {
    "+": sympy.Add, "*": sympy.Mul, "**": sympy.Pow, "==": sympy.Eq, "!=": sympy.Ne, "<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt,
    ">=": sympy.Ge, "and": sympy.And, "or": sympy.Or, "not": sympy.Not, "smax": sympy.Max, "smin": sympy.Min,
    "floor": sympy.floor, "ceiling": sympy.ceiling,
} | {name: getattr(sizes, name) for name in _TORCH_FUNCTIONS if hasattr(sizes, name)}  # fmt: skip
_NAMES = {cls: name for name, cls in _FUNCTIONS.items()}


def dump_expr(value: Any, symbols: dict[str, str]) -> Any:
    """Plain data of an int, bool, float or sympy expression; ``symbols`` collects each symbol's assumptions.

    Raises ValueError for an operator that is not listed.
    """
    if isinstance(value, (bool, int, str)) or value is None:
        return value if not isinstance(value, str) else ["text", value]
    if isinstance(value, float):
        return ["float", value.hex()]
    if isinstance(value, sympy.Symbol):
        if not _SYMBOL.fullmatch(value.name):
            raise ValueError(f"symbol name {value.name!r}")
        symbols[value.name] = "".join(
            letter for letter, known in (("i", value.is_integer), ("p", value.is_positive), ("n", value.is_nonnegative)) if known
        )
        return value.name
    if isinstance(value, sympy.Integer):
        return int(value)
    if isinstance(value, sympy.Rational):
        return ["/", int(value.p), int(value.q)]
    if isinstance(value, sympy.Float):
        return ["float", float(value).hex()]
    if isinstance(value, (sympy.logic.boolalg.BooleanTrue, sympy.logic.boolalg.BooleanFalse)):
        return bool(value)
    if hasattr(value, "node") and hasattr(value.node, "expr"):  # a SymInt of torch
        return dump_expr(value.node.expr, symbols)
    name = _NAMES.get(getattr(value, "func", None))
    if name is None:
        raise ValueError(f"size expression {value!r} of type {type(value).__name__}")
    return [name, *(dump_expr(arg, symbols) for arg in value.args)]


def make_symbols(table: Mapping[str, str]) -> dict[str, sympy.Symbol]:
    """The symbols of a table of names and assumption letters; ValueError for a malformed one."""
    made = {}
    for name, letters in table.items():
        if not _SYMBOL.fullmatch(name) or not set(letters) <= set("ipn"):
            raise ValueError(f"symbol {name[:40]!r}")
        flags = {"i": "integer", "p": "positive", "n": "nonnegative"}
        known = {flags[letter]: True for letter in letters if not (letter == "n" and "p" in letters)}
        made[name] = sympy.Symbol(name, **known)
    return made


def load_expr(data: Any, symbols: Mapping[str, sympy.Symbol], depth: int = 0) -> Any:
    """The value behind :func:`dump_expr`'s data; ValueError for anything else. Plain numbers stay Python numbers at the top."""
    if isinstance(data, bool) or data is None:
        return data
    if isinstance(data, int):
        if abs(data) >= _MAX_INT:
            raise ValueError("size out of range")
        return data if depth == 0 else sympy.Integer(data)
    if isinstance(data, str):
        return symbols[data]
    if not isinstance(data, list) or not data or not isinstance(data[0], str) or depth > _MAX_DEPTH:
        raise ValueError("not a size expression")
    name, *rest = data
    if name == "float":
        return float.fromhex(rest[0])
    if name == "text":
        return str(rest[0])
    if name == "/":
        return sympy.Rational(int(rest[0]), int(rest[1]))
    args = [load_expr(arg, symbols, depth + 1) for arg in rest]
    if name == "**" and not (isinstance(args[1], sympy.Integer) and abs(args[1]) <= _MAX_POWER):
        raise ValueError("power of a size out of range")
    return _FUNCTIONS[name](*args, evaluate=False)
