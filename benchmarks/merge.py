"""Merging sharded checkpoints beside mergekit, folding a LoRA beside peft, and a plain copy of the same bytes beside both.

Every run is a process of its own and the arms take turns; medians count. Two times are told: of the whole process, and of what comes after its imports.
Two peaks: the highest resident memory after the imports, in which pages of mapped files count, and the highest memory that is no file's. surgery runs
with an empty cache of captures each time (``captured``: with the capture of this architecture and the hashes of the checkpoints at hand, as in every
further run), and ends with its output flushed to the storage, as the copy does; mergekit and peft do not flush. ``by hand`` does the arithmetic alone
as fast as this machine can (``merge_by_hand``): nothing is planned, hashed, proved or read back.

mergekit wants packages of other versions, so it lives in an environment of its own:

    python -m venv mk && mk/bin/pip install torch==2.13.0 mergekit
    python -m benchmarks.merge methods --mergekit mk/bin/python --rounds 3

``lora`` folds one LoRA (rank 16 on every projection) into one checkpoint: surgery, peft, a short loop written by hand, a fast one, and the copy of one.
``seven`` merges two checkpoints of the shape of a 7B model and tells the memory. They are written with holes, so that they take little space on
disk; the result takes 13 GB, and is deleted.

    python -m benchmarks.merge lora --rounds 3
    python -m benchmarks.merge seven --methods linear ties
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.apart import Run, apart
from benchmarks.common import ROOT, table
from benchmarks.merge_models import SHARD, write_adapter, write_models, write_seven

OURS = {
    "linear": "merge linear of one, two",
    "slerp": "merge slerp(t = 0.5) of one, two",
    "ties": "merge ties(density = 50%, trim = tensor, elect = weighted, divide = weight) of one, two",
    "dare_ties": "merge dare_ties(density = 50%, rescale = l1, elect = weighted, divide = none) of one, two",
}
YOUNG = 61
"""Seconds for which hashes of a file that was written are not kept: the checkpoints of those who merge are older."""
WITH_BASE = ("ties", "dare_ties")
THEIRS = {
    "linear": {"merge_method": "linear", "models": [{"model": "one", "parameters": {"weight": 1}}, {"model": "two", "parameters": {"weight": 1}}]},
    "slerp": {"merge_method": "slerp", "base_model": "one", "models": [{"model": "one"}, {"model": "two"}], "parameters": {"t": 0.5}},
    "ties": {
        "merge_method": "ties", "base_model": "base", "parameters": {"density": 0.5, "weight": 1.0},
        "models": [{"model": "one"}, {"model": "two"}],
    },
    "dare_ties": {
        "merge_method": "dare_ties", "base_model": "base", "parameters": {"density": 0.5, "weight": 1.0},
        "models": [{"model": "one"}, {"model": "two"}],
    },
}  # fmt: skip
IMPORTS = (
    "surgery.cli.main surgery.cli.compile_ surgery.cli.progress surgery.driver surgery.backends.to_transformers surgery.merging_adapters "
    "surgery.model.capture.cache surgery.model.checkpoint_bind surgery.passes.merge surgery.passes.adapt surgery.passes.kinds.fold "
    "sympy.tensor.tensor sympy.combinatorics transformers.models.llama.modeling_llama surgery.passes.fold.all surgery.passes.kinds.state "
    "surgery.passes.adapt.bitfit surgery.passes.adapt.dora surgery.passes.adapt.lora surgery.passes.adapt.pissa surgery.passes.adapt.rslora "
    "surgery.passes.adapt.splopa surgery.passes.adapt.splora surgery.passes.adapt.sppara surgery.passes.merge.linear surgery.passes.merge.slerp "
    "surgery.passes.merge.ties surgery.passes.merge.dare_ties"
)
"""All that a captured run imports, so that no import counts as work."""


class Bench:
    """One folder with checkpoints, and the arms that run in it."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.env = {"PYTHONPATH": str(ROOT), "SURGERY_CACHE": str(folder / "cache")}

    def run(self, python: str, imports: str, module: str, *args: str) -> Run:
        return apart(python, imports, module, *args, folder=self.folder, threads=self.threads, env=self.env)

    def clear(self, name: str) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def surgery(self, spec: str, *, captured: bool = False) -> Run:
        if not captured:
            self.clear("cache")
        self.clear("ours")
        (self.folder / "ours.surg").write_text(f'surg 1\n{spec}\nemit transformers to "ours"\n')
        return self.run(sys.executable, IMPORTS, "surgery", "compile", "ours.surg", "--quiet")

    def merge(self, method: str, captured: bool = False) -> Run:
        first, two = ('model "base"\ncheckpoint one = load("one")', 'checkpoint two = load("two")')
        if method not in WITH_BASE:
            first = 'model "one" as one'
        return self.surgery(f"{first}\n{two}\n{OURS[method]}", captured=captured)

    def fold(self, captured: bool = False) -> Run:
        return self.surgery('model "one"\nadapter lora = load("lora")\nmerge linear of lora', captured=captured)

    def mergekit(self, python: str, method: str) -> Run:
        (self.folder / "theirs.yml").write_text(json.dumps({**THEIRS[method], "dtype": "bfloat16"}))
        self.clear("theirs")
        options = ("--no-copy-tokenizer", "--lazy-unpickle", "--no-write-model-card")
        imports = "torch transformers mergekit.scripts.run_yaml transformers.models.llama.modeling_llama"
        return self.run(python, imports, "mergekit.scripts.run_yaml", "theirs.yml", "theirs", *options)

    def by_hand(self, way: str) -> Run:
        self.clear("theirs")
        imports = "torch safetensors.torch" + (" peft transformers.models.llama.modeling_llama" if way == "peft" else "")
        second = "two" if way in ("linear", "slerp") else "lora"
        return self.run(sys.executable, imports, "benchmarks.merge_by_hand", way, "one", second, "theirs", str(SHARD))

    def copy(self, *names: str) -> Run:
        """Reading and writing the bytes of some checkpoints, as a plain copy does, to disk."""
        self.clear("copy")
        before = time.perf_counter()
        for name in names:
            shutil.copytree(self.folder / name, self.folder / "copy" / name)
        subprocess.run(["sync", "-f", str(self.folder / "copy")], check=True)
        seconds = time.perf_counter() - before
        self.clear("copy")
        return Run(seconds, seconds, 0.0, 0.0, 0.0, 0.0)


