"""The machine twin of a spec: its syntax tree as JSON and back, for tools that write specs.

A node is ``{"node": "Operation", field: value, ...}`` with all fields that count for equality; places stand in
``"span": [start, end]`` (character offsets) when asked for. The document is ``{"schema": "surgery.ast/1", "file": ...}``.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from typing import Any, get_type_hints

from surgery.core import ast
from surgery.core.source import NOWHERE, Source, Span

SCHEMA = "surgery.ast/1"

_NODES: dict[str, type[ast.Node]] = {
    kind.__name__: kind for kind in vars(ast).values() if isinstance(kind, type) and issubclass(kind, ast.Node)
}


@cache
def _fields(kind: str) -> tuple[str, ...]:
    """The fields of a node that count for equality."""
    return tuple(f.name for f in dataclasses.fields(_NODES[kind]) if f.compare)


def to_json(node: ast.Node, *, spans: bool = False) -> dict[str, Any]:
    """JSON-able data of a tree; a :class:`ast.File` is wrapped with the schema's name."""
    data = _out(node, spans)
    return {"schema": SCHEMA, "file": data} if isinstance(node, ast.File) else data


def _out(value: Any, spans: bool) -> Any:
    if isinstance(value, ast.Node):
        data: dict[str, Any] = {"node": type(value).__name__}
        for name in _fields(type(value).__name__):
            data[name] = _out(getattr(value, name), spans)
        if spans and value.span is not NOWHERE:
            data["span"] = [value.span.start, value.span.end]
        return data
    if isinstance(value, tuple):
        return [_out(item, spans) for item in value]
    return value


def from_json(data: dict[str, Any], source: Source | None = None) -> ast.Node:
    """The tree of :func:`to_json`; spans are read when ``source`` is given.

    Raises ``ValueError`` that names the place for anything that is no tree of this schema.
    """
    if isinstance(data, dict) and "schema" in data:
        if data["schema"] != SCHEMA:
            raise ValueError(f"the schema is {data['schema']!r}, not {SCHEMA!r}")
        data = data.get("file")  # type: ignore[assignment]
    node = _in(data, source, "file")
    if not isinstance(node, ast.Node):
        raise ValueError("file: a node is due here")
    return node


def _in(value: Any, source: Source | None, where: str) -> Any:
    if isinstance(value, list):
        return tuple(_in(item, source, f"{where}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, dict):
        return value
    kind = _NODES.get(value.get("node", ""))
    if kind is None:
        raise ValueError(f"{where}: there is no node {value.get('node')!r}")
    hints = _hints(kind.__name__)
    arguments: dict[str, Any] = {}
    for key, item in value.items():
        if key in ("node", "span"):
            continue
        if key not in hints:
            raise ValueError(f"{where}: {kind.__name__} has no field {key!r}")
        arguments[key] = _in(item, source, f"{where}.{key}")
        if not _fits(arguments[key], hints[key]):
            raise ValueError(f"{where}.{key}: {type(item).__name__} does not fit")
    if source is not None and "span" in value:
        arguments["span"] = Span(source, *value["span"])
    try:
        return kind(**arguments)
    except TypeError as fault:
        raise ValueError(f"{where}: {fault}") from None


@cache
def _hints(kind: str) -> dict[str, Any]:
    hints = get_type_hints(_NODES[kind])
    return {name: hints[name] for name in _fields(kind)}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value read from JSON is of the field's type."""
    origin = getattr(hint, "__origin__", None)
    if origin is tuple:
        args = hint.__args__
        return isinstance(value, tuple) and all(_fits(item, args[0]) for item in value)
    if hasattr(hint, "__args__"):
        return any(_fits(value, option) for option in hint.__args__)
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)
