"""Hashes of weight files that the next process knows, and when they are not to be believed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from surgery.model import contenthash, hashstore
from surgery.model.contenthash import Hashing


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read; what the process itself remembers is forgotten by :func:`hashes`."""
    names: list[str] = []
    inner = contenthash._hash
    monkeypatch.setattr(contenthash, "_hash", lambda path, work: names.append(path.name) or inner(path, work))
    return names


def hashes(files: list[Path], folder: Path | None, monkeypatch: pytest.MonkeyPatch, later: int = 0) -> dict[Path, str]:
    """As a new process finds them, ``later`` nanoseconds from now."""
    monkeypatch.setattr(contenthash, "_known", {})
    now = contenthash.time.time_ns
    with monkeypatch.context() as clock:
        clock.setattr(contenthash.time, "time_ns", lambda: now() + later)
        found = Hashing(files, folder).result()
    assert found == {f: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    return found


def test_a_file_that_is_left_alone_is_hashed_by_one_process_only(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, files = tmp_path / "cache", [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(file.name.encode() * 1000)
    hashes(files, folder, monkeypatch)
    hashes(files, folder, monkeypatch)  # too young to be believed
    assert sorted(read) == ["a", "a", "b", "b"] and hashstore.known(folder) == {}
    read.clear()
    hashes(files, folder, monkeypatch, later=2 * hashstore.QUIET)
    hashes(files, folder, monkeypatch)
    assert sorted(read) == ["a", "b"] and len(hashstore.known(folder)) == 2
    hashes(files, None, monkeypatch)  # without a folder nothing is known
    assert sorted(read) == ["a", "a", "b", "b"]


def test_a_file_that_changed_is_hashed_anew(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, to the same size, with its time put back: the time of the change of its state tells."""
    folder, file = tmp_path / "cache", tmp_path / "a"
    file.write_bytes(b"one")
    os.utime(file, ns=(1, 1))
    first = hashes([file], folder, monkeypatch, later=2 * hashstore.QUIET)
    before = os.stat(file).st_ctime_ns
    with file.open("r+b") as f:
        f.write(b"two")
    os.utime(file, ns=(1, 1))
    while os.stat(file).st_ctime_ns == before:  # clocks of files are coarse, which is why a file has to be quiet for a while
        os.utime(file, ns=(1, 1))
    assert os.stat(file).st_mtime_ns == 1
    assert hashes([file], folder, monkeypatch, later=3 * hashstore.QUIET) != first and read == ["a", "a"]
    assert [key[0] for key in hashstore.known(folder)] == [str(file)]  # the earlier state is forgotten
    moved = tmp_path / "b"
    file.rename(moved)
    hashes([moved], folder, monkeypatch)
    assert read == ["a", "a", "b"]


@pytest.mark.parametrize("damage", ["", "{}", "[1]", "changed", "short"])
def test_a_damaged_store_counts_as_empty(tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    folder, file = tmp_path / "cache", tmp_path / "a"
    file.write_bytes(b"one")
    found = hashes([file], folder, monkeypatch, later=2 * hashstore.QUIET)
    store = folder / hashstore.NAME
    whole = store.read_text()
    if damage == "changed":
        damage = whole.replace(found[file], "0" * 64)
    elif damage == "short":
        damage = json.dumps({"files": [["x"]], "sha256": hashstore._digest([["x"]])})
    store.write_text(damage)
    hashes([file], folder, monkeypatch, later=2 * hashstore.QUIET)
    assert read == ["a", "a"] and store.read_text() == whole and [p.name for p in folder.iterdir()] == [hashstore.NAME]


def test_a_folder_that_cannot_be_written_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, place = tmp_path / "a", tmp_path / "no folder"
    file.write_bytes(b"one")
    place.write_bytes(b"")
    hashes([file], place, monkeypatch, later=2 * hashstore.QUIET)


def test_only_the_latest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashstore, "KEPT", 3)
    keys = [(f"file {i}", 1, i, 3, 4, 5) for i in range(5)]
    for key in keys:
        hashstore.keep(tmp_path, {key: f"{key[2]:064d}"})
    assert hashstore.known(tmp_path) == {key: f"{key[2]:064d}" for key in keys[2:]}
