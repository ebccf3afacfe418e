"""How fast emitted artifacts are beside eager PyTorch, torch.compile, the plain export, other optimizers, and the products alone.

    python -m benchmarks.inference minilm --work /tmp/inference [--peers PYTHON] [--threads 2] [--rounds 30]

Parts: minilm (three shapes), gpt2 and llama (prefill and one token with a cache), vit, pruned (half of the heads and feed-forward units of MiniLM, folded and
fused, beside the plain export of the whole), export (seconds to emit 12-layer models), all. ``--prepare`` makes the files of a part and times nothing. Arms take
turns in one process; medians count. Optimum and OpenVINO come from the Python that ``--peers`` names; what is missing is left out and said.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from benchmarks.common import table
from benchmarks.inference_arms import FLOORS, INT8, ORDER, OTHERS, OURS, Work, calls, error, ours, quiet
from benchmarks.inference_models import BERT_12, CASES, folder_of, seeded
from surgery.benching_turns import LONG, PAUSE, Timing, take_turns

ALLOWED = 1e-4
"""Largest difference of an arm's first output to eager's."""

SHAPE, FEWEST = 60.0, 5
"""Seconds that the turns of one shape may take, and rounds that they take all the same: a part of two large shapes ends within four minutes."""
SHORT = 20.0
"""Seconds that the turns of a shape take at least: calls of a few milliseconds scatter by a third, and only many of them tell arms a few hundredths apart."""


def measured(name: str, work: Work, rounds: int, wanted: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The rows of one model: every arm at every shape, with its ratio to the best of the others and to the floor."""
    case = CASES[name]
    rows: list[tuple[str, ...]] = []
    for shape in case.shapes:
        found = calls(case, shape, work, wanted)
        reference = found["eager"]() if "eager" in found else None
        errors, lasts = {}, {}
        for n, call in found.items():
            start = time.perf_counter()
            value = call()
            lasts[n] = time.perf_counter() - start
            if reference is not None and n not in FLOORS:
                errors[n] = error(reference, value)
        times = take_turns(found, affordable(rounds, lasts.values()))
        rows += _rows(shape.label, times, errors)
    return rows


def affordable(rounds: int, seconds: Iterable[float]) -> int:
    """As many of the rounds asked for as fit into :data:`SHAPE` seconds, when one run of each arm takes so long; never fewer than :data:`FEWEST`
    or than fill :data:`SHORT` seconds."""
    one = sum(t if t > LONG else 2 * t + PAUSE for t in seconds)
    return max(min(rounds, max(FEWEST, int(SHAPE / one))), int(SHORT / one))


def _rows(label: str, times: dict[str, Timing], errors: dict[str, float]) -> list[tuple[str, ...]]:
    rows = []
    best = {
        group: min((times[n].median for n in names if n in times and errors.get(n, 0.0) <= ALLOWED), default=None)
        for group, names in (("others", OTHERS), ("ours", OURS), ("floor", FLOORS))
    }
    for n, t in times.items():
        wrong = "" if n not in errors else f"{errors[n]:.1e}" + ("" if errors[n] <= ALLOWED else " (over 1e-4)")
        ratio = f"{t.median / best['others']:.3f}" if n == INT8 and best["others"] else ""
        rows.append((label, n, f"{1e3 * t.median:.2f}", f"{1e3 * t.low:.2f} to {1e3 * t.high:.2f}", wrong, ratio, ""))
    if best["ours"]:
        winner = next(n for n in OURS if n in times and times[n].median == best["ours"])
        others = f"{best['ours'] / best['others']:.3f}" if best["others"] else ""
        floor = f"{best['ours'] / best['floor']:.3f}" if best["floor"] else ""
        rows.append((label, f"best of ours: {winner}", f"{1e3 * best['ours']:.2f}", "", "", others, floor))
    return rows


HEAD = ("shape", "arm", "ms", "middle half", "difference to eager", "ours / best other", "ours / floor")


