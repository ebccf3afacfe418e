"""Progress: bars on a terminal while something long runs, nothing anywhere else, and the numbers behind them."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from surgery import driver
from surgery.cli.progress import amount
from surgery.core.progress import Bytes, listening, report
from tests.driver_support import LORA, ROOT, checkpoint, model, start, write

SPEC = LORA + 'emit torch to "out"\nemit onnx to "out.onnx"\n'


def on_a_terminal(*args: str, **more: str) -> tuple[int, str, str]:
    """Exit code, standard output (a pipe) and what a terminal of 160 columns saw of the standard error."""
    main, side = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", "COLUMNS": "160", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}
    run = subprocess.Popen(
        [sys.executable, "-m", "surgery.cli.main", *args], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=side, env=env
    )
    os.close(side)
    seen, deadline = b"", time.monotonic() + 300
    while time.monotonic() < deadline:
        ready, _, _ = select.select([main], [], [], 1)
        if ready:
            try:
                piece = os.read(main, 1 << 16)
            except OSError:  # the other side is closed
                break
            if not piece:
                break
            seen += piece
        elif run.poll() is not None:
            break
    os.close(main)
    assert run.stdout is not None
    out = run.stdout.read().decode()
    return run.wait(), out, seen.decode("utf-8", "replace")


def test_bars_on_a_terminal(here: Path) -> None:
    write("a.surg", SPEC)
    code, out, seen = on_a_terminal("compile", "a.surg", checkpoint("bert"), "--no-cache")
    assert code == 0, seen
    assert "out.onnx" in out.split() and "\x1b" not in out
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", seen)
    assert re.search(r"capturing the model: layers.*[1-3] of 3", plain)
    assert re.search(r"computing weights.*of 1\d\d\.\d KiB", plain)
    assert re.search(r"writing weights.*of 1\d\d\.\d KiB", plain)
    for step in ("tracing", "translating", "simplifying", "checking the graph"):
        assert f"emitting onnx: {step}" in plain
    assert "\x1b[2K" in seen, "lines are wiped"
    last = plain.rsplit("\r", 1)[-1]
    assert "writing" not in last and "%" not in last and "━" not in last, "nothing of the bars is left"


@pytest.mark.parametrize("env", [{"CI": "true"}, {"TERM": "dumb"}])
def test_no_bars_where_they_would_be_recorded(here: Path, env: dict[str, str]) -> None:
    write("a.surg", LORA)
    code, _, seen = on_a_terminal("plan", "a.surg", model("bert"), **env)
    assert code == 0
    assert "capturing" not in seen and "━" not in seen and "\x1b[2K" not in seen and "opening" not in seen


@pytest.mark.parametrize("option", [["--quiet"], ["--format", "json"]])
def test_no_bars_when_nobody_wants_them(here: Path, option: list[str]) -> None:
    write("a.surg", LORA)
    code, _, seen = on_a_terminal("plan", "a.surg", model("bert"), *option)
    assert (code, seen) == (0, "")


def test_none_in_a_pipe(here: Path) -> None:
    write("a.surg", SPEC)
    run = start("compile", "a.surg", model("bert"), "--no-cache", cwd=here)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0
    assert "\x1b" not in out + err and "\r" not in out + err and "capturing" not in err and "writing weights" not in err


def test_callers_from_python_hear_the_numbers(here: Path) -> None:
    """Done never passes total, and every byte of the weights is counted."""
    heard: list[tuple[str, float, float]] = []
    write("a.surg", LORA + 'emit torch to "out"\n')
    driver.compile_spec("a.surg", model("bert"), use_cache=False, progress=lambda text, done=0, total=0: heard.append((text, done, total)))
    assert all(0 <= done <= total for _, done, total in heard if total)
    layers = [(done, total) for text, done, total in heard if text == "capturing the model: layers"]
    assert layers == [(1, 3), (2, 3), (3, 3)]
    written = [(done, total) for text, done, total in heard if text == "writing weights"]
    constants = 2 * 64 * 8  # numbers of positions and types, outside the state dict
    assert written == sorted(written) and written[-1][0] == written[-1][1] == 4 * (32032 + 6 * 2 * 4 * 32) + constants
    assert all(isinstance(total, Bytes) for _, total in written)
    computed = [(done, total) for text, done, total in heard if text == "computing weights"]
    assert computed and computed[-1][0] == computed[-1][1]


def test_who_listens() -> None:
    report("to nobody", 1, 2)
    heard: list[str] = []
    with listening(lambda text, *more: heard.append("outer " + text)):
        report("a")
        with listening(None):
            report("b")
        with listening(lambda text, *more: heard.append("inner " + text)):
            report("c")
        report("d")
    report("e")
    assert heard == ["outer a", "outer b", "inner c", "outer d"]


@pytest.mark.parametrize(
    ("done", "total", "in_bytes", "text"),
    [
        (3, 12, False, "3 of 12"), (0, None, False, ""), (5e8, 1e9, False, "50%"), (512, 1000, True, "512 of 1000 bytes"),
        (3 << 19, 3 << 20, True, "1.5 of 3.0 MiB"), (0, 5 << 30, True, "0.0 of 5.0 GiB"), (2048, 4096, True, "2.0 of 4.0 KiB"),
    ],
)  # fmt: skip
def test_amounts(done: float, total: float | None, in_bytes: bool, text: str) -> None:
    assert amount(done, total, in_bytes) == text
