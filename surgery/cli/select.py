"""``surgery select``: what a selector names in a model."""

from __future__ import annotations

import argparse

from surgery.cli.command import ALLOW_CODE, NO_CACHE, Argument, Command, Option
from surgery.cli.progress import progress
from surgery.cli.report import Report
from surgery.cli.showing import present
from surgery.core.diagnostics import fail


def run(args: argparse.Namespace) -> int:
    report: Report = args.report
    if not args.model:
        raise fail("S0911", "surgery select: no model", help=f"write `surgery select '{args.selector}' --model MODEL`", exit_code=2)
    with progress(report) as step:
        step("opening the model")
        from surgery import driver

        found = driver.select(args.selector, args.model, dims=args.dims, allow_code=args.allow_code, use_cache=not args.no_cache)
    return present(report, found)


COMMAND = Command(
    "select",
    "list what a selector names in a model",
    run,
    (Argument("selector", "a selector, in quotes for the shell", files=False),),
    (
        Option("model", "the model, as for `plan`", "MODEL"),
        Option("dims", "the dimension classes of the sites, and everything that goes together with one unit of each"),
        NO_CACHE,
        ALLOW_CODE,
    ),
    examples=("surgery select 'layers[*].attn.{q, v}' --model minilm", "surgery select 'layers[-1].**' --model build/minilm-lora"),
)
