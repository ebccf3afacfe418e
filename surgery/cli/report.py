"""Where things go: results to stdout, diagnostics to stderr, in the format and colour that were asked for.

In the machine formats json and sarif the result is one document on stdout that holds the diagnostics too, as the JSON of ``plan`` does.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from surgery.cli.command import FAULT, FINDINGS, FINE
from surgery.core.diagnostics import Diagnostic, Severity, SurgeryError, fail


class Report:
    """Output of one run of one verb."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.documented = False
        self.configure(args)

    def configure(self, args: argparse.Namespace) -> None:
        """Takes format, colours, quiet and deny from parsed arguments."""
        self.format: str = getattr(args, "format", "text") or "text"
        self.quiet: bool = bool(getattr(args, "quiet", False))
        self.color: str = getattr(args, "color", "auto") or "auto"
        self.deny: bool = getattr(args, "deny", None) == "warnings"

    @property
    def machine(self) -> bool:
        return self.format in ("json", "sarif")

    def colors(self, stream: IO[str]) -> bool:
        if self.color != "auto":
            return self.color == "always"
        if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
            return False
        return stream.isatty()

    def graded(self, diagnostics: Iterable[Diagnostic]) -> list[Diagnostic]:
        """The diagnostics, warnings as errors with ``--deny warnings``."""
        found = list(diagnostics)
        if not self.deny:
            return found
        return [replace(d, severity=Severity.ERROR) if d.severity is Severity.WARNING else d for d in found]

    def diagnostics(self, diagnostics: Iterable[Diagnostic]) -> None:
        """Writes diagnostics of the formats for people and for GitHub to stderr; a document format holds them in its document."""
        found = self.graded(diagnostics)
        if not found or self.machine:
            return
        if self.format == "github":
            from surgery.cli.views import github

            write(sys.stderr, github.render(found))
            return
        from surgery.cli.views import text

        write(sys.stderr, text.render(found, color=self.colors(sys.stderr)))
        if not self.quiet and text.summary(found):
            write(sys.stderr, f"\n{text.summary(found)}\n")

    def document(self, diagnostics: Iterable[Diagnostic], result: dict[str, Any] | None = None, **more: Any) -> None:
        """Writes the one document of a machine format. ``result`` is a verb's own JSON object with its own schema."""
        found = self.graded(diagnostics)
        self.documented = True
        if self.format == "sarif":
            from surgery.cli.explaining import headlines
            from surgery.cli.views import sarif

            write(sys.stdout, sarif.render(found, headlines()))
            return
        from surgery.cli.views import json

        if result is not None:
            write(
                sys.stdout,
                json.dumps({**result, "diagnostics": [d.as_json() for d in found]} if found or "diagnostics" in result else result),
            )
        else:
            write(sys.stdout, json.render(found, **more))

    def failure(self, error: SurgeryError) -> int:
        """Reports an error that ended the verb and gives its exit code."""
        if self.machine:
            if not self.documented:
                self.document(error.diagnostics)
        else:
            self.diagnostics(error.diagnostics)
        return error.exit_code if error.exit_code else FINDINGS

    def say(self, text: str) -> None:
        """A line about what happened, for people: stderr, not with --quiet and not beside a document."""
        if not self.quiet and not self.machine:
            write(sys.stderr, text.rstrip("\n") + "\n")

    def code(self, diagnostics: Iterable[Diagnostic]) -> int:
        return FINDINGS if any(d.is_error for d in self.graded(diagnostics)) else FINE


def write(stream: IO[str], text: str) -> None:
    """Writes text to a stream whose encoding may not know every character."""
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = getattr(stream, "encoding", None) or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


def result(text: str) -> None:
    """A result for people or programs: stdout."""
    write(sys.stdout, text if text.endswith("\n") or not text else text + "\n")


def write_file(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a file as a whole: a temporary sibling, then a rename, mode kept. Raises S0910 when that cannot be done."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "w", encoding="utf-8", newline="") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            if target.exists():
                os.chmod(temporary, target.stat().st_mode & 0o7777)
            os.replace(temporary, target)
        finally:
            if temporary.exists():
                temporary.unlink()
    except OSError as e:
        raise cannot_write(path, e) from e


def cannot_write(path: str | os.PathLike[str], fault: OSError) -> SurgeryError:
    reason = (fault.strerror or str(fault)).lower()
    return fail(
        "S0910", f"cannot write {os.fspath(path)}: {reason}", help="check the folder, its permissions and the space left", exit_code=FAULT
    )
