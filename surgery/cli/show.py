"""``surgery show``: the anatomy of a model or artifact, its sizes, and which line made what."""

from __future__ import annotations

import argparse

from surgery.cli.command import ALLOW_CODE, NO_CACHE, Argument, Command, Option
from surgery.cli.progress import progress
from surgery.cli.report import Report
from surgery.cli.showing import present


def run(args: argparse.Namespace) -> int:
    report: Report = args.report
    with progress(report) as step:
        step("opening the model")
        from surgery import driver

        shown = driver.show(
            args.model,
            blame=args.blame or (bool(args.name) and not args.dims),
            only=args.name or "",
            dims=args.dims,
            allow_code=args.allow_code,
            use_cache=not args.no_cache,
        )
    return present(report, shown)


COMMAND = Command(
    "show",
    "show the parts of a model or artifact, and which line made what",
    run,
    (
        Argument("model", "an artifact, a checkpoint folder, a hub name, config:PATH or minilm"),
        Argument(
            "name", "only the history (or with --dims the classes) of the tensors with this name; * stands for anything", "?", files=False
        ),
    ),
    (
        Option(
            "blame", "for each changed module and tensor: the statement that made it, and the expression of its value (`blame` in JSON)"
        ),
        Option("dims", "for each parameter: the dimension classes of its axes, what uses them and which of them are fixed"),
        NO_CACHE,
        ALLOW_CODE,
    ),
    examples=(
        "surgery show minilm",
        "surgery show build/minilm-lora --blame",
        "surgery show build/minilm-lora '*.query.*'",
        "surgery show minilm --dims '*.layer.0.*'",
        "surgery show ./llama-checkpoint --format json",
    ),
)
