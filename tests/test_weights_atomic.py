"""Outputs appear whole or not at all: exceptions, Ctrl-C, kills at any moment, full and read-only storage."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from surgery.core.diagnostics import SurgeryError
from surgery.model import atomic
from surgery.model.atomic import AtomicOutput, exchange, leftovers

ROOT = Path(__file__).parent.parent


def fill(folder: Path, word: str, files: int = 4) -> None:
    for i in range(files):
        (folder / f"{i}.txt").write_text(word * 1000)


def holds(folder: Path) -> set[str]:
    return {p.read_text()[:3] for p in folder.iterdir()}


def code(exc: SurgeryError) -> tuple[str, int]:
    return exc.diagnostics[0].code, exc.exit_code


@pytest.mark.parametrize("swap", [True, False], ids=["exchange", "set aside"])
def test_folder_is_made_and_replaced(tmp_path: Path, swap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not swap:
        monkeypatch.setattr(atomic, "exchange", lambda a, b: False)
    target = tmp_path / "deep" / "out"
    with AtomicOutput(target) as temporary:
        assert temporary.parent == target.parent and not target.exists()
        fill(temporary, "old", files=6)
    assert holds(target) == {"old"}
    with AtomicOutput(target, force=True) as temporary:
        fill(temporary, "new")
    assert holds(target) == {"new"} and len(list(target.iterdir())) == 4
    assert os.listdir(target.parent) == ["out"]


def test_file_is_made_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    for word in ("one", "two"):
        with AtomicOutput(target, folder=False, force=True) as temporary:
            temporary.write_text(word)
        assert target.read_text() == word
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_a_file_gives_way_to_a_folder_and_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_text("file")
    with AtomicOutput(target, force=True) as temporary:
        fill(temporary, "new")
    assert holds(target) == {"new"}
    with AtomicOutput(target, folder=False, force=True) as temporary:
        temporary.write_text("again")
    assert target.read_text() == "again"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_the_old_and_no_debris(tmp_path: Path, fault: type[BaseException]) -> None:
    target = tmp_path / "out"
    with AtomicOutput(target) as temporary:
        fill(temporary, "old")
    with pytest.raises(fault), AtomicOutput(target, force=True) as temporary:
        fill(temporary, "new", files=2)
        raise fault()
    assert holds(target) == {"old"}
    assert os.listdir(tmp_path) == ["out"]


def test_what_stands_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with AtomicOutput(target) as temporary:  # an empty folder is in nobody's way
        fill(temporary, "old")
    with pytest.raises(SurgeryError) as caught, AtomicOutput(target):
        pytest.fail("entered")
    assert code(caught.value) == ("S0803", 2)
    with pytest.raises(SurgeryError), AtomicOutput(target, own=lambda p: False):
        pytest.fail("entered")
    with AtomicOutput(target, own=lambda p: holds(p) == {"old"}) as temporary:
        fill(temporary, "new")
    assert holds(target) == {"new"}
    assert os.listdir(tmp_path) == ["out"]


def test_two_runs_do_not_write_one_target(tmp_path: Path) -> None:
    with AtomicOutput(tmp_path / "out") as temporary:
        fill(temporary, "one")
        with pytest.raises(SurgeryError) as caught, AtomicOutput(tmp_path / "out"):
            pytest.fail("entered")
        assert code(caught.value) == ("S0805", 2)
        assert temporary.exists()
        with AtomicOutput(tmp_path / "other") as other:
            fill(other, "two")
    assert sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_many_writers_take_turns(tmp_path: Path) -> None:
    failed, made = [], []

    def write(word: str) -> None:
        try:
            with AtomicOutput(tmp_path / "out", force=True) as temporary:
                fill(temporary, word)
            made.append(word)
        except SurgeryError as exc:
            failed.append(code(exc))

    threads = [threading.Thread(target=write, args=(f"w{i:02d}",)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made and set(failed) <= {("S0805", 2)}
    assert len(holds(tmp_path / "out")) == 1
    assert os.listdir(tmp_path) == ["out"]


def test_exchange_is_one_step(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    fill(tmp_path / "a", "aaa")
    fill(tmp_path / "b", "bbb")
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system has no exchange")
    assert (holds(tmp_path / "a"), holds(tmp_path / "b")) == ({"bbb"}, {"aaa"})


# ---------------------------------------------------------------- storage


FAULTS = {"ENOSPC": "S0801", "EDQUOT": "S0801", "EROFS": "S0802", "EACCES": "S0802", "EIO": "S0804"}


@pytest.mark.parametrize("name", FAULTS)
def test_storage_faults_on_the_way_out(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    with AtomicOutput(tmp_path / "out") as temporary:
        fill(temporary, "old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(SurgeryError) as caught, AtomicOutput(tmp_path / "out", force=True) as temporary:
        fill(temporary, "new")
    assert code(caught.value) == (FAULTS[name], 2)
    assert holds(tmp_path / "out") == {"old"}
    assert os.listdir(tmp_path) == ["out"]


UNWRITABLE = """
import os, sys
from surgery.core.diagnostics import SurgeryError
from surgery.model.atomic import AtomicOutput
if os.geteuid() == 0:
    os.seteuid(65534)
try:
    with AtomicOutput(sys.argv[1]):
        print("entered")
except SurgeryError as exc:
    print(exc.diagnostics[0].code, exc.exit_code)
"""


def test_unwritable_folder(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    ran = subprocess.run([sys.executable, "-c", UNWRITABLE, str(locked / "out")], capture_output=True, text=True, cwd=ROOT, check=True)
    assert ran.stdout.split() == ["S0802", "2"]
    assert list(locked.iterdir()) == []


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SurgeryError) as caught, AtomicOutput(tmp_path / "file" / "out"):
        pytest.fail("entered")
    assert caught.value.exit_code == 2


# ---------------------------------------------------------------- kills


WRITER = """
import sys
from pathlib import Path
from surgery.model import atomic
if sys.argv[2] == "aside":
    atomic.exchange = lambda a, b: False
turn = 0
print("ready", flush=True)
while True:
    turn += 1
    word = f"{turn % 900 + 100}"
    with atomic.AtomicOutput(Path(sys.argv[1]), force=True) as folder:
        for i in range(6):
            (folder / f"{i}.txt").write_text(word * 3000)
"""


@pytest.mark.parametrize("way", ["exchange", "aside"])
def test_kill_at_30_random_moments(tmp_path: Path, way: str) -> None:
    """After each kill the target is one whole generation, and the next run removes what the killed one left."""
    target = tmp_path / "out"
    with AtomicOutput(target) as temporary:
        for i in range(6):
            (temporary / f"{i}.txt").write_text("100" * 3000)
    moments = random.Random(0)
    debris = 0
    for _ in range(30):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target), way], cwd=ROOT, stdout=subprocess.PIPE)
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(moments.random() * 0.03)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        debris += bool(leftovers(target))
        if way == "aside" and not target.exists():
            assert any(p.name.endswith(".old") for p in leftovers(target))
            atomic.recover(target)
        contents = [(target / f"{i}.txt").read_text() for i in range(6)]
        assert len(list(target.iterdir())) == 6
        assert all(len(text) == 9000 and text == contents[0] for text in contents)
    assert debris > 0
    with AtomicOutput(target, force=True) as temporary:
        fill(temporary, "end")
    assert holds(target) == {"end"}
    assert os.listdir(tmp_path) == ["out"]
