"""The report of fusions that an emitted file carries, read without running anything of it and without the libraries that wrote it."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from surgery.core.diagnostics import fail

KEY = "surgery.fusions"
"""The metadata of an ONNX file that holds the report."""

RECORD = "extra/surgery.json"
"""The end of the name of our record in a compiled package; ``fusions`` in it is the report."""

LARGEST = 64 << 20
"""Bytes of a report above which a file is not believed."""

FIELD_METADATA, FIELD_KEY, FIELD_VALUE = 14, 1, 2
"""Numbers in onnx.proto: ``ModelProto.metadata_props``, ``StringStringEntryProto.key`` and ``.value``."""


def reports(path: Path) -> dict[str, list[dict[str, Any]]]:
    """File name -> the records of its rules, for a file, a folder with such files, or the parts ``NAME.PART.onnx`` of ``NAME.onnx``.

    Raises S0886 when none carries a report, S0887 when a file is neither ONNX nor a compiled package; a missing file is an OSError.
    """
    found = {}
    for file in _files(path):
        report = _read(file)
        if report is not None:
            found[file.name] = report
    if not found:
        raise fail(
            "S0886", f"{path} carries no report of fusions", exit_code=1,
            notes=["`emit onnx` and `emit pt2` write one, unless they are told `optimize = none`"],
            help="emit it again without `optimize = none`",
        )  # fmt: skip
    return found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(p for p in path.iterdir() if p.suffix in (".onnx", ".pt2") and p.is_file())
    if not path.exists() and path.suffix == ".onnx":
        parts = sorted(path.parent.glob(f"{path.stem}.*.onnx")) if path.parent.is_dir() else []
        if parts:
            return parts
    return [path]


def _read(file: Path) -> list[dict[str, Any]] | None:
    """The report in one file; None when it has none."""
    try:
        with file.open("rb") as stream:
            text = _packaged(stream) if stream.read(4) == b"PK\x03\x04" else _metadata(stream)
        found = None if text is None else json.loads(text)
    except (ValueError, zipfile.BadZipFile) as cause:
        raise fail(
            "S0887", f"{file} is neither an ONNX file nor a compiled package", exit_code=2, notes=[str(cause)[:200]],
            help="name a file that `emit onnx` or `emit pt2` wrote",
        ) from cause  # fmt: skip
    if isinstance(found, dict):
        found = found.get("fusions")
    if not isinstance(found, list) or not found or not all(isinstance(r, dict) and isinstance(r.get("rule"), str) for r in found):
        return None
    return found


def _packaged(stream: IO[bytes]) -> bytes | None:
    stream.seek(0)
    with zipfile.ZipFile(stream) as archive:
        name = next((n for n in archive.namelist() if n.endswith(RECORD)), None)
        if name is None or archive.getinfo(name).file_size > LARGEST:
            return None
        return archive.read(name)


# ------------------------------------------------------------------ protobuf


def _metadata(stream: IO[bytes]) -> bytes | None:
    """The value of :data:`KEY` among the metadata of an ONNX model; everything else is skipped, weights included.

    Raises ValueError for bytes that are no such message.
    """
    end = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    found, fields = None, 0
    for number, size in _fields(stream, end):
        fields += 1
        if number != FIELD_METADATA or size > LARGEST:
            stream.seek(size, io.SEEK_CUR)
            continue
        entry = io.BytesIO(stream.read(size))
        pair = {}
        for part, length in _fields(entry, size):
            pair[part] = entry.read(length)
        if pair.get(FIELD_KEY) == KEY.encode():
            found = pair.get(FIELD_VALUE)
    if not fields:
        raise ValueError("the file is empty")
    return found


def _fields(stream: IO[bytes], end: int) -> Iterator[tuple[int, int]]:
    """Number and length of each field with a length; the reader moves on by that many bytes. Numbers are skipped."""
    while stream.tell() < end:
        tag = _varint(stream)
        number, kind = tag >> 3, tag & 7
        if not 1 <= number <= 1000 or kind not in (0, 1, 2, 5):
            raise ValueError(f"not a protobuf message: field {number} of kind {kind}")
        if kind == 0:
            _varint(stream)
        elif kind in (1, 5):
            stream.seek(8 if kind == 1 else 4, io.SEEK_CUR)
        else:
            size = _varint(stream)
            if stream.tell() + size > end:
                raise ValueError("a field is longer than the file")
            yield number, size


def _varint(stream: IO[bytes]) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = stream.read(1)
        if not byte:
            raise ValueError("the file ends in the middle of a number")
        value |= (byte[0] & 0x7F) << shift
        if not byte[0] & 0x80:
            return value
    raise ValueError("a number has more than ten bytes")
