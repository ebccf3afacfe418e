"""``surgery fmt``: one layout for all specs."""

from __future__ import annotations

import argparse
import difflib
import os

from surgery.cli.check import read
from surgery.cli.command import FINDINGS, FINE, Argument, Command, Option
from surgery.cli.report import Report, result, write_file
from surgery.core.catalogue import load
from surgery.core.diagnostics import Diagnostic, SurgeryError


def specs_in(paths: list[str]) -> list[str]:
    """The paths with folders replaced by the .surg files in them, sorted."""
    out: list[str] = []
    for path in paths:
        if os.path.isdir(path):
            for folder, _, names in sorted(os.walk(path)):
                out += [os.path.join(folder, n) for n in sorted(names) if n.endswith(".surg")]
        else:
            out.append(path)
    return out


def is_share(verb: str, method: str, parameter: str) -> bool:
    """Whether a parameter is a share, so that ``fmt`` writes a bare 0.3 as 30%."""
    info = load().get(verb, method)
    found = info.param(parameter) if info is not None else None
    return found is not None and found.unit == "%"


def run(args: argparse.Namespace) -> int:
    from surgery.grammar.formatter import format_text

    report: Report = args.report
    found: list[Diagnostic] = []
    changed: list[str] = []
    worst = FINE
    for path in specs_in(args.spec):
        try:
            source = read(path)
            new, problems = format_text(source, is_share)
        except SurgeryError as e:
            found += e.diagnostics
            worst = max(worst, e.exit_code)
            continue
        found += problems
        if any(d.is_error for d in problems):
            worst = max(worst, FINDINGS)
        if new != source.text:
            changed.append(path)
        if args.diff:
            if not report.machine:
                rows = difflib.unified_diff(source.text.splitlines(True), new.splitlines(True), path, f"{path} (formatted)")
                result("".join(r if r.endswith("\n") else r + "\n\\ no newline at end of file\n" for r in rows))
        elif path == "-" and not args.check:
            result(new)
        elif not args.check and new != source.text:
            write_file(path, new)
    report.diagnostics(found)
    only_look = args.check or args.diff
    if report.machine:
        report.document(found, changed=changed, written=not only_look)
    else:
        for path in changed:
            if path != "-" or only_look:
                report.say(f"{'not formatted' if only_look else 'formatted'}: {'<stdin>' if path == '-' else path}")
    return max(worst, FINDINGS if only_look and changed else FINE)


COMMAND = Command(
    "fmt",
    "lay out specs in the one way, in place",
    run,
    (Argument("spec", "spec files or folders of them; - reads the standard input and writes the standard output", "+"),),
    (
        Option("check", "write nothing; exit code 1 when a file is not formatted"),
        Option("diff", "write nothing; show what would change, exit code 1 when something would"),
    ),
    examples=("surgery fmt specs", "surgery fmt --check specs", "surgery fmt - < draft.surg"),
)
