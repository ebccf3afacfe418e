"""Writes what the driver answers: every answer has ``as_json()`` and ``render_text()``."""

from __future__ import annotations

from typing import Any, Protocol

from surgery.cli.command import FINDINGS, FINE
from surgery.cli.report import Report, result
from surgery.core.diagnostics import Diagnostic


class Answer(Protocol):
    """What ``driver.show``, ``driver.select`` and ``driver.diff`` give."""

    def as_json(self) -> dict[str, Any]: ...

    def render_text(self) -> str: ...


def present(report: Report, answer: Answer) -> int:
    """Writes an answer; exit code 1 when its own diagnostics have an error or it says that it is not ``ok``."""
    found: list[Diagnostic] = list(getattr(answer, "diagnostics", ()))
    report.diagnostics(found)
    if report.machine:
        report.document(found, answer.as_json())
    else:
        result(answer.render_text())
    code = report.code(found)
    return FINDINGS if code == FINE and not getattr(answer, "ok", True) else code
