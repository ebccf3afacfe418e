"""``surgery bench``: artifacts and models beside each other: time, memory, predicted cost, agreement, and which is best for which shape."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.benching_arms import COMPILE, EAGER, PLAIN, Arm, Options, labelled, open_arms, sort_of
from surgery.benching_feeds import Arrays, Input, arrays, merged
from surgery.benching_ideal import Ideal, profile
from surgery.benching_numbers import MOST, checked_arms, within
from surgery.benching_turns import Timing, take_turns
from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.progress import Progress, listening, report

BATCHES, LENGTHS = (1, 8), (16, 128)
PROMPTS = (1, 16, 32, 64, 128)
OUTPUTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Cell:
    """One arm at one shape. ``flops``: predicted operations of the call; ``error``: largest difference of an output to the first arm, None where
    the outputs have other shapes or the arm is the first."""

    timing: Timing
    flops: int | None = None
    error: float | None = None

    @property
    def rate(self) -> float | None:
        """Predicted operations by measured second."""
        return self.flops / self.timing.median if self.flops and self.timing.median else None


@dataclass
class Benched:
    """What was measured. ``cells`` by (batch, length) and arm; ``memory`` MiB by arm: the peak of a process of its own; ``left_out``: what was asked for and
    not run, with the reason."""

    arms: list[Arm]
    shapes: list[tuple[int, int]]
    threads: int
    rounds: int
    given: list[str]
    cells: dict[tuple[int, int], dict[str, Cell]] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    ideal: dict[str, Ideal] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def best(self, shape: tuple[int, int], *, given: bool = False) -> str:
        """The arm with the lowest median at a shape; with ``given`` only among the artifacts themselves, not what was made to compare them with."""
        cells = self.cells[shape]
        own = [a.name for a in self.arms if a.source in self.given and a.kind not in (PLAIN, COMPILE)] if given else []
        return min(own or cells, key=lambda name: cells[name].timing.median)

    def as_json(self) -> dict[str, Any]:
        """Schema ``surgery.bench/1``: times in milliseconds, memory in MiB."""
        from surgery.benching_view import as_json

        return as_json(self)

    def render_text(self) -> str:
        from surgery.benching_view import as_text

        return as_text(self)


def bench(
    artifacts: Sequence[str],
    against: str | None = None,
    *,
    batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS,
    threads: int | None = None,
    rounds: int = 15,
    arms: Sequence[str] = (EAGER, PLAIN),
    prompts: Sequence[int] = PROMPTS,
    outputs: Sequence[int] = OUTPUTS,
    memory: bool = True,
    allow_code: bool = False,
    use_cache: bool = True,
    progress: Progress | None = None,
) -> Benched:
    """Measures every arm at every pair of batch and length; the arms take turns, medians count.

    ``against`` is a model (or artifact) whose arms come first: what the others are compared with. ``prompts`` and ``outputs`` are for the idealised
    runtime, none of it when ``prompts`` is empty. A ``.pt2`` file runs native code when it is loaded, as its author made it: name only files that you
    trust. Raises S0895 to S0899, and what opening a model raises.
    """
    with listening(progress), tempfile.TemporaryDirectory(prefix="surgery-bench-") as folder:
        _check(
            artifacts, arms, batch=batches, length=lengths, prompts=prompts, outputs=outputs, rounds=[rounds],
            threads=[] if threads is None else [threads],
        )  # fmt: skip
        refs = [*([against] if against else []), *artifacts]
        for ref in refs:
            sort_of(ref)  # all of them before any is opened
        count = threads or os.cpu_count() or 1
        options = Options(count, tuple(arms), Path(folder), allow_code, use_cache)
        opened = labelled([arm for ref in refs for arm in open_arms(ref, options)])
        if not opened:
            raise fail("S0899", "nothing is left to run", help="name an artifact, or leave out `--arms`", exit_code=2)
        inputs = merged(a.inputs for a in opened)
        _comparable(opened)
        found = Benched(opened, [(b, n) for b in batches for n in lengths], count, rounds, list(artifacts))
        _fits(opened, max(lengths))
        with _threads(count):
            for shape in found.shapes:
                found.cells[shape] = _shape(found, inputs, shape)
            if prompts:
                _ideal(found, prompts, outputs, rounds)
        if memory:
            _memory(found, options)
        return found


def _check(artifacts: Sequence[str], arms: Sequence[str], **counts: Sequence[int]) -> None:
    if not artifacts:
        raise fail(
            "S0899", "nothing to bench: no artifact is named", help="write `surgery bench build/model.onnx --against MODEL`", exit_code=2
        )
    checked_arms(list(arms))
    for option, values in counts.items():
        for value in values:
            within(value, option)
        if not values and option in ("batch", "length"):
            raise fail("S0899", f"`{option}` names no size", help=f"write for example `--{option} 1,8`", exit_code=2)


def _fits(arms: Iterable[Arm], longest: int) -> None:
    for arm in arms:
        limit = arm.record.get("longest")
        if limit and longest > limit:
            raise fail(
                "S0896", f"{arm.source} takes up to {limit:,} tokens, not {longest:,}", help=f"write `--length {limit}` or less", exit_code=2
            )  # fmt: skip


def _comparable(arms: Sequence[Arm]) -> None:
    """Every arm shares an input with the first. Raises S0898."""
    first = {i.name for i in arms[0].inputs}
    for arm in arms[1:]:
        own = {i.name for i in arm.inputs}
        if first and own and not first & own:
            raise fail(
                "S0898", f"{arms[0].source} and {arm.source} have no input in common", notes=[f"one takes {', '.join(sorted(first))}, the other {', '.join(sorted(own))}"],
                help="compare models of one kind, for example a model and what was made of it", exit_code=2,
            )  # fmt: skip


class _threads:
    """Torch's number of threads while a block runs; what it was before afterwards."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __enter__(self) -> None:
        import torch

        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *what: object) -> None:
        import torch

        torch.set_num_threads(self.before)


