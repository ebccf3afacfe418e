"""Which of the files for serving that one run wrote is the faster one for which shape: a few rounds on this machine, for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.benching import BATCHES, LENGTHS, bench
from surgery.core.diagnostics import SurgeryError

MOST_OPERATIONS = 40e9
"""Shapes that take more are left to `surgery bench`: what is said in passing must not take long."""

ROUNDS = 5


def verdict(paths: Sequence[Path]) -> list[str]:
    """For a run that wrote an ONNX file and a package: one line of which is faster where, else nothing.

    Measured now, so that two runs may say different things; the files do not hold it.
    """
    files = [p for p in paths if p.suffix in (".onnx", ".pt2")]
    if len({p.suffix for p in files}) < 2:
        return []
    shapes = _shapes(files)
    if not shapes:
        return ["too large to be timed in passing: `surgery bench` says which output is faster for which shape"]
    best: dict[str, list[str]] = {}
    threads = 0
    for batch, length in shapes:
        try:
            found = bench([str(p) for p in files], batches=[batch], lengths=[length], rounds=ROUNDS, arms=[], prompts=[], memory=False)
        except SurgeryError as exc:
            return [f"not compared: {exc.diagnostics[0].message}"]
        name = found.best((batch, length))
        best.setdefault(next(a.source for a in found.arms if a.name == name), []).append(f"({batch}, {length})")
        threads = found.threads
    said = "; ".join(f"{Path(source).name} at {', '.join(at)}" for source, at in best.items())
    return [f"faster at (batch, length), measured with {threads} threads: {said}"]


def _shapes(files: Sequence[Path]) -> list[tuple[int, int]]:
    """The usual shapes, as far as the model takes them and they are quick."""
    from surgery.backends import aoti
    from surgery.backends.served import operations

    record: Mapping[str, Any] = next((r for p in files if p.suffix == ".pt2" for r in [aoti.read_record(p)] if r), {})
    longest = int(record.get("longest") or max(LENGTHS))
    lengths = (
        sorted({min(n, longest) for n in LENGTHS}) if any("sequence" in map(str, i["shape"]) for i in record.get("inputs", ())) else [1]
    )
    return [(b, n) for b in BATCHES for n in lengths if (operations(dict(record), b, n) or 0) <= MOST_OPERATIONS]
