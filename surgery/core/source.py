"""Source text and places in it.

A :class:`Source` is one file of text with a name to show; a :class:`Span` is a half-open range of
characters in it. Lines and columns are 1-based and count characters (not bytes), as editors do.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import PurePath


def portable(name: str) -> str:
    """A path or model reference as it may stand in what is written to disk: an absolute path keeps its last part only, so that
    the same inputs give the same bytes in every folder and on every machine (``config:/home/x/tiny.json`` -> ``config:tiny.json``)."""
    prefix, path = ("config:", name.removeprefix("config:")) if name.startswith("config:") else ("", name)
    return prefix + (PurePath(path).name if PurePath(path).is_absolute() else path)


@dataclass(frozen=True)
class Source:
    """One text with the name that diagnostics show for it (a path, ``<stdin>`` or ``<text>``)."""

    name: str
    text: str = field(repr=False)

    @cached_property
    def line_starts(self) -> list[int]:
        """Offset of the first character of each line."""
        starts = [0]
        find = self.text.find
        at = find("\n")
        while at >= 0:
            starts.append(at + 1)
            at = find("\n", at + 1)
        return starts

    def position(self, offset: int) -> tuple[int, int]:
        """1-based (line, column) of a character offset; past the end gives the end."""
        offset = max(0, min(offset, len(self.text)))
        line = bisect_right(self.line_starts, offset) - 1
        return line + 1, offset - self.line_starts[line] + 1

    def line(self, number: int) -> str:
        """Text of the 1-based line without its end of line; empty when there is none."""
        starts = self.line_starts
        if not 1 <= number <= len(starts):
            return ""
        end = starts[number] if number < len(starts) else len(self.text)
        return self.text[starts[number - 1] : end].rstrip("\r\n")


@dataclass(frozen=True)
class Span:
    """Half-open character range ``[start, end)`` of a source."""

    source: Source = field(repr=False)
    start: int
    end: int

    @property
    def line(self) -> int:
        return self.source.position(self.start)[0]

    @property
    def column(self) -> int:
        return self.source.position(self.start)[1]

    @property
    def end_line(self) -> int:
        return self.source.position(self.end)[0]

    @property
    def end_column(self) -> int:
        return self.source.position(self.end)[1]

    @property
    def text(self) -> str:
        return self.source.text[self.start : self.end]

    def to(self, other: Span) -> Span:
        """Smallest span that covers both."""
        return Span(self.source, min(self.start, other.start), max(self.end, other.end))

    def __str__(self) -> str:
        return f"{self.source.name}:{self.line}:{self.column}"


NOWHERE = Span(Source("<none>", ""), 0, 0)
"""The place of what no text caused (a command-line argument, a checkpoint file)."""
