"""The leaves of expressions: bytes of stored tensors, read exactly, and seeded start values."""

from __future__ import annotations

import math
import os
import warnings
from mmap import ACCESS_COPY, ALLOCATIONGRANULARITY, mmap

import numpy as np
import torch

from surgery.core.diagnostics import fail
from surgery.model.room import room
from surgery.model.weights import Init, Load


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a short name such as ``bfloat16``."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def initial_value(expr: Init) -> torch.Tensor:
    """A start value. Random ones are drawn in float32 by one generator per tensor, seeded by the expression."""
    dtype = torch_dtype(expr.dtype)
    match expr.kind:
        case "zeros":
            return torch.zeros(expr.shape, dtype=dtype)
        case "ones":
            return torch.ones(expr.shape, dtype=dtype)
        case "constant":
            return torch.full(expr.shape, expr.args[0]).to(dtype)
        case "arange":
            return torch.arange(expr.shape[-1]).to(dtype).expand(expr.shape).contiguous()
        case "normal" | "uniform":
            generator = torch.Generator().manual_seed(expr.seed)
            value = torch.empty(expr.shape, dtype=torch.float32)
            draw = value.normal_ if expr.kind == "normal" else value.uniform_
            return draw(*expr.args, generator=generator).to(dtype)
    raise ValueError(f"no initial value of kind {expr.kind!r}")


def read(expr: Load) -> torch.Tensor:
    """All bytes of a stored tensor. S0721 when the file is gone or shorter than when it was opened."""
    out = room(expr.shape, torch_dtype(expr.dtype))
    if out.numel():
        view = memoryview(out.reshape(-1).view(torch.uint8).numpy())
        _read_into(expr, expr.span[0], view)
    return out


def _read_into(expr: Load, offset: int, view: memoryview) -> None:
    done = 0
    try:
        with open(expr.file, "rb", buffering=0) as file:
            while done < len(view):
                count = os.preadv(file.fileno(), [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
    except OSError as exc:
        raise gone(expr, exc.strerror or str(exc)) from None
    if done < len(view):
        raise gone(expr, "the file is shorter than when it was opened")


def gone(expr: Load, why: str) -> Exception:
    """S0721: a stored tensor cannot be read any more."""
    return fail(
        "S0721", f"cannot read `{expr.key}` from {expr.file}: {why}", exit_code=2,
        help="leave the checkpoint alone while surgery runs, and start again",
    )  # fmt: skip


MANY = 64
"""Ranges of an axis beyond which one gathering is faster than so many copies."""


def positions(ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """The positions that ranges name, in order."""
    starts = torch.tensor([start for start, _ in ranges])
    lengths = torch.tensor([stop - start for start, stop in ranges])
    ends = lengths.cumsum(0)
    return torch.arange(int(ends[-1])) + torch.repeat_interleave(starts - ends + lengths, lengths)


def take(value: torch.Tensor, axis: int, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Index ranges of a tensor, gathered as plain bits: NumPy does this several times faster than torch where single elements go."""
    index = positions(ranges)
    if value.is_complex() or value.numel() == 0:
        return value.index_select(axis, index)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    out = room((*value.shape[:axis], len(index), *value.shape[axis + 1 :]), value.dtype)
    np.take(value.contiguous().view(bits).numpy(), index.numpy(), axis=axis, out=out.view(bits).numpy(), mode="clip")
    return out


def read_part(expr: Load, axis: int, ranges: tuple[tuple[int, int], ...]) -> torch.Tensor:
    """Index ranges of a stored tensor. Ranges of the first axis are read byte-exactly; those of others are copied out of a
    mapping of the tensor, so that only the pages they touch are read, and nothing stays mapped."""
    size = sum(stop - start for start, stop in ranges)
    out = room((*expr.shape[:axis], size, *expr.shape[axis + 1 :]), torch_dtype(expr.dtype))
    if out.numel() == 0:
        return out
    if len(ranges) > MANY and 4 * out.numel() >= math.prod(expr.shape):
        return take(read(expr), axis, ranges)  # most of it is needed, in small pieces
    if axis == 0:
        row = expr.nbytes // expr.shape[0]
        view, at = memoryview(out.reshape(-1).view(torch.uint8).numpy()), 0
        for start, stop in ranges:
            _read_into(expr, expr.span[0] + start * row, view[at : at + (stop - start) * row])
            at += (stop - start) * row
        return out
    begin = expr.span[0] - expr.span[0] % ALLOCATIONGRANULARITY
    try:
        with open(expr.file, "rb") as file:
            if os.fstat(file.fileno()).st_size < expr.span[1]:
                raise gone(expr, "the file is shorter than when it was opened")
            mapping = mmap(file.fileno(), expr.span[1] - begin, access=ACCESS_COPY, offset=begin)
    except OSError as exc:
        raise gone(expr, exc.strerror or str(exc)) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = torch.frombuffer(mapping, dtype=torch.uint8, offset=expr.span[0] - begin)
    if raw.data_ptr() % out.element_size():
        raw = raw.clone()
    stored = raw.view(out.dtype).view(expr.shape)
    at = 0
    for start, stop in ranges:
        out.narrow(axis, at, stop - start).copy_(stored.narrow(axis, start, stop - start))
        at += stop - start
    del stored, raw
    return out
