"""``surgery check``: syntax, names, parameters, units and order, without a model and without torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from surgery.cli.command import FAULT, SET, Argument, Command, parse_sets
from surgery.cli.report import Report
from surgery.core.diagnostics import Diagnostic, SurgeryError
from surgery.core.source import Source


def read(path: str) -> Source:
    """The source of a path; ``-`` is the standard input. Raises SurgeryError (exit code 2)."""
    from surgery.grammar.parser import decode, read_source

    return decode(sys.stdin.buffer.read(), "<stdin>") if path == "-" else read_source(Path(path))


def run(args: argparse.Namespace) -> int:
    from surgery.front import check_source

    report: Report = args.report
    sets = parse_sets(args.set)
    found: list[Diagnostic] = []
    files = []
    worst = 0
    for path in args.spec:
        try:
            _, mine = check_source(read(path), sets)
        except SurgeryError as e:
            mine, worst = list(e.diagnostics), max(worst, e.exit_code)
        graded = report.graded(mine)
        files.append({"file": path, "ok": not any(d.is_error for d in graded)})
        found += mine
    code = FAULT if worst == FAULT else report.code(found)
    report.diagnostics(found)
    if report.machine:
        report.document(found, files=files)
    elif code == 0 and not found:
        report.say("no problems found" if len(files) == 1 else f"no problems found in {len(files)} files")
    return code


COMMAND = Command(
    "check",
    "report every mistake in specs; needs no model",
    run,
    (Argument("spec", "spec files; - is the standard input", "+"),),
    (SET,),
    examples=(
        "surgery check shrink.surg",
        "surgery check specs/*.surg --format github --deny warnings",
        "surgery check train.surg --set r=16",
    ),
)
