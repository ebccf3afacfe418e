"""ONNX models as files: one message, large weights beside it, several models that appear together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.backends.protocol import EmitRequest, check_target, owns
from surgery.model.atomic import AtomicOutput, afterwards, joined

INLINE_LIMIT = 1 << 30
"""Weights above this many bytes go to one external file (a protobuf cannot hold 2 GiB)."""


@dataclass(frozen=True)
class Packed:
    """The bytes of a model whose weights stand inside, made once: the checker, the session and the file read the same ones.

    ``entries`` are the model's metadata at that time. Messages that stand one behind the other are one message, so what is added to the
    metadata later is written behind the bytes.
    """

    data: bytes
    entries: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, model: Any) -> Packed | None:
        """None for a model whose weights have to stand in a file of their own."""
        if weight_bytes(model) > INLINE_LIMIT:
            return None
        return cls(model.SerializeToString(deterministic=True), _entries(model))

    def tail(self, model: Any) -> bytes | None:
        """What stands behind the bytes, None where the metadata was not only added to."""
        import onnx

        now = _entries(model)
        if now[: len(self.entries)] != self.entries:
            return None
        added = onnx.ModelProto()
        for key, value in now[len(self.entries) :]:
            item = added.metadata_props.add()
            item.key, item.value = key, value
        return added.SerializeToString(deterministic=True)


def _entries(model: Any) -> tuple[tuple[str, str], ...]:
    return tuple((p.key, p.value) for p in model.metadata_props)


def parts_of(target: Path, parts: Sequence[str]) -> list[Path]:
    """Where the models of one output stand: one is the target itself, of several each is ``NAME.PART.onnx`` beside it."""
    if len(parts) == 1:
        return [target]
    stem = target.name.removesuffix(".onnx")
    return [target.with_name(f"{stem}.{part}.onnx") for part in parts]


def check_free(paths: Sequence[Path], request: EmitRequest) -> None:
    """S0803 before any work when something of another's stands where a model of this output goes."""
    for path in paths:
        check_target(path, "onnx", request.force, request.spec_digest, request.span)


def write(models: Sequence[tuple[Path, Any, Packed | None]], request: EmitRequest) -> list[Path]:
    """Writes models whole and all together or not at all; large weights of each go to one external file beside it. A model that was packed must
    not have changed since then, but for its metadata.

    A data file is named by its content and written first, so that the model file that stands there at any moment finds its
    own data; data files of earlier models are removed last.
    """
    written: list[Path] = []
    with joined():
        for target, model, packed in models:
            written += _write(target, model, packed, request)
    return written


def _write(target: Path, model: Any, packed: Packed | None, request: EmitRequest) -> list[Path]:
    def replace(path: Path, *parts: bytes) -> None:
        with AtomicOutput(path, folder=False, force=request.force, own=lambda p: p != target or owns(p, request.spec_digest)) as temporary:
            with temporary.open("wb") as stream:
                for part in parts:
                    stream.write(part)

    tail = packed.tail(model) if packed else None
    if packed and tail is not None:
        replace(target, packed.data, tail)
        name = ""
    elif weight_bytes(model) <= INLINE_LIMIT:
        replace(target, model.SerializeToString(deterministic=True))
        name = ""
    else:
        name, data = externalise(model, target.name)
        replace(target.with_name(name), data)
        replace(target, model.SerializeToString(deterministic=True))

    def tidy() -> None:
        for old in sorted(target.parent.glob(f"{target.name}.*.data")):
            if old.name != name:
                old.unlink()

    afterwards(tidy)
    return [target, target.with_name(name)] if name else [target]


def weight_bytes(model: Any) -> int:
    """Bytes of the initializers that stand inside the message, with their names and shapes."""
    return sum(i.ByteSize() for i in model.graph.initializer)


def externalise(model: Any, stem: str) -> tuple[str, bytes]:
    """Moves all large initializers of a model into one byte string; gives the file name that the model now refers to."""
    digest = hashlib.sha256()
    large = [i for i in model.graph.initializer if len(i.raw_data) >= 1024]
    for init in large:
        digest.update(init.raw_data)
    name = f"{stem}.{digest.hexdigest()[:12]}.data"
    parts, offset = [], 0
    for init in large:
        data = init.raw_data
        for key, value in (("location", name), ("offset", str(offset)), ("length", str(len(data)))):
            item = init.external_data.add()
            item.key, item.value = key, value
        init.ClearField("raw_data")
        init.data_location = 1  # TensorProto.EXTERNAL
        parts.append(data + b"\0" * (-len(data) % 4096))
        offset += len(parts[-1])
    return name, b"".join(parts)


def inside(folder: Path, model: Any) -> Path:
    """A copy of a large model in ``folder``, its weights beside it; the model itself is left as it is."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    name, data = externalise(copy, "model")
    (folder / name).write_bytes(data)
    path = folder / "model.onnx"
    path.write_bytes(copy.SerializeToString())
    return path
