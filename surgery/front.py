"""From text to a checked spec: parse and check with imports and ``--set``, without torch. The command line and the driver start here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from surgery.core import ast
from surgery.core.checker import check
from surgery.core.diagnostics import Diagnostic, Sink
from surgery.core.source import Source
from surgery.core.spec import Spec
from surgery.grammar.parser import parse, read_source


def source_of(spec: str | os.PathLike[str] | Source) -> Source:
    """The source of a path, or of a text when it has a newline or begins with ``surg ``; a source is itself. Raises SurgeryError for an
    unreadable file."""
    if isinstance(spec, Source):
        return spec
    if isinstance(spec, str) and ("\n" in spec or spec.lstrip().startswith("surg ")):
        return Source("<text>", spec)
    return read_source(Path(spec))


def check_source(source: Source, sets: Mapping[str, str] | None = None) -> tuple[Spec, list[Diagnostic]]:
    """The checked spec and all findings of the parser and the checker, each once, in the order of the text."""
    tree, found = parse(source)
    spec, more = check(tree, source, sets=sets, read=_read, literal=literal)
    sink = Sink()
    sink.extend(found)
    sink.extend(more)
    own = [d for d in sink if d.span.source is source]
    return spec, [*sorted(own, key=lambda d: d.span.start), *(d for d in sink if d.span.source is not source)]


def _read(path: str) -> tuple[ast.File, Source, list[Diagnostic]]:
    source = read_source(path)
    tree, found = parse(source)
    return tree, source, list(found)


def literal(text: str) -> ast.Value | None:
    """The value that a text such as ``16``, ``5%``, ``gelu`` or ``[4, 8]`` stands for; None when it is not one literal."""
    if "\n" in text or "\r" in text:
        return None
    tree, found = parse(Source("--set", f"surg 1\nlet value = {text}\n"))
    statements = tree.statements
    if found or len(statements) != 2 or not isinstance(statements[1], ast.Let):
        return None
    value = statements[1].value
    if isinstance(value, ast.Selector) and (value.raw is not None or value.ref is not None):
        return None
    return value
