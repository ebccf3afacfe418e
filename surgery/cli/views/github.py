"""Diagnostics as workflow commands of GitHub Actions: annotations at the lines of a pull request."""

from __future__ import annotations

from collections.abc import Iterable

from surgery.core.diagnostics import Diagnostic

_LEVEL = {"error": "error", "warning": "warning", "note": "notice"}


def render(diagnostics: Iterable[Diagnostic]) -> str:
    return "".join(one(d) + "\n" for d in diagnostics)


def one(d: Diagnostic) -> str:
    """``::error file=a.surg,line=3,col=5,title=S0212::message``."""
    fields = []
    label = d.primary
    if label is not None:
        span = label.span
        fields = [f"file={_property(span.source.name)}", f"line={span.line}", f"endLine={span.end_line}", f"col={span.column}"]
        if span.end_line == span.line:
            fields.append(f"endColumn={span.end_column}")
    fields.append(f"title={_property(d.code)}")
    lines = [d.message, *([label.text] if label is not None and label.text else [])]
    lines += [f"note: {la.text} ({la.span})" for la in d.labels if not la.primary]
    lines += [f"note: {n}" for n in d.notes] + [f"help: {h}" for h in d.help]
    return f"::{_LEVEL[str(d.severity)]} {','.join(fields)}::{_data(chr(10).join(lines))}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
