"""A compile that is killed or interrupted at any moment leaves every output old or new, and Ctrl-C leaves nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.caching import capture_cache
from tests.driver_support import LORA, ROOT, debris, model, start, surgery, tree, write


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    home = tmp_path_factory.mktemp("stopped")
    cache = str(capture_cache(tmp_path_factory))
    old = Path.cwd()
    os.chdir(home)
    try:
        model("bert")
    finally:
        os.chdir(old)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "SURGERY_CACHE": cache, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.driver_forks", str(home)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=400
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert isinstance(found, dict)
    return found


def test_thirty_kills(stopped: dict[str, Any]) -> None:
    runs = [r for r in stopped["runs"] if r["how"] == "kill"]
    assert len(runs) == 30
    assert [r for r in runs if r["mixed"]] == []
    assert sum(r["code"] == -signal.SIGKILL for r in runs) >= 5, "moments are spread over a whole run: some must hit it"


def test_kills_between_steps_on_the_file_system(stopped: dict[str, Any]) -> None:
    runs = [r for r in stopped["runs"] if r["how"] == "step"]
    assert len(runs) == min(20, stopped["steps"]) >= 15
    assert all(r["code"] == -signal.SIGKILL for r in runs)
    assert [r for r in runs if r["mixed"]] == []
    assert any(r["debris"] for r in runs), "some were killed while they wrote"


def test_the_next_run_cleans_up(stopped: dict[str, Any]) -> None:
    last = stopped["runs"][-1]
    assert (last["how"], last["new"], last["mixed"], last["debris"]) == ("last", True, [], 0)


def test_interrupts_leave_no_debris(stopped: dict[str, Any]) -> None:
    runs = [r for r in stopped["runs"] if r["how"] == "interrupt"]
    assert len(runs) == 8
    assert {r["code"] for r in runs} <= {130, 0} and any(r["code"] == 130 for r in runs)
    assert [r for r in runs if r["mixed"] or r["debris"]] == []


def test_control_c_on_the_command_line(here: Path) -> None:
    """A process of its own, interrupted when it writes."""
    reference = model("bert")
    write("a.surg", LORA + 'emit torch to "out"\n')
    assert surgery("compile", "a.surg", reference).code == 0
    before = tree(here)
    write("a.surg", LORA.replace("4", "8") + 'emit torch to "out"\n')
    before["a.surg"] = Path("a.surg").read_bytes()
    run = start("compile", "a.surg", reference, cwd=here)
    end = time.monotonic() + 120
    while not debris(here) and run.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert (out, err) == ("", "\ninterrupted\n")
    assert tree(here) == before
    assert debris(here) == []
