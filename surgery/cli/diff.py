"""``surgery diff``: two specs, plans or artifacts against each other."""

from __future__ import annotations

import argparse

from surgery.cli.command import ALLOW_CODE, FINDINGS, NO_CACHE, Argument, Command, Option
from surgery.cli.progress import progress
from surgery.cli.report import Report
from surgery.cli.showing import present
from surgery.core.diagnostics import fail


def run(args: argparse.Namespace) -> int:
    report: Report = args.report
    try:
        limit = int(args.threshold)
    except ValueError:
        raise fail(
            "S0911", f"`--threshold {args.threshold}` is not a number", help="write for example `--threshold 10`", exit_code=2
        ) from None
    with progress(report) as step:
        step("opening both")
        from surgery import driver

        found = driver.diff(args.a, args.b, allow_code=args.allow_code, use_cache=not args.no_cache)
    code = present(report, found)
    return FINDINGS if len(found.rows) > limit else code


COMMAND = Command(
    "diff",
    "compare two specs, plans, models or artifacts",
    run,
    (Argument("a", "the first: a spec, a plan as JSON, a model or an artifact"), Argument("b", "the second, of the same sort")),
    (
        Option("threshold", "how many differences are allowed; more give exit code 1", "COUNT", "0"),
        NO_CACHE,
        ALLOW_CODE,
    ),
    examples=("surgery diff old.surg new.surg", "surgery diff minilm build/minilm-lora", "surgery diff base.json plan.json --threshold 10"),
)
