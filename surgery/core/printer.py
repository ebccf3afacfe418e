"""Syntax tree to canonical text: ``parse(to_text(tree)) == tree``.

The text is one statement a line, in the order in which the language's documentation shows the clauses. ``surgery fmt``
works on tokens instead (it keeps comments); this printer is for trees that a program made and for parts shown in reports.
"""

from __future__ import annotations

from functools import singledispatch

from surgery.core import ast
from surgery.core.units import BYTES, COUNTS, plain

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def quote(text: str) -> str:
    """A string literal of the language."""
    return '"' + "".join(_ESCAPES.get(c) or (c if c >= " " else f"\\u{ord(c):04x}") for c in text) + '"'


def to_text(node: ast.Node) -> str:
    """Canonical text of a file (with a final end of line) or of any node below it (without)."""
    return _text(node)


@singledispatch
def _text(node: object) -> str:
    raise TypeError(f"no text for {type(node).__name__}")


def _list(nodes: tuple[ast.Node, ...]) -> str:
    return ", ".join(_text(node) for node in nodes)


# ---------------------------------------------------------------- values


@_text.register
def _(node: ast.Number) -> str:
    value, unit = node.value, node.unit
    if not unit:
        return plain(value)
    from decimal import Decimal

    exact = Decimal(str(value)) if isinstance(value, float) else Decimal(value)
    if unit == "%":
        digits = exact * 100
    else:
        factor = COUNTS[unit] if unit in COUNTS else BYTES[unit]
        digits = exact / factor
    text = format(digits, "f")
    return (text.rstrip("0").rstrip(".") if "." in text else text) + unit


@_text.register
def _(node: ast.String) -> str:
    return quote(node.value)


@_text.register
def _(node: ast.Name) -> str:
    return node.value


@_text.register
def _(node: ast.ListValue) -> str:
    return f"[{_list(node.items)}]"


@_text.register
def _(node: ast.Range) -> str:
    if node.stop == node.start and node.step == 1:
        return str(node.start)
    text = f"{node.start}.." + ("" if node.stop is None else str(node.stop))
    return text if node.step == 1 else f"{text} by {node.step}"


@_text.register
def _(node: ast.TableEntry) -> str:
    return f"{_text(node.key)}: {_text(node.value)}"


@_text.register
def _(node: ast.Table) -> str:
    return "{" + _list(node.entries) + "}"


@_text.register
def _(node: ast.Arg) -> str:
    return f"{node.name} = {_text(node.value)}" if node.name else _text(node.value)


@_text.register
def _(node: ast.Call) -> str:
    return f"{node.name}({_list(node.args)})"


def _method(node: ast.Call) -> str:
    """A call in method position, where empty parentheses go."""
    return _text(node) if node.args else node.name


# ---------------------------------------------------------------- selectors


@_text.register
def _(node: ast.Index) -> str:
    return "[*]" if node.all else f"[{_list(node.ranges)}]"


@_text.register
def _(node: ast.Step) -> str:
    return node.name + (_text(node.index) if node.index else "")


@_text.register
def _(node: ast.SetStep) -> str:
    members = ", ".join(_path(member) for member in node.members)
    return "{" + members + "}" + (_text(node.index) if node.index else "")


def _path(steps: tuple[ast.Step | ast.SetStep, ...]) -> str:
    return ".".join(_text(step) for step in steps)


@_text.register
def _(node: ast.Selector) -> str:
    if node.raw is not None:
        text = quote(node.raw)
    elif node.ref is not None:
        text = ".".join(["@" + node.ref, *(_text(step) for step in node.steps)])
    else:
        text = _path(node.steps)
    return text + ("?" if node.optional else "")


# ---------------------------------------------------------------- statements


def _clause(word: str, selectors: tuple[ast.Selector, ...]) -> str:
    return f" {word} {_list(selectors)}" if selectors else ""


@_text.register
def _(node: ast.Edition) -> str:
    return f"surg {node.number}"


@_text.register
def _(node: ast.Import) -> str:
    return f"import {quote(node.path)} as {node.name}"


@_text.register
def _(node: ast.Param) -> str:
    return f"param {node.name}" + ("" if node.value is None else f" = {_text(node.value)}")


@_text.register
def _(node: ast.Let) -> str:
    return f"let {node.name} = {_text(node.value)}"


@_text.register
def _(node: ast.Model) -> str:
    return f"model {quote(node.ref)}" + (f" as {node.name}" if node.name else "")


@_text.register
def _(node: ast.Data) -> str:
    return f"data {node.name} = {_method(node.source)}" + (f" select {_method(node.select)}" if node.select else "")


@_text.register
def _(node: ast.Load) -> str:
    return f"{node.what} {node.name} = {_method(node.source)}"


@_text.register
def _(node: ast.Operation) -> str:
    text = f"{node.verb} {_method(node.method)}"
    if node.place:
        text += _clause(node.place, node.selectors)
    if node.using:
        text += f" using {node.using}"
    text += _clause("keep", node.keep)
    if node.keep_own:
        text += f" keep own {', '.join(node.keep_own)}"
    text += _clause("except", node.except_)
    return text + (f" as {node.name}" if node.name else "")


@_text.register
def _(node: ast.Weighted) -> str:
    return node.name + (f" * {_text(node.weight)}" if node.weight else "")


@_text.register
def _(node: ast.Merge) -> str:
    text = f"merge {_method(node.method)} of {_list(node.of)}" + _clause("on", node.selectors)
    return text + (f" as {node.name}" if node.name else "")


@_text.register
def _(node: ast.Train) -> str:
    return f"train {_method(node.method)}" + _clause("on", node.selectors)


@_text.register
def _(node: ast.ExpectQuantity) -> str:
    text = f"expect {node.quantity}{_clause('on', node.selectors)} {node.compare} {_text(node.value)}"
    return text + (" of base" if node.of_base else "") + (f" for {node.of}" if node.of else "")


@_text.register
def _(node: ast.ExpectCheck) -> str:
    return f"expect {_method(node.check)}" + (f" within {_text(node.within)}" if node.within is not None else "")


@_text.register
def _(node: ast.Measure) -> str:
    return f"measure {_method(node.method)}{_clause('on', node.selectors)}" + (f" using {node.using}" if node.using else "")


@_text.register
def _(node: ast.Emit) -> str:
    return f"emit {_method(node.backend)} to {quote(node.to)}"


@_text.register
def _(node: ast.Stage) -> str:
    inner = "".join("  " + line + "\n" for statement in node.body for line in _documented(statement))
    return f"stage {node.name} {{\n{inner}}}"


def _documented(statement: ast.Statement) -> list[str]:
    """The lines of a statement with its documentation."""
    lines = [("## " + line).rstrip() for line in statement.doc.split("\n")] if statement.doc else []
    return lines + _text(statement).split("\n")


@_text.register
def _(node: ast.File) -> str:
    return "".join(line + "\n" for statement in node.statements for line in _documented(statement))
