"""Compiles that are stopped in the middle: one warm process forks them, stops each at a moment of its own, and looks at what is left.

Run as ``python -m tests.driver_forks FOLDER`` with a model ``bert.json`` in the folder; prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests.driver_support import LORA, debris, surgery, tree

OUTPUTS = ("out", "page.html", "a.surg.lock")
WATCHED = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def spec(rank: int) -> str:
    return LORA.replace("rank = 4", f"rank = {rank}") + 'emit torch to "out"\nemit report to "page.html"\n'


def compile_spec() -> int:
    return surgery("compile", "a.surg", "config:bert.json").code


def state() -> dict[str, dict[str, bytes]]:
    return {name: tree(name) if Path(name).exists() else {} for name in OUTPUTS}


def child(ready: int, kill_at: int = 0) -> int:
    """Forks a compile. It says when it begins; with ``kill_at`` it kills itself before that many steps on the file system."""
    pid = os.fork()
    if pid:
        return pid
    seen = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in WATCHED and args and any(mark in str(args[0]) for mark in (".surgery-", "page.html", "/out", "a.surg.lock")):
            seen += 1
            if seen == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    try:
        if kill_at:
            sys.addaudithook(watch)
        os.write(ready, b"x")
        code = compile_spec()
        if kill_at < 0:
            Path("steps").write_text(str(seen), "utf-8")
        os._exit(code)
    except BaseException:
        os._exit(99)


def stop(number: int, delay: float = 0.0, kill_at: int = 0) -> int:
    """Starts a compile and stops it with a signal after ``delay``, or lets it kill itself; its exit status as of a shell."""
    read, write = os.pipe()
    pid = child(write, kill_at)
    os.read(read, 1)
    if not kill_at:
        time.sleep(delay)
        os.kill(pid, number)
    _, status = os.waitpid(pid, 0)
    os.close(read)
    os.close(write)
    return os.waitstatus_to_exitcode(status)


def main(folder: str) -> None:
    os.chdir(folder)
    draw = random.Random(0)
    whole: dict[int, dict[str, dict[str, bytes]]] = {}
    for rank in (4, 8, 4):
        Path("a.surg").write_text(spec(rank), "utf-8")
        start = time.monotonic()
        assert compile_spec() == 0
        took = time.monotonic() - start
        whole[rank] = state()
    known = {name: [whole[4][name], whole[8][name]] for name in OUTPUTS}

    steps = Path("steps")
    stop(0, kill_at=-1)
    count = int(steps.read_text("utf-8"))
    steps.unlink()

    found: dict[str, Any] = {"seconds": took, "steps": count, "runs": []}

    def record(how: str, code: int) -> None:
        left = state()
        found["runs"].append(
            {
                "how": how,
                "code": code,
                "mixed": [n for n in OUTPUTS if left[n] not in known[n]],
                "new": left == whole[8],
                "debris": len(debris(".")),
            }
        )

    Path("a.surg").write_text(spec(8), "utf-8")
    moments = sorted(draw.uniform(0, 1.1 * took) for _ in range(30))
    for delay in moments:
        record("kill", stop(signal.SIGKILL, delay))
        if found["runs"][-1]["new"]:
            _back(whole[4])
    for at in sorted(draw.sample(range(1, count + 1), min(20, count))):
        record("step", stop(0, kill_at=at))
        _back(whole[4])
    for delay in moments[::4]:
        _back(whole[4])
        _clean()
        record("interrupt", stop(signal.SIGINT, delay))
    assert compile_spec() == 0
    record("last", 0)
    print(json.dumps(found))


def _back(before: dict[str, dict[str, bytes]]) -> None:
    """Puts the old outputs back without touching what killed runs left beside them."""
    import shutil

    for name, files in before.items():
        path = Path(name)
        if path.is_dir():
            shutil.rmtree(path)
        for inner, data in files.items():
            target = path / inner if name == "out" else path
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(data)


def _clean() -> None:
    """Removes what killed runs left, so that what an interrupted one leaves is its own."""
    import shutil

    for name in debris("."):
        if Path(name).is_dir():
            shutil.rmtree(name)
        else:
            Path(name).unlink(missing_ok=True)


if __name__ == "__main__":
    main(sys.argv[1])
