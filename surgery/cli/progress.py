"""Progress on a terminal: one line with a spinner; nothing in logs, with --quiet, or in a machine format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from surgery.cli.report import Report

Progress = Callable[[str], None]


@contextmanager
def progress(report: Report) -> Iterator[Progress]:
    """A function to call with what happens now. The line disappears at the end."""
    if report.quiet or report.machine or not sys.stderr.isatty():
        yield lambda text: None
        return
    from rich.console import Console

    with Console(stderr=True, no_color=not report.colors(sys.stderr)).status("starting", spinner="line") as status:

        def step(text: str) -> None:
            status.update(text)

        yield step
