"""``surgery plan``: everything a spec would do to a model, from its config and tensor headers."""

from __future__ import annotations

import argparse

from surgery.cli.check import read
from surgery.cli.command import ALLOW_CODE, FINDINGS, FINE, MODEL, NO_CACHE, SET, Argument, Command, Option, parse_sets
from surgery.cli.progress import progress
from surgery.cli.report import Report, result, write_file


def run(args: argparse.Namespace) -> int:
    report: Report = args.report
    sets = parse_sets(args.set)
    spec = read("-") if args.spec == "-" else args.spec
    with progress(report) as step:
        from surgery import driver

        plan = driver.plan(spec, args.model, set=sets, allow_code=args.allow_code, use_cache=not args.no_cache, progress=step)
    if args.out:
        from surgery.cli.views import json

        write_file(args.out, json.dumps(plan.as_json()))
    report.diagnostics(plan.diagnostics)
    if report.machine:
        report.document(plan.diagnostics, plan.as_json())
    elif plan.steps or plan.totals is not None:
        result(plan.render_text())
    if any(d.is_error for d in report.graded(plan.diagnostics)):
        return FINDINGS
    return FINE if plan.ok else FINDINGS


COMMAND = Command(
    "plan",
    "show everything that a spec would do, without reading a weight",
    run,
    (Argument("spec", "the spec file; - is the standard input"), MODEL),
    (SET, Option("out", "write the plan as JSON to this file as well", "FILE"), NO_CACHE, ALLOW_CODE),
    examples=(
        "surgery plan shrink.surg",
        "surgery plan shrink.surg ./llama-checkpoint --set r=16",
        "surgery plan shrink.surg --format json --out plan.json",
    ),
)
