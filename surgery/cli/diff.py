"""``surgery diff``: two specs, plans or artifacts against each other."""

from __future__ import annotations

import argparse

from surgery.cli.command import ALLOW_CODE, NO_CACHE, Argument, Command, Option
from surgery.cli.progress import progress
from surgery.cli.report import Report
from surgery.cli.showing import present
from surgery.core.diagnostics import fail


def run(args: argparse.Namespace) -> int:
    report: Report = args.report
    limit = None
    if args.threshold is not None:
        try:
            text = args.threshold.strip()
            limit = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            raise fail("S0911", f"`--threshold {args.threshold}` is not a share", help="write `--threshold 1%`", exit_code=2) from None
    with progress(report) as step:
        from surgery import driver

        found = driver.diff(args.a, args.b, threshold=limit, allow_code=args.allow_code, use_cache=not args.no_cache, progress=step)
    return present(report, found)


COMMAND = Command(
    "diff",
    "compare two specs, plans, models or artifacts",
    run,
    (Argument("a", "the first: a spec, a plan as JSON, a model or an artifact"), Argument("b", "the second, of the same sort")),
    (
        Option(
            "threshold", "how far sizes may differ, as a share: 0 fails on any difference; without it differences are only shown", "SHARE"
        ),
        NO_CACHE,
        ALLOW_CODE,
    ),
    examples=("surgery diff old.surg new.surg", "surgery diff minilm build/minilm-lora", "surgery diff base.json plan.json --threshold 1%"),
)
