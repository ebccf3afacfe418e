"""One command in a process of its own: seconds and memory of the whole, and of what comes after its imports.

The highest resident memory that the system tells of a child holds the memory of its parent at the fork, and the time of a child holds its imports, which differ
between tools by seconds. So the child runs this file: it imports, notes the clock and its memory, runs the command's module, and writes down what
it came to; the parent watches its private memory meanwhile, since pages of a mapped file count as resident and are nobody's.

This file imports nothing of surgery, so that any interpreter can run it.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

EVERY = 0.01
"""Seconds between two looks at a child's memory."""


@dataclass(frozen=True)
class Run:
    """``whole`` and ``after`` are seconds from the start of the process and from the end of its imports, ``work`` seconds of all its threads
    after the imports; ``start`` is the resident MiB after the imports, ``peak`` the highest resident MiB from there on, ``private`` the
    highest MiB that are no file's."""

    whole: float
    after: float
    work: float
    start: float
    peak: float
    private: float


def apart(python: str, imports: str, module: str, *args: str, folder: Path, threads: int = 2, env: dict[str, str] | None = None) -> Run:
    """Runs ``python -m MODULE ARGS`` in ``folder`` once ``imports`` are imported. Raises RuntimeError with its last words if it fails."""
    words = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as place, tempfile.TemporaryFile("w+") as errors:
        found = Path(place) / "found.json"
        start = time.monotonic()
        process = subprocess.Popen(
            [python, os.path.abspath(__file__), str(found), imports, module, *args],
            cwd=folder, env={**os.environ, **words, **(env or {})}, stdout=subprocess.DEVNULL, stderr=errors,
        )  # fmt: skip
        private = 0.0
        try:
            while process.poll() is None:
                private = max(private, status_mib(process.pid, "RssAnon"))
                time.sleep(EVERY)
            whole = time.monotonic() - start
        finally:
            process.kill()  # nothing to do for one that ended; an interrupted benchmark leaves none behind
            process.wait()
        errors.seek(0)
        if process.returncode or not found.exists():
            raise RuntimeError(f"{module} {' '.join(args)} failed:\n{errors.read()[-3000:]}")
        told = json.loads(found.read_text())
    return Run(whole, told["end"] - told["imported"], told["work"], told["start"], told["peak"], private)


def status_mib(process: int | str, key: str) -> float:
    """A line of the process's status in MiB; 0 when it is gone (Linux)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) / 1024
    return 0.0


def _work() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main() -> None:
    target, imports, module, *args = sys.argv[1:]
    sys.path[0] = os.getcwd()
    for name in imports.split():
        __import__(name)
    start = status_mib("self", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory counts from here
    imported, before = time.monotonic(), _work()
    sys.argv = [module, *args]
    code: object = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as exc:
        code = exc.code
    if code:
        raise SystemExit(code if isinstance(code, int) else 1)
    told = {"imported": imported, "end": time.monotonic(), "work": _work() - before, "start": start, "peak": status_mib("self", "VmHWM")}
    Path(target).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
