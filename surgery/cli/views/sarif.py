"""Diagnostics as SARIF 2.1.0, the format that code-scanning services read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from urllib.parse import quote

from surgery import __version__
from surgery.cli.views.json import dumps
from surgery.core.diagnostics import Diagnostic
from surgery.core.source import Span

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def document(diagnostics: Iterable[Diagnostic], headlines: dict[str, str] | None = None) -> dict[str, Any]:
    """One run with one result a diagnostic. ``headlines`` gives the description of each rule."""
    found = list(diagnostics)
    codes = sorted({d.code for d in found})
    rules = [{"id": c, "shortDescription": {"text": (headlines or {}).get(c) or c}} for c in codes]
    return {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {"driver": {"name": "surgery", "version": __version__, "rules": rules}},
                "columnKind": "unicodeCodePoints",
                "results": [_result(d, codes.index(d.code)) for d in found],
            }
        ],
    }


def render(diagnostics: Iterable[Diagnostic], headlines: dict[str, str] | None = None) -> str:
    return dumps(document(diagnostics, headlines))


def _result(d: Diagnostic, rule: int) -> dict[str, Any]:
    text = "\n".join(
        [
            d.message,
            *(la.text for la in d.labels if la.primary and la.text),
            *(f"note: {n}" for n in d.notes),
            *(f"help: {h}" for h in d.help),
        ]
    )
    out: dict[str, Any] = {"ruleId": d.code, "ruleIndex": rule, "level": str(d.severity), "message": {"text": text}}
    out["locations"] = [_location(la.span) for la in d.labels if la.primary]
    related = [
        {"id": i, **_location(la.span), "message": {"text": la.text}} for i, la in enumerate(la for la in d.labels if not la.primary)
    ]
    if related:
        out["relatedLocations"] = related
    if d.fix is not None:
        change = {"deletedRegion": _region(d.fix.span), "insertedContent": {"text": d.fix.replacement}}
        out["fixes"] = [
            {
                "description": {"text": f"write {d.fix.replacement}"},
                "artifactChanges": [{"artifactLocation": _artifact(d.fix.span), "replacements": [change]}],
            }
        ]
    return out


def _location(span: Span) -> dict[str, Any]:
    return {"physicalLocation": {"artifactLocation": _artifact(span), "region": _region(span)}}


def _artifact(span: Span) -> dict[str, str]:
    return {"uri": quote(span.source.name.replace("\\", "/"), safe="/")}


def _region(span: Span) -> dict[str, int]:
    return {"startLine": span.line, "startColumn": span.column, "endLine": span.end_line, "endColumn": span.end_column}
