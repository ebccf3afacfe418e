"""``surgery fix``: rewrites a spec of an older edition, and applies the fixes that never change a meaning."""

from __future__ import annotations

import argparse
import difflib

from surgery.cli.check import read
from surgery.cli.command import FINDINGS, FINE, SET, Argument, Command, Option, parse_sets
from surgery.cli.report import Report, result, write_file
from surgery.core.diagnostics import Diagnostic, Fix, SurgeryError
from surgery.core.source import Source

ROUNDS = 10


def fixes_of(source: Source, diagnostics: list[Diagnostic], unsafe: bool) -> list[Fix]:
    """The fixes of this text that may be applied together: of overlapping ones the first."""
    out: list[Fix] = []
    offered = [d.fix for d in diagnostics if d.fix is not None and d.fix.span.source is source and (d.fix.safe or unsafe)]
    for fix in sorted(offered, key=lambda f: (f.span.start, f.span.end)):
        if not out or fix.span.start >= out[-1].span.end:
            out.append(fix)
    return out


def apply(text: str, fixes: list[Fix]) -> str:
    for fix in reversed(fixes):
        text = text[: fix.span.start] + fix.replacement + text[fix.span.end :]
    return text


def fixed(source: Source, sets: dict[str, str], unsafe: bool) -> tuple[Source, int, list[Diagnostic]]:
    """The fixed source, how many fixes were made, and what is left to report."""
    from surgery.front import check_source

    count = 0
    for _ in range(ROUNDS):
        _, found = check_source(source, sets)
        fixes = fixes_of(source, found, unsafe)
        if not fixes:
            break
        count += len(fixes)
        source = Source(source.name, apply(source.text, fixes))
    else:
        _, found = check_source(source, sets)
    return source, count, found


def run(args: argparse.Namespace) -> int:
    report: Report = args.report
    sets = parse_sets(args.set)
    left: list[Diagnostic] = []
    files = []
    worst = FINE
    for path in args.spec:
        try:
            before = read(path)
            after, count, found = fixed(before, sets, args.unsafe)
        except SurgeryError as e:
            left += e.diagnostics
            worst = max(worst, e.exit_code)
            continue
        left += found
        files.append({"file": path, "fixes": count})
        if args.diff:
            if not report.machine:
                result("".join(difflib.unified_diff(before.text.splitlines(True), after.text.splitlines(True), path, f"{path} (fixed)")))
        elif path == "-":
            result(after.text)
        elif count:
            write_file(path, after.text)
        report.say(f"{path}: {count} {'fix' if count == 1 else 'fixes'}")
    report.diagnostics(left)
    if report.machine:
        report.document(left, files=files)
    changed = args.diff and any(f["fixes"] for f in files)
    return max(worst, report.code(left), FINDINGS if changed else FINE)


COMMAND = Command(
    "fix",
    "rewrite specs of older editions and apply the fixes that diagnostics offer",
    run,
    (Argument("spec", "spec files; - is the standard input", "+"),),
    (
        Option("unsafe", "apply also fixes that guess a meaning, such as the nearest name"),
        Option("diff", "write nothing; show what would change"),
        SET,
    ),
    description="Applies the fixes that never change what a spec means. Edition 1 is the first edition: there is no older one to rewrite from yet.",
    examples=("surgery fix train.surg", "surgery fix --unsafe --diff train.surg"),
)