def pruned(work: Work, rounds: int) -> list[tuple[str, ...]]:
    """Half of MiniLM, folded and fused, beside the plain export of the whole."""
    whole, half = CASES["minilm"], CASES["pruned"]
    rows: list[tuple[str, ...]] = [("shape", "whole, plain onnx, ms", "half, best of ours, ms", "which", "speed-up")]
    for shape in whole.shapes:
        dense = calls(whole, shape, work, ("plain onnx",))
        small = calls(half, shape, work, OURS)
        times = take_turns({**{f"whole {n}": c for n, c in dense.items()}, **small}, rounds)
        which = min((n for n in small), key=lambda n: times[n].median)
        base, best = times["whole plain onnx"].median, times[which].median
        rows.append((shape.label, f"{1e3 * base:.2f}", f"{1e3 * best:.2f}", which, f"{base / best:.2f}"))
    return rows


def export(work: Work) -> list[tuple[str, ...]]:
    """Seconds of ``compile`` for 12-layer models, from a cold start of the model to the file, and those of them that processors worked."""
    import surgery

    rows: list[tuple[str, ...]] = [("model", "emit", "s", "s of processors")]
    models = {"bert-12": seeded(BERT_12, work.folder / "bert-12")}
    models |= {n: folder_of(CASES[n], work.folder) for n in ("gpt2", "llama", "vit")}
    for name, folder in models.items():
        for kind in ("onnx", "pt2") if name == "bert-12" else ("onnx",):
            path = work.folder / f"{name}-export.{kind}"
            start, worked = time.perf_counter(), time.process_time()
            with quiet():
                surgery.compile(
                    f'surg 1\nmodel "{folder}"\nfreeze all on layers[*].**\nemit {kind} to "{path}"\n', force=True, use_cache=False
                )
            rows.append((name, kind, f"{time.perf_counter() - start:.1f}", f"{time.process_time() - worked:.1f}"))
            path.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=("minilm", "gpt2", "llama", "vit", "pruned", "export", "all"))
    parser.add_argument("--work", default="", help="folder for what takes long to make; kept, so that the next run starts with it")
    parser.add_argument("--peers", default="", help="a Python with optimum-onnx and openvino")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--arms", default="", help="only these arms, separated by commas")
    parser.add_argument("--prepare", action="store_true", help="make the files of the part and stop")
    args = parser.parse_args()
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    wanted = tuple(a.strip() for a in args.arms.split(",") if a.strip()) or ORDER
    unknown = [a for a in wanted if a not in ORDER]
    if unknown:
        parser.error(f"there is no arm {unknown[0]!r}; the arms are {', '.join(ORDER)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.work or temporary).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        work = Work(folder, args.threads, args.peers)
        for part in ("minilm", "gpt2", "llama", "vit", "pruned", "export") if args.part == "all" else (args.part,):
            work.left_out.clear()
            if args.prepare:
                prepare(part, work, wanted)
                continue
            rows = (
                pruned(work, args.rounds)
                if part == "pruned"
                else export(work)
                if part == "export"
                else [HEAD, *measured(part, work, args.rounds, wanted)]
            )
            print(f"\n{part}, {args.threads} threads, {args.rounds} rounds at most\n\n{table(rows)}")
            for what, why in work.left_out.items():
                print(f"left out: {what}: {why}")


def prepare(part: str, work: Work, wanted: tuple[str, ...]) -> None:
    """The files of a part, so that a run that follows only times."""
    if part == "export":
        return
    from benchmarks.inference_arms import optimized, peer, plain

    for name in ("minilm", "pruned") if part == "pruned" else (part,):
        case = CASES[name]
        steps = {
            "plain onnx": lambda case=case: plain(case, work), "onnxruntime optimizer": lambda case=case: optimized(case, work),
            "optimum O2": lambda case=case: peer(case, work, "o2", work.path(case, "o2.onnx")),
            "ours onnx": lambda case=case: ours(case, work, "onnx"), "ours pt2": lambda case=case: ours(case, work, "pt2"),
            INT8: lambda case=case: ours(case, work, "onnx", "int8"),
        }  # fmt: skip
        for arm, make in steps.items():
            if arm not in wanted or (name == "pruned" and arm not in OURS):
                continue
            start = time.perf_counter()
            try:
                path = make()
                print(
                    json.dumps({"case": name, "arm": arm, "seconds": round(time.perf_counter() - start, 1), "bytes": path.stat().st_size}),
                    flush=True,
                )
            except Exception as exc:
                print(json.dumps({"case": name, "arm": arm, "left out": f"{type(exc).__name__}: {exc}"[:300]}), flush=True)


if __name__ == "__main__":
    main()
