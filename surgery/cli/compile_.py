"""``surgery compile``: does what ``plan`` shows, measures every claim, and writes the outputs whole or not at all."""

from __future__ import annotations

import argparse
from typing import Any

from surgery.cli.check import read
from surgery.cli.command import ALLOW_CODE, MODEL, NO_CACHE, SET, Argument, Command, Option, parse_sets
from surgery.cli.progress import progress
from surgery.cli.report import Report, result


def run(args: argparse.Namespace) -> int:
    report: Report = args.report
    sets = parse_sets(args.set)
    spec = read("-") if args.spec == "-" else args.spec
    with progress(report) as step:
        from surgery import driver

        done = driver.compile_spec(
            spec, args.model, out=args.out, set=sets, locked=args.locked, force=args.force,
            allow_code=args.allow_code, use_cache=not args.no_cache, progress=step,
        )  # fmt: skip
    found = list(done.plan.diagnostics)
    report.diagnostics(found)
    if report.machine:
        report.document(found, document(done))
        return report.code(found)
    report.say(done.plan.render_text())
    for certificate in done.certificates:
        report.say(_line(certificate))
    for note in done.notes:
        report.say(f"note: {note}")
    for path in done.artifacts:
        result(str(path))
    if done.lock is not None:
        report.say(f"lock: {done.lock}")
    return report.code(found)


def document(done: Any) -> dict[str, Any]:
    return {
        "schema": "surgery.compile/1",
        "plan": done.plan.as_json(),
        "artifacts": [str(p) for p in done.artifacts],
        "certificates": done.certificates,
        "notes": list(done.notes),
        "lock": str(done.lock) if done.lock is not None else None,
    }


def _line(certificate: dict[str, Any]) -> str:
    """``measured: same_output at init, error 0, limit 1e-06``: the scalars of a certificate in its own order."""
    parts = []
    for key, value in certificate.items():
        if isinstance(value, float):
            parts.append(f"{key} {value:.3g}")
        elif isinstance(value, str | int) and not isinstance(value, bool):
            parts.append(f"{value}" if key in ("claim", "check", "name", "what") else f"{key} {value}")
    return "measured: " + ", ".join(parts)


COMMAND = Command(
    "compile",
    "do what the plan shows, verify it, and write the outputs",
    run,
    (Argument("spec", "the spec file; - is the standard input"), MODEL),
    (
        SET,
        Option("out", "folder that the paths of `emit` are relative to (default: the working directory)", "DIR"),
        Option("locked", "refuse when anything differs from the lock file beside the spec"),
        Option("force", "replace outputs that surgery did not write from the same spec"),
        NO_CACHE,
        ALLOW_CODE,
    ),
    description="Does what `surgery plan` shows, measures every claim and writes each output whole or not at all. The paths of the outputs are printed to the standard output.",
    examples=("surgery compile specs/quickstart.surg", "surgery compile shrink.surg ./llama-checkpoint --out build --locked"),
)