def rounds(arms: dict[str, Callable[[], Run]], count: int) -> dict[str, list[Run]]:
    """The arms in turn, ``count`` times. What one arm left to be written goes to the disk before the next one begins."""
    found: dict[str, list[Run]] = {name: [] for name in arms}
    for _ in range(count):
        for name, run in arms.items():
            os.sync()
            found[name].append(run())
    return found


def shown(found: dict[str, list[Run]]) -> str:
    """One line an arm: medians."""
    lines = [("what", "s", "s after imports", "CPU s after imports", "MiB at imports", "peak MiB", "MiB no file's")]
    for name, runs in found.items():
        columns = [[getattr(r, field) for r in runs] for field in ("whole", "after", "work", "start", "peak", "private")]
        middle = [statistics.median(c) for c in columns]
        lines.append((name, *(f"{m:.2f}" for m in middle[:3]), *(f"{m:.0f}" if m else "" for m in middle[3:])))
    return table(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", nargs="?", choices=("methods", "lora", "seven"), default="methods")
    parser.add_argument("--mergekit", help="python of an environment with mergekit; without it only surgery and the copy are measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="*", default=list(OURS), choices=list(OURS))
    parser.add_argument("--layers", type=int, default=32, help="layers of `seven`")
    args = parser.parse_args()
    kit = os.path.abspath(args.mergekit) if args.mergekit else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that gigabytes of checkpoints do not stay
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), args.threads)
        arms: dict[str, Callable[[], Run]] = {}
        if args.what == "seven":
            size = write_seven(bench.folder, args.layers)
            free = shutil.disk_usage(bench.folder).free
            print(f"{args.layers} layers: {size / 2**30:.1f} GiB a checkpoint, {free / 2**30:.0f} GiB free")
            if free < 1.2 * size:
                raise SystemExit("the result would not fit on the disk; take fewer --layers")
            arms = {f"{m}: surgery": lambda m=m: bench.merge(m) for m in args.methods}  # type: ignore[misc]
            args.rounds = 1
        else:
            write_models(bench.folder)
            written = time.monotonic()
        if args.what == "methods":
            arms["copy of both"] = lambda: bench.copy("one", "two")
            for method in args.methods:
                arms[f"{method}: surgery"] = lambda m=method: bench.merge(m)  # type: ignore[misc]
                arms[f"{method}: surgery, captured"] = lambda m=method: bench.merge(m, captured=True)  # type: ignore[misc]
                if method in ("linear", "slerp"):
                    arms[f"{method}: by hand"] = lambda m=method: bench.by_hand(m)  # type: ignore[misc]
                if kit:
                    arms[f"{method}: mergekit"] = lambda m=method: bench.mergekit(kit, m)  # type: ignore[misc]
        elif args.what == "lora":
            write_adapter(bench.folder / "lora", bench.folder / "one")
            arms["copy of one"] = lambda: bench.copy("one")
            arms["surgery"] = bench.fold
            arms["surgery, captured"] = lambda: bench.fold(captured=True)
            arms |= {way: lambda w=way: bench.by_hand(w) for way in ("peft", "streamed")}  # type: ignore[misc]
            arms["by hand"] = lambda: bench.by_hand("fold")
        if args.what != "seven":
            time.sleep(max(0.0, written + YOUNG - time.monotonic()))
        print(shown(rounds(arms, args.rounds)))


if __name__ == "__main__":
    main()
