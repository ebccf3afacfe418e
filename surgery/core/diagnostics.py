"""What went wrong, where, and what to do: the one type that every part of surgery reports with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from surgery.core.source import NOWHERE, Span


class Severity(StrEnum):
    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True)
class Label:
    """A place with a short text that points at it."""

    span: Span
    text: str = ""
    primary: bool = True


@dataclass(frozen=True)
class Fix:
    """A replacement of one span. ``safe`` fixes never change meaning."""

    span: Span
    replacement: str
    safe: bool = True


@dataclass(frozen=True)
class Diagnostic:
    """One finding.

    ``message`` says what is wrong (lower case, no full stop, stands alone); ``help`` alone says what to do.
    A diagnostic without labels concerns a file or an argument: name it in the message.
    """

    code: str
    message: str
    labels: tuple[Label, ...] = ()
    notes: tuple[str, ...] = ()
    help: tuple[str, ...] = ()
    severity: Severity = Severity.ERROR
    fix: Fix | None = None

    @property
    def primary(self) -> Label | None:
        return next((label for label in self.labels if label.primary), None)

    @property
    def span(self) -> Span:
        label = self.primary
        return label.span if label else NOWHERE

    @property
    def is_error(self) -> bool:
        return self.severity is Severity.ERROR

    def as_json(self) -> dict[str, Any]:
        """The documented JSON shape of a diagnostic."""

        def place(span: Span) -> dict[str, Any]:
            return {
                "file": span.source.name,
                "line": span.line,
                "column": span.column,
                "end_line": span.end_line,
                "end_column": span.end_column,
            }

        return {
            "code": self.code,
            "severity": str(self.severity),
            "message": self.message,
            "labels": [{**place(la.span), "text": la.text, "primary": la.primary} for la in self.labels],
            "notes": list(self.notes),
            "help": list(self.help),
            "fix": None if self.fix is None else {**place(self.fix.span), "replacement": self.fix.replacement, "safe": self.fix.safe},
        }


def error(
    code: str,
    message: str,
    span: Span | None = None,
    label: str = "",
    *,
    also: Iterable[tuple[Span, str]] = (),
    notes: Iterable[str] = (),
    help: Iterable[str] | str = (),
    severity: Severity = Severity.ERROR,
    fix: Fix | None = None,
) -> Diagnostic:
    """Short constructor: one primary place with a label, further places in ``also``."""
    labels = [] if span is None or span is NOWHERE else [Label(span, label)]
    labels += [Label(place, text, primary=False) for place, text in also]
    helps = (help,) if isinstance(help, str) else tuple(help)
    return Diagnostic(code, message, tuple(labels), tuple(notes), helps, severity, fix)


INPUT_FAULTS = frozenset({"S0701", "S0702", "S0706", "S0721", "S0820"})
"""Codes that say: what was named as input is not there, or not all of it, or cannot be read. As for a spec that is not there, the exit
code is 2; what is there and is wrong (damaged weights, an unknown family) is a finding."""


class SurgeryError(Exception):
    """The only exception that users see; carries every diagnostic of the failed step.

    ``exit_code`` is 1 for findings (the spec or the model is wrong) and 2 for usage, input/output and
    internal faults; the default is 2 when one of the codes is in ``INPUT_FAULTS``.
    """

    def __init__(self, *diagnostics: Diagnostic, exit_code: int | None = None) -> None:
        self.diagnostics: tuple[Diagnostic, ...] = diagnostics
        self.exit_code = exit_code or (2 if any(d.code in INPUT_FAULTS for d in diagnostics) else 1)
        super().__init__("; ".join(f"{d.code}: {d.message}" for d in diagnostics))


def fail(code: str, message: str, span: Span | None = None, label: str = "", *, exit_code: int | None = None, **more: Any) -> SurgeryError:
    """A :class:`SurgeryError` of one diagnostic, to be raised: ``raise fail("S0701", ...)``."""
    return SurgeryError(error(code, message, span, label, **more), exit_code=exit_code)


@dataclass
class Sink:
    """Collects diagnostics so that one run reports all of them, each once."""

    items: list[Diagnostic] = field(default_factory=list)
    _seen: set[tuple[str, str, int, str]] = field(default_factory=set)

    def add(self, diagnostic: Diagnostic) -> None:
        span = diagnostic.span
        key = (diagnostic.code, span.source.name, span.start, diagnostic.message)
        if key not in self._seen:
            self._seen.add(key)
            self.items.append(diagnostic)

    def extend(self, diagnostics: Iterable[Diagnostic]) -> None:
        for diagnostic in diagnostics:
            self.add(diagnostic)

    def error(self, code: str, message: str, span: Span | None = None, label: str = "", **more: Any) -> None:
        self.add(error(code, message, span, label, **more))

    @property
    def failed(self) -> bool:
        return any(d.is_error for d in self.items)

    def __iter__(self) -> Iterator[Diagnostic]:
        return iter(self.items)

    def raise_if_failed(self) -> None:
        if self.failed:
            raise SurgeryError(*self.items)
