"""Diagnostics for people: headline, place, source excerpt with carets, notes, help.

The layout is the one of the language page. Columns are those of a terminal: tabs become spaces, wide characters count twice, control
characters are shown as a dot, long lines are cut to a window around what is pointed at.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from surgery.core.diagnostics import Diagnostic, Label, Severity
from surgery.core.source import Source, Span

TAB = 4
WINDOW = 160
MAX_LINES = 6

_PAINT = {
    "error": "\x1b[1;31m",
    "warning": "\x1b[1;33m",
    "note": "\x1b[1;36m",
    "help": "\x1b[1;32m",
    "gutter": "\x1b[1;34m",
    "bold": "\x1b[1m",
    "off": "\x1b[0m",
}


class Painter:
    """Colours words, or leaves them alone."""

    def __init__(self, color: bool) -> None:
        self.color = color

    def __call__(self, style: str, text: str) -> str:
        return f"{_PAINT[style]}{text}{_PAINT['off']}" if self.color and text else text


def render(diagnostics: Iterable[Diagnostic], *, color: bool = False) -> str:
    """All diagnostics, an empty line between two, with a newline at the end; empty when there are none."""
    blocks = [one(d, color=color) for d in diagnostics]
    return "\n\n".join(blocks) + "\n" if blocks else ""


def one(diagnostic: Diagnostic, *, color: bool = False) -> str:
    """One diagnostic without a newline at its end."""
    paint = Painter(color)
    severity = str(diagnostic.severity)
    message = clean(diagnostic.message)
    lines = [f"{paint(severity, f'{severity}[{diagnostic.code}]')}{paint('bold', f': {message}')}"]
    labels = [la for la in diagnostic.labels if la.primary]
    width = max([len(str(_last_line(la.span))) for la in labels], default=1)
    for label in labels:
        lines += _excerpt(label, width, severity, paint)
    if labels:
        lines.append(" " * (width + 1) + paint("gutter", "|"))
    for label in diagnostic.labels:
        if not label.primary:
            lines.append(f"{paint('note', 'note')}: {_flow(label.text)}")
            lines.append(f"{' ' * width}{paint('gutter', '-->')} {_place(label.span)}")
    lines += [f"{paint('note', 'note')}: {_flow(note)}" for note in diagnostic.notes]
    lines += [f"{paint('help', 'help')}: {_flow(text)}" for text in diagnostic.help]
    lines.append(f"{' ' * (width + 1)}{paint('gutter', '=')} surgery explain {diagnostic.code}")
    return "\n".join(lines)


def summary(diagnostics: Sequence[Diagnostic]) -> str:
    """``2 errors, 1 warning``; empty when there are none."""
    parts = []
    for severity in (Severity.ERROR, Severity.WARNING):
        count = sum(d.severity is severity for d in diagnostics)
        if count:
            parts.append(f"{count} {severity}" + ("s" if count > 1 else ""))
    return ", ".join(parts)


def _place(span: Span) -> str:
    return clean(f"{span.source.name}:{span.line}:{span.column}")


def _flow(text: str) -> str:
    """Text of several lines: further lines stand below the first word."""
    return "\n      ".join(clean(line) for line in text.split("\n"))


def _last_line(span: Span) -> int:
    return span.source.position(max(span.start, span.end - 1))[0]


def _excerpt(label: Label, width: int, severity: str, paint: Painter) -> list[str]:
    span, source = label.span, label.span.source
    first, last = span.line, _last_line(span)
    bar = paint("gutter", "|")
    out = [f"{' ' * width}{paint('gutter', '-->')} {_place(span)}", f"{' ' * (width + 1)}{bar}"]
    numbers: list[int | None] = list(range(first, last + 1))
    if len(numbers) > MAX_LINES:
        numbers = [*numbers[: MAX_LINES // 2], None, *numbers[-(MAX_LINES // 2) + 1 :]]
    for number in numbers:
        if number is None:
            out.append(paint("gutter", "..."))
            continue
        shown, before, length = _line(source, number, span)
        out.append(f"{paint('gutter', f'{number:>{width}}')} {bar} {shown}".rstrip())
        if length == 0 and number != last:
            continue
        marks = " " * before + paint(severity, "^" * max(length, 1))
        text = f" {clean(label.text)}" if number == last and label.text else ""
        out.append(f"{' ' * (width + 1)}{bar} {marks}{paint(severity, text)}")
    return out


def _line(source: Source, number: int, span: Span) -> tuple[str, int, int]:
    """The line as shown, the display column where the marks begin, and how wide they are."""
    text = source.line(number)
    start = source.line_starts[number - 1]
    a = min(max(span.start - start, 0), len(text))
    b = min(max(span.end - start, a), len(text))
    if span.start < start:  # a later line of a long span: leave its indentation unmarked
        a = max(a, len(text) - len(text.lstrip()))
        b = max(a, b)
    cut = max(0, a - WINDOW // 3) if len(text) > WINDOW else 0
    piece = text[cut : cut + WINDOW]
    head = "…" if cut else ""
    tail = "…" if cut + WINDOW < len(text) else ""
    shown = [*head]
    columns = [len(head)]
    at = len(head)
    for ch in piece:
        drawn = _draw(ch, at - len(head))
        shown.append(drawn)
        at += width_of(drawn)
        columns.append(at)
    begin = columns[min(a - cut, len(piece))]
    end = columns[min(max(b - cut, 0), len(piece))]
    return "".join(shown) + tail, begin, max(0, end - begin)


def _draw(ch: str, column: int) -> str:
    if ch == "\t":
        return " " * (TAB - column % TAB)
    return clean(ch)


def clean(text: str) -> str:
    """The text without anything that would steer a terminal: control, format and lone surrogate characters become a middle dot."""
    if text.isascii() and text.isprintable():
        return text
    return "".join("·" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in text)


def width_of(text: str) -> int:
    """Terminal columns of a text."""
    if text.isascii():
        return len(text)
    total = 0
    for ch in text:
        if unicodedata.combining(ch):
            continue
        total += 2 if unicodedata.east_asian_width(ch) in "WF" else 1
    return total
