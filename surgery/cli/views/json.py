"""Diagnostics as JSON: one object with a schema name, the shape that the language page documents."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from surgery.core.diagnostics import Diagnostic

SCHEMA = "surgery.diagnostics/1"


def document(diagnostics: Iterable[Diagnostic], **more: Any) -> dict[str, Any]:
    """The object: schema, whatever the verb adds, diagnostics last."""
    return {"schema": SCHEMA, **more, "diagnostics": [d.as_json() for d in diagnostics]}


def render(diagnostics: Iterable[Diagnostic], **more: Any) -> str:
    return dumps(document(diagnostics, **more))


def dumps(value: Any) -> str:
    """JSON as every verb prints it: two spaces, UTF-8 as it is, no NaN (which is not JSON)."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | set | frozenset):
        return sorted(value) if isinstance(value, set | frozenset) else list(value)
    return str(value)