def _shape(found: Benched, inputs: Sequence[Input], shape: tuple[int, int]) -> dict[str, Cell]:
    from surgery.backends.served import operations

    batch, length = shape
    feeds = arrays(inputs, batch, length)
    calls = {a.name: a.prepare(feeds) for a in found.arms}
    title = f"measuring batch {batch}, length {length}"
    report(title)
    results = {name: _first_run(name, call) for name, call in calls.items()}
    times = take_turns(calls, found.rounds, step=lambda done: report(title, done, found.rounds))
    first = results[found.arms[0].name]
    return {
        a.name: Cell(
            times[a.name], operations(dict(a.record), batch, length), None if a is found.arms[0] else difference(first, results[a.name])
        )
        for a in found.arms
    }  # fmt: skip


def _first_run(name: str, call: Any) -> Arrays:
    try:
        found: Arrays = call()
        return found
    except SurgeryError:
        raise
    except Exception as exc:
        text = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
        raise fail(
            "S0898", f"{name} does not run on these inputs", notes=[text[:200]],
            help="choose another batch and length; compare only models that take the same inputs", exit_code=1,
        ) from exc  # fmt: skip


def difference(first: Arrays, other: Arrays) -> float | None:
    """Largest absolute difference of the first output that both have in the same shape; None where there is none."""
    import numpy as np

    for name, want in first.items():
        if name in other and not name.startswith("present."):
            a, b = (np.asarray(v.float().cpu() if hasattr(v, "cpu") else v, dtype=np.float64) for v in (want, other[name]))
            if a.shape == b.shape:
                return float(np.abs(a - b).max()) if a.size else 0.0
    return None


def _ideal(found: Benched, prompts: Sequence[int], outputs: Sequence[int], rounds: int) -> None:
    if not any(i.name.endswith("input_ids") for a in found.arms for i in a.inputs):
        found.left_out["idealised runtime"] = "the models take no tokens"
        return
    chosen: dict[str, tuple[Any, Sequence[Input]]] = {}
    for arm in found.arms:
        cached = any(i.is_cache for i in arm.inputs)
        if cached and "logits" not in arm.record.get("outputs", ("logits",)):
            found.left_out[f"idealised runtime of {arm.name}"] = "its outputs have no logits"
            continue
        chosen[arm.name] = (arm.prepare, arm.inputs)
    limit = min((int(a.record["longest"]) for a in found.arms if a.record.get("longest")), default=MOST)
    fitting = [
        p for p in prompts if p + max(outputs) <= limit or (p <= limit and not any(i.is_cache for a in found.arms for i in a.inputs))
    ]
    for prompt in sorted(set(prompts) - set(fitting)):
        found.left_out[f"prompt of {prompt}"] = f"the models take up to {limit} tokens"
    report("measuring the idealised runtime")
    if fitting:
        found.ideal = profile(chosen, fitting, outputs, max(3, rounds // 5))


def _memory(found: Benched, options: Options) -> None:
    """The peak of a process of its own for each arm, at the largest shape."""
    batch, length = max(found.shapes, key=lambda s: s[0] * s[1])
    for done, arm in enumerate(found.arms):
        report("measuring memory", done, len(found.arms))
        asked = {
            "source": arm.source.partition(" (")[0] if arm.kind != "onnx" else arm.file, "kind": arm.kind, "file": arm.file, "batch": batch, "length": length,
            "threads": options.threads, "allow_code": options.allow_code, "use_cache": options.use_cache, "record": _slim(arm.record),
        }  # fmt: skip
        done_ = subprocess.run(
            [sys.executable, "-m", "surgery.benching_child"],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            check=False,
            timeout=1800,
        )
        try:
            found.memory[arm.name] = float(json.loads(done_.stdout.strip().splitlines()[-1])["peak"])
        except (IndexError, ValueError, KeyError):
            lines = [line for line in done_.stderr.strip().splitlines() if line.strip()]
            found.left_out[f"memory of {arm.name}"] = lines[-1][:200] if lines else "its process ended without a word"


def _slim(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"inputs": record["inputs"]} if record.get("inputs") else {}
