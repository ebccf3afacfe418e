"""Writing safetensors files tensor by tensor: the header first, since shapes are known, then each tensor as it is made."""

from __future__ import annotations

import json
import math
import struct
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from surgery.model.atomic import storage_errors
from surgery.model.checkpoint_headers import CODE_OF_DTYPE
from surgery.model.flows import Parts
from surgery.model.lanes import Buffers, Ledger, in_order
from surgery.model.placed import Pen, Placed, placeable
from surgery.model.stored import torch_dtype
from surgery.model.streams import BLOCK, Stream
from surgery.model.weights import DTYPE_BYTES
from surgery.model.writer import WAITING, Writer

MAX_SHARD_BYTES = 5_000_000_000
Progress = Callable[[str, int], None]
"""Called with a tensor's name and its bytes after it was written."""


@dataclass(frozen=True)
class Written:
    """``files`` in order (an index last), ``shard_of`` the file name of each tensor, ``total`` bytes of all tensors, ``digests`` the sha256
    of files with tensors and ``checked`` the bytes of each that were read back, where it was asked for."""

    files: tuple[Path, ...]
    shard_of: dict[str, str]
    total: int
    digests: dict[Path, str] = field(default_factory=dict)
    checked: dict[Path, int] = field(default_factory=dict)


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[list[str]]:
    """Names by shard, in order: a shard is closed before the tensor that would make it too large; a larger tensor stands alone."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_safetensors(
    target: str | Path,
    tensors: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    workers: int = 0,
    costs: Mapping[str, int] | None = None,
    soon: Callable[[str], None] | None = None,
    hashing: bool = False,
    checking: bool = False,
    streams: Mapping[str, Stream] | None = None,
    parts: Callable[[str, ExitStack], Parts | None] | None = None,
) -> Written:
    """Stream tensors to one safetensors file or to shards with an index.

    ``tensors[name]`` gives a tensor or a function that makes it; it is asked for once, in the order of ``shapes``, and dropped when
    written. A ``target`` that ends in ``.safetensors`` is that one file; a folder gets ``model.safetensors``, or shards
    ``model-00001-of-0000N.safetensors`` and ``model.safetensors.index.json`` when the total exceeds ``max_shard_bytes``.
    With ``workers`` so many threads make tensors while others are written (``tensors`` must allow that); ``costs`` are the bytes that making
    each one needs, which bound how many are made at once, and ``soon`` is told of a tensor before it is made. ``hashing`` gives the sha256 of the
    files that hold tensors, ``checking`` reads every byte back and compares it with what was made. ``streams`` give the bytes of tensors that are
    never in memory as a whole; one that has another shape or dtype than promised is not used. ``parts`` gives a tensor of its promised type in parts, or
    None; it is asked in place of ``tensors`` where the threads that make tensors write them themselves (:mod:`surgery.model.placed`: several workers, and
    nothing is hashed). The bytes depend on tensors, shapes, dtypes and metadata alone.

    Raises SurgeryError S0801 (no space), S0802 (not writable), S0804 (other failure of the storage).
    """
    target = Path(target)
    sizes = {name: math.prod(shape) * DTYPE_BYTES[dtypes[name]] for name, shape in shapes.items()}
    metadata = {"format": "pt"} if metadata is None else dict(metadata)
    single = target.suffix == ".safetensors"
    shards = [list(sizes)] if single else plan_shards(sizes, max_shard_bytes)
    if single:
        paths = [target]
    elif len(shards) == 1:
        paths = [target / "model.safetensors"]
    else:
        paths = [target / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    flowing = {n: s for n, s in (streams or {}).items() if n in shapes and (s.shape, s.dtype) == (tuple(shapes[n]), dtypes[n])}
    headers = {path: header_bytes(inside, shapes, dtypes, metadata) for path, inside in zip(paths, shards, strict=True)}
    work = _Work(tensors, shapes, dtypes, sizes, flowing, workers, costs or {}, soon, progress)
    digests: dict[Path, str] = {}
    if workers > 0 and not hashing and placeable(paths):
        checked = work.in_places(headers, shards, checking, parts)
    else:
        digests, checked = work.one_by_one(headers, shards, hashing, checking)
    shard_of = {name: path.name for path, names in zip(paths, shards, strict=True) for name in names}
    total = sum(sizes.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": shard_of}
        index_path = target / "model.safetensors.index.json"
        with storage_errors(index_path):
            index_path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        paths.append(index_path)
    return Written(tuple(paths), shard_of, total, digests, checked)


@dataclass(frozen=True)
class _Work:
    """What :func:`write_safetensors` was asked for."""

    tensors: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    sizes: Mapping[str, int]
    flowing: Mapping[str, Stream]
    workers: int
    costs: Mapping[str, int]
    soon: Callable[[str], None] | None
    progress: Progress | None

    def one_by_one(
        self, headers: Mapping[Path, bytes], shards: list[list[str]], hashing: bool, checking: bool
    ) -> tuple[dict[Path, str], dict[Path, int]]:
        """Files are filled in order, from the first byte to the last; their hashes, and the bytes that were compared."""
        ledger = Ledger()
        buffers = Buffers(WAITING + 3, BLOCK)
        names = [name for shard in shards for name in shard if name not in self.flowing]
        ahead = deque(name for shard in shards for name in shard if name in self.flowing)
        made = in_order(names, self.make, self.workers, self.costs, self.sizes, ledger, self.soon)
        try:
            with Writer(self.workers > 0, hashing, checking) as writer:
                for (path, header), inside in zip(headers.items(), shards, strict=True):
                    writer.begin(path, header)
                    for name in inside:
                        if name in self.flowing:
                            ahead.popleft()
                            if self.soon is not None and ahead:
                                self.soon(ahead[0])
                            _flow(writer, self.flowing[name], buffers)
                        else:
                            size = self.sizes[name]
                            writer.write(next(made), lambda size=size: ledger.give(size) if writer.threaded else None)  # type: ignore[misc]
                        self.tell(name)
        finally:
            made.close()
        return dict(writer.digests), dict(writer.checked)

    def in_places(
        self,
        headers: Mapping[Path, bytes],
        shards: list[list[str]],
        checking: bool,
        parts: Callable[[str, ExitStack], Parts | None] | None,
    ) -> dict[Path, int]:
        """Whoever makes a tensor writes it, too; the bytes that were compared."""
        places: dict[str, tuple[Path, int]] = {}
        for path, inside in zip(headers, shards, strict=True):
            at = 0
            for name in inside:
                places[name] = path, at
                at += self.sizes[name]
        ledger, nothing = Ledger(), torch.empty(0)
        counts = {path: len(inside) for path, inside in zip(headers, shards, strict=True)}
        with Placed(dict(headers), counts, checking) as placed:

            def put(name: str) -> torch.Tensor:
                self.put(name, placed.pen(*places[name]), parts)
                placed.done(places[name][0])
                return nothing

            made = in_order(list(places), put, self.workers, self.costs, self.sizes, ledger, self.soon)
            try:
                for name, _ in zip(places, made, strict=True):
                    ledger.give(self.sizes[name])
                    self.tell(name)
            finally:
                made.close()
        return placed.checked

    def put(self, name: str, pen: Pen, parts: Callable[[str, ExitStack], Parts | None] | None) -> None:
        stream = self.flowing.get(name)
        if stream is not None:
            block = pen.block if stream.unit <= len(pen.block) else memoryview(bytearray(BLOCK))
            for size, fill in stream.pieces(len(block)):
                fill(block[:size])
                pen.put(block[:size])
            return
        with ExitStack() as files, torch.no_grad():
            found = None if parts is None else parts(name, files)
            if found is not None:
                start = pen.at
                pen.parts(found, torch_dtype(self.dtypes[name]))
                if pen.at - start != self.sizes[name]:
                    raise ValueError(f"{name}: promised {self.sizes[name]} bytes, got {pen.at - start} in parts")
                return
        pen.tensor(self.make(name))

    def make(self, name: str) -> torch.Tensor:
        value = self.tensors[name]
        made = value if isinstance(value, torch.Tensor) else value()
        assert isinstance(made, torch.Tensor), name
        if tuple(made.shape) != tuple(self.shapes[name]) or str(made.dtype) != f"torch.{self.dtypes[name]}":
            raise ValueError(f"{name}: promised {self.dtypes[name]}{list(self.shapes[name])}, got {made.dtype}{list(made.shape)}")
        return made.detach().contiguous()

    def tell(self, name: str) -> None:
        if self.progress is not None:
            self.progress(name, self.sizes[name])


def _flow(writer: Writer, stream: Stream, buffers: Buffers) -> None:
    for size, fill in stream.pieces(buffers.size):
        buffer = buffers.take(writer.raise_fault)
        fill(buffer[:size])
        writer.put(buffer[:size], partial(buffers.give, buffer))


def header_bytes(names: list[str], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON header of a file, padded with spaces so that data starts at a multiple of 8 bytes."""
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for name in names:
        end = at + math.prod(shapes[name]) * DTYPE_BYTES[dtypes[name]]
        table[name] = {"dtype": CODE_OF_DTYPE[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
