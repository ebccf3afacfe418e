"""Progress on a terminal: a spinner, and a bar with an estimate where the amount of work is known; nothing in logs, with
--quiet, or in a machine format."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from surgery.cli.report import Report

Progress = Callable[..., None]


@contextmanager
def progress(report: Report) -> Iterator[Progress]:
    """A function to call with what happens now, and with ``(text, done, total)`` for a bar. Everything disappears at the end."""
    if report.quiet or report.machine or not sys.stderr.isatty():
        yield lambda text, done=0, total=0: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, no_color=not report.colors(sys.stderr))
    columns = (SpinnerColumn("line"), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("starting", total=None)

        def step(text: str, done: float = 0, total: float = 0) -> None:
            if bars.tasks[0].description != text:
                bars.reset(task, description=text, total=total or None)
            bars.update(task, description=text, completed=done, total=total or None)

        yield step
