"""Bytes of a tensor in order and in blocks, straight from the files that store it: whole tensors, and selections of them.

A tensor that is only copied, or that loses rows and columns, need not be in memory at once. Its bytes are read into a few buffers that are used
again and again, so that neither large blocks nor fresh memory are needed. Every other expression is computed as a tensor (:mod:`surgery.model.realise`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from surgery.model.stored import gone, positions
from surgery.model.weights import Concat, Expr, Load, Reshape, Select, Stack

BLOCK = 4 << 20
"""Most bytes of a piece, where nobody asks for less."""
RUN = 1 << 12
"""Bytes of one index of a later axis from which on every index is read by itself; smaller ones are gathered from whole rows."""
GAP = 1 << 16
"""Bytes between two runs up to which they are read with one call, the gap into a place that nobody looks at."""
MANY_BUFFERS = 1000
"""Buffers that the system takes in one call (``IOV_MAX`` is 1024)."""

Fill = Callable[[memoryview], None]
Run = tuple[int, int]


@dataclass(frozen=True)
class Stream:
    """The bytes of a contiguous tensor of ``shape`` and ``dtype`` in order.

    ``pieces(limit)`` gives ``(size, fill)``: ``fill`` puts the next ``size`` bytes (at most ``limit``) into a buffer of this size, and must be called before
    the next piece is asked for. ``limit`` is at least ``unit``, and every piece but the last has the largest multiple of ``unit`` that ``limit`` allows;
    with ``unit`` 0 pieces have any size. Raises S0721 when a file cannot be read any more.
    """

    shape: tuple[int, ...]
    dtype: str
    unit: int
    pieces: Callable[[int], Iterator[tuple[int, Fill]]]


def stream_of(expr: Expr, limit: int = BLOCK) -> Stream | None:
    """The stream of an expression over stored tensors; None where it has to be computed, or where one row is larger than ``limit``."""
    match expr:
        case Concat(axis=0) | Stack(axis=0):
            parts = [stream_of(part, limit) for part in expr.parts]
            if any(part is None for part in parts):
                return None
            chained = [part for part in parts if part is not None]
            return Stream(expr.shape, expr.dtype, 0, partial(_chained, chained))
        case Load():
            return Stream(expr.shape, expr.dtype, 1, partial(_read_runs, expr, lambda: iter([(0, expr.nbytes)])))
        case Select():
            return _selected(expr, limit)
        case Reshape(permute=()):  # the same bytes in the same order
            source = stream_of(expr.source, limit)
            return None if source is None else replace(source, shape=expr.shape)
    return None


def _selected(expr: Select, limit: int) -> Stream | None:
    """A selection of a stored tensor: along one axis, or of a matrix along both."""
    chosen: list[Select] = []
    source: Expr = expr
    while isinstance(source, Select):
        chosen.append(source)
        source = source.source
    if not isinstance(source, Load) or not expr.nbytes or len(chosen) > 1 + (len(expr.shape) == 2):
        return None
    if len(chosen) == 2 and chosen[0].axis == chosen[1].axis:
        return None
    size = source.nbytes // math.prod(source.shape)
    rows = next((s for s in chosen if math.prod(source.shape[s.axis + 1 :]) * size >= RUN or s.axis == 0), None)
    columns = next((s for s in chosen if s is not rows), None)
    read = partial(
        _read_runs, source, (lambda: iter([(0, source.nbytes)])) if rows is None else partial(_runs, source, rows.axis, rows.ranges)
    )
    if columns is None:
        return Stream(expr.shape, expr.dtype, 1, read)
    inner = math.prod(source.shape[columns.axis + 1 :]) * size
    row = source.shape[columns.axis] * inner
    if row > limit:
        return None
    kept = expr.shape[columns.axis] * inner
    return Stream(expr.shape, expr.dtype, kept, partial(_gathered, read, row, kept, inner, size, columns.ranges))


# ---------------------------------------------------------------- runs of bytes


def _runs(load: Load, axis: int, ranges: tuple[Run, ...]) -> Iterator[Run]:
    """Where a selection stands in the bytes of a tensor."""
    inner = load.nbytes // math.prod(load.shape[: axis + 1])
    for outer in range(math.prod(load.shape[:axis])):
        base = outer * load.shape[axis]
        for start, stop in ranges:
            yield (base + start) * inner, (base + stop) * inner


def _read_runs(load: Load, runs: Callable[[], Iterator[Run]], limit: int) -> Iterator[tuple[int, Fill]]:
    try:
        file = open(load.file, "rb", buffering=0)
    except OSError as exc:
        raise gone(load, exc.strerror or str(exc)) from None
    with file:
        for piece in _packed(runs(), limit):
            yield sum(stop - start for start, stop in piece), partial(_fill, load, file.fileno(), piece)


def _packed(runs: Iterator[Run], limit: int) -> Iterator[list[Run]]:
    """Runs, cut where a piece is full."""
    piece: list[Run] = []
    room = limit
    for start, stop in runs:
        while start < stop:
            end = min(stop, start + room)
            piece.append((start, end))
            room -= end - start
            start = end
            if not room:
                yield piece
                piece, room = [], limit
    if piece:
        yield piece


_nowhere = bytearray(GAP)
"""Bytes between runs land here, from any thread."""


def _fill(load: Load, descriptor: int, runs: list[Run], view: memoryview) -> None:
    """Runs that lie close together are read by one call."""
    at = first = 0
    while first < len(runs):
        start, end = runs[first]
        buffers = [view[at : at + end - start]]
        at += end - start
        first += 1
        while first < len(runs) and len(buffers) < MANY_BUFFERS and 0 <= runs[first][0] - end <= GAP:
            between, (begin, stop) = runs[first][0] - end, runs[first]
            if between:
                buffers.append(memoryview(_nowhere)[:between])
            buffers.append(view[at : at + stop - begin])
            at += stop - begin
            end = stop
            first += 1
        _read_all(load, descriptor, buffers, load.span[0] + start, end - start)


def _read_all(load: Load, descriptor: int, buffers: list[memoryview], offset: int, size: int) -> None:
    try:
        count = os.preadv(descriptor, buffers, offset)
        while count < size:  # a signal or a limit of the system cut it short, or the file ends here
            done, left = count, []
            for buffer in buffers:
                if done < len(buffer):
                    left.append(buffer[done:])
                done = max(0, done - len(buffer))
            more = os.preadv(descriptor, left, offset + count)
            if more == 0:
                raise gone(load, "the file is shorter than when it was opened")
            count += more
    except OSError as exc:
        raise gone(load, exc.strerror or str(exc)) from None


# ---------------------------------------------------------------- columns, several parts


def _gathered(
    read: Callable[[int], Iterator[tuple[int, Fill]]], row: int, kept: int, inner: int, size: int, ranges: tuple[Run, ...], limit: int
) -> Iterator[tuple[int, Fill]]:
    """Whole rows of ``row`` bytes are read, and of each the chosen indices of ``inner`` bytes kept."""
    many = max(1, limit // kept)
    place = bytearray(many * row)
    whole = np.frombuffer(place, np.uint8)
    index = positions(ranges).numpy()

    def fill(pull: Fill, count: int, view: memoryview) -> None:
        pull(memoryview(place)[: count * row])
        kind = f"u{size}"
        source = whole[: count * row].view(kind).reshape(count, row // inner, inner // size)
        np.take(source, index, axis=1, out=np.frombuffer(view, kind).reshape(count, kept // inner, inner // size), mode="clip")

    for length, pull in read(many * row):
        yield length // row * kept, partial(fill, pull, length // row)


def _chained(parts: list[Stream], limit: int) -> Iterator[tuple[int, Fill]]:
    for part in parts:
        yield from part.pieces(limit)
