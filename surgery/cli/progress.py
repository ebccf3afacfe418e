"""Progress on a terminal: a bar with an estimate where the amount of work is known, else a spinner; nothing in logs, with
--quiet, or in a machine format."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from surgery.cli.report import Report
from surgery.core.progress import Bytes, Progress, listening, silent

if TYPE_CHECKING:
    from rich.progress import Task


def shown(report: Report) -> bool:
    """Whether anybody would see a bar: a terminal that can move its cursor, not one that a CI service records."""
    if report.quiet or report.machine or not sys.stderr.isatty():
        return False
    return os.environ.get("TERM") != "dumb" and os.environ.get("CI", "").lower() in ("", "0", "false")


@contextmanager
def progress(report: Report) -> Iterator[Progress]:
    """A function to call with what happens now, and with ``(text, done, total)`` for a bar. It hears, too, what is reported deep
    inside (:mod:`surgery.core.progress`). Everything disappears at the end."""
    if not shown(report):
        yield silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(amount(task.completed, task.total, bool(task.fields.get("bytes"))))

    # the stream of now: tracers that redirect sys.stderr for a while must not swallow the bar, nor draw it into their own logs
    console = Console(file=sys.stderr, force_terminal=True, no_color=not report.colors(sys.stderr))
    columns = (SpinnerColumn("line"), TextColumn("{task.description}"), BarColumn(), Amount(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True, redirect_stderr=False, redirect_stdout=False) as bars:
        task = bars.add_task("starting", total=None)

        def step(text: str, done: float = 0, total: float = 0) -> None:
            fields: dict[str, Any] = {"bytes": isinstance(total, Bytes)}
            if bars.tasks[0].description != text:
                bars.reset(task, description=text, total=total or None, **fields)
            bars.update(task, description=text, completed=done, total=total or None, **fields)
            if total and done >= total:
                bars.refresh()  # work that was quick is seen, too

        with listening(step):
            yield step


def amount(done: float, total: float | None, in_bytes: bool) -> str:
    """``3 of 12``, ``1.2 of 4.5 GiB``; a count too long to read is a percentage, no total nothing."""
    if not total:
        return ""
    if in_bytes:
        unit, size = next((u, s) for u, s in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("bytes", 1)) if total >= s or s == 1)
        digits = 0 if size == 1 else 1
        return f"{done / size:.{digits}f} of {total / size:.{digits}f} {unit}"
    return f"{done:,.0f} of {total:,.0f}" if total < 1_000_000 else f"{100 * done / total:.0f}%"
