"""Headers of safetensors files, read and checked without their data.

A safetensors file is an 8-byte little-endian length, a JSON object of that length, then the tensors' bytes. The header says for
each tensor its dtype, shape and byte range behind the header. Nothing in it is believed: each claim is checked against
the others and against the size of the file, so that later reads cannot run past a tensor or into another one.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.source import Span
from surgery.model.weights import DTYPE_BYTES, Load

MAX_HEADER = 100_000_000
"""Longest header that is believed, in bytes (the reference implementation has the same bound)."""

DTYPE_OF_CODE: dict[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip
CODE_OF_DTYPE: dict[str, str] = {name: code for code, name in DTYPE_OF_CODE.items()}


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor: ``span`` is its half-open byte range in ``file``, counted from the start of the file."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    span: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.span[1] - self.span[0]

    def load(self) -> Load:
        """The expression that reads it."""
        return Load(self.shape, self.dtype, self.file, self.key, self.span)


@dataclass(frozen=True)
class FileHeader:
    """Header of one file: tensors in the order of their bytes, free-form ``metadata``, ``digest`` sha256 of the header's bytes and the file's size."""

    file: str
    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]
    digest: str
    size: int


class _Repeated(Exception):
    """A JSON object with one key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out:
            raise _Repeated(key)
        out[key] = value
    return out


def read_header(path: str | Path, span: Span | None = None) -> FileHeader:
    """Read and check the header of one safetensors file.

    Raises SurgeryError: S0707 the file is shorter than it says, S0708 the header cannot be read, S0709 byte ranges that cannot be
    true, S0710 a dtype that is not supported, S0721 the file cannot be opened.
    """
    path = Path(path)
    try:
        state = os.stat(path)
    except OSError as exc:
        raise unreadable(path, exc, span) from None
    return _read(str(path.absolute()), state.st_size, state.st_mtime_ns, span)


def header_digest(path: str) -> str:
    """Identity of a file by its header and size; cached, so cheap to ask for each tensor."""
    return read_header(path).digest


def unreadable(path: Path | str, exc: OSError, span: Span | None = None) -> SurgeryError:
    """S0721 for an operating-system error on reading."""
    return fail(
        "S0721", f"cannot read {Path(path)}: {exc.strerror or exc}", span, exit_code=2,
        help="check that the file exists and that you may read it",
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _read(path: str, size: int, _mtime: int, span: Span | None) -> FileHeader:
    name = Path(path).name
    if size < 8:
        raise _truncated(path, f"{name} has {size} bytes, too few for a safetensors file", span)
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise fail(
                    "S0708", f"{name} claims a header of {length} bytes", span, notes=(f"file: {path}", f"the longest allowed is {MAX_HEADER}"),
                    help="this is no safetensors file, or its first bytes are damaged: fetch it again",
                )  # fmt: skip
            if 8 + length > size:
                raise _truncated(path, f"{name} claims a header of {length} bytes but has {size - 8} behind the length", span)
            raw = file.read(length)
    except OSError as exc:
        raise unreadable(path, exc, span) from None
    if len(raw) != length:
        raise _truncated(path, f"{name} ended inside its header", span)
    table = _parse(raw, path, span)
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _bad_header(path, f"the metadata of {name} is not a table of strings", span)
    start = 8 + length
    tensors = {key: _tensor(path, key, entry, start, span) for key, entry in table.items()}
    ordered = sorted(tensors.values(), key=lambda t: (t.span[0], t.span[1]))
    _check_layout(path, ordered, start, size, span)
    digest = hashlib.sha256(raw + struct.pack("<Q", size)).hexdigest()
    return FileHeader(path, {t.key: t for t in ordered}, metadata, digest, size)


def _parse(raw: bytes, path: str, span: Span | None) -> dict[str, Any]:
    name = Path(path).name
    try:
        table = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except _Repeated as exc:
        raise _bad_header(path, f"the header of {name} names `{exc}` twice", span) from None
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise _bad_header(path, f"the header of {name} is not JSON", span) from None
    if not isinstance(table, dict):
        raise _bad_header(path, f"the header of {name} is not a JSON object", span)
    return table


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _tensor(path: str, key: str, entry: Any, start: int, span: Span | None) -> TensorHeader:
    name = Path(path).name
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _bad_header(path, f"`{key}` in {name} lacks a dtype, a shape or its data_offsets", span)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(_count(n) for n in shape):
        raise _bad_header(path, f"the shape of `{key}` in {name} is not a list of counts", span)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_count(n) for n in offsets):
        raise _bad_header(path, f"the data_offsets of `{key}` in {name} are not two counts", span)
    dtype = DTYPE_OF_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise fail(
            "S0710", f"`{key}` in {name} has the dtype {code!r}, which surgery cannot read", span,
            notes=(f"file: {path}", f"known: {', '.join(DTYPE_OF_CODE)}"),
            help="save the checkpoint with one of the known dtypes, for example bf16",
        )  # fmt: skip
    begin, end = offsets
    need = math.prod(shape) * DTYPE_BYTES[dtype]
    if end - begin != need:
        raise _lying(path, f"`{key}` in {name} takes {end - begin} bytes but {code} {shape} needs {need}", span)
    return TensorHeader(path, key, dtype, tuple(shape), (start + begin, start + end))


def _check_layout(path: str, ordered: list[TensorHeader], start: int, size: int, span: Span | None) -> None:
    """Tensors must follow each other without overlap or gap and end with the file."""
    name, at, last = Path(path).name, start, ""
    for tensor in ordered:
        if tensor.span[0] < at:
            raise _lying(path, f"`{tensor.key}` and `{last}` in {name} overlap", span)
        if tensor.span[1] > size:
            raise _truncated(path, f"`{tensor.key}` in {name} ends at byte {tensor.span[1]} but the file has {size}", span)
        if tensor.span[0] > at:
            raise _lying(path, f"{name} has {tensor.span[0] - at} bytes before `{tensor.key}` that belong to no tensor", span)
        at, last = tensor.span[1], tensor.key
    if at < size:
        raise _lying(path, f"{name} has {size - at} bytes behind its last tensor", span)


def _truncated(path: str, message: str, span: Span | None) -> SurgeryError:
    return fail("S0707", message, span, notes=(f"file: {path}",), help="the file is incomplete: copy or download it again")


def _bad_header(path: str, message: str, span: Span | None) -> SurgeryError:
    return fail("S0708", message, span, notes=(f"file: {path}",), help="the file is damaged or no safetensors file: fetch it again")


def _lying(path: str, message: str, span: Span | None) -> SurgeryError:
    return fail(
        "S0709", message, span, notes=(f"file: {path}",), help="the file is damaged or was made to mislead: fetch it again from its source"
    )
