"""``surgery bench``: artifacts and a model beside each other: time, memory, predicted cost."""

from __future__ import annotations

import argparse

from surgery.cli.command import ALLOW_CODE, NO_CACHE, Argument, Command, Option
from surgery.cli.progress import progress
from surgery.cli.report import Report
from surgery.cli.showing import present


def run(args: argparse.Namespace) -> int:
    report: Report = args.report
    from surgery.benching_numbers import names, number, numbers

    batches, lengths, outputs = numbers(args.batch, "batch"), numbers(args.length, "length"), numbers(args.outputs, "outputs")
    prompts = [] if args.prompts == "none" else numbers(args.prompts, "prompts")
    threads = number(args.threads, "threads") if args.threads else None
    rounds, arms = number(args.rounds, "rounds"), names(args.arms)
    with progress(report) as step:
        step("opening what is to be compared")
        from surgery.benching import bench

        found = bench(
            args.artifacts, args.against, batches=batches, lengths=lengths, threads=threads, rounds=rounds, arms=arms, prompts=prompts, outputs=outputs,
            memory=not args.no_memory, allow_code=args.allow_code, use_cache=not args.no_cache, progress=step,
        )  # fmt: skip
    return present(report, found)


COMMAND = Command(
    "bench",
    "time artifacts beside a model: which is best for which shape",
    run,
    (Argument("artifacts", "what `emit` wrote: torch or transformers folders, .onnx and .pt2 files; or models", "+"),),
    (
        Option("against", "a model or artifact to compare with; its arms come first", "MODEL"),
        Option("batch", "batch sizes, separated by commas", "LIST", "1,8"),
        Option("length", "sequence lengths, separated by commas", "LIST", "16,128"),
        Option("threads", "threads of every arm (default: all of the machine)", "COUNT"),
        Option("rounds", "how often the arms take turns at each shape", "COUNT", "15"),
        Option(
            "arms",
            "what is run of folders and models: eager, compile (torch.compile, takes minutes), plain (ONNX without fusion), none",
            "LIST",
            "eager,plain",
        ),
        Option("prompts", "prompt lengths of the idealised runtime; none leaves it out", "LIST", "1,16,32,64,128"),
        Option("outputs", "numbers of output tokens of the idealised runtime, for models with a cache", "LIST", "1,2,4,8"),
        Option("no-memory", "do not measure the memory of each arm in a process of its own"),
        NO_CACHE,
        ALLOW_CODE,
    ),
    description=(
        "Runs artifacts and models in turns on the same inputs and prints medians with their spread, peak memory, the predicted operations beside the measured time, "
        "and the idealised runtime. A .pt2 file is native code: name only files that you trust."
    ),
    examples=(
        "surgery bench build/minilm.onnx build/minilm.pt2 --against minilm --threads 2",
        "surgery bench build/small --against ./llama-checkpoint --batch 1 --length 128,512 --arms eager,compile,plain",
        "surgery bench build/small.onnx --format json --no-memory",
    ),
)
