"""NaN and infinite elements in what is merged, found in one pass over each tensor."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.model.pieces import Operand, flat, whole

PIECE = 1 << 17
EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""Bits of an infinity by type: elements with all of them set are not finite, others are below."""


class NotFinite(ValueError):
    """Something that a merge read is NaN or infinite."""


def watched(chunk: Tensor) -> Tensor:
    """The float32 chunk of a task vector, which is looked at because a method may drop any of its entries. Raises :class:`NotFinite`."""
    # a sum is finite only if every element is; one that overflows is looked at again
    if not math.isfinite(float(chunk.sum())) and not bool(torch.isfinite(chunk).all()):
        raise NotFinite
    return chunk


def is_finite(value: Operand) -> bool:
    """Whether no element is NaN or infinite."""
    elements = flat(value)
    place = np.empty(min(PIECE, value.numel()), np.int16)
    edge = EXPONENT.get(value.dtype)
    for start in range(0, value.numel(), PIECE):
        piece = elements[start : start + PIECE]
        if edge is not None:
            if int(np.bitwise_and(piece.view(torch.int16).numpy(), 0x7FFF, out=place[: piece.numel()]).max()) >= edge:
                return False
        # a sum is finite only if every element is; one that overflows is looked at again
        elif not bool(torch.isfinite(piece.to(torch.float32).sum())) and not bool(torch.isfinite(piece).all()):
            return False
    return True


def finite(value: Operand, name: str, who: str) -> None:
    """Raises S0798 for elements that are NaN or infinite; ``who`` is the checkpoint that has them, empty for the result."""
    if not is_finite(value):
        raise _fault(value, name, who)


def _fault(value: Operand, name: str, who: str) -> Exception:
    count = int((~torch.isfinite(whole(value))).sum())
    if not who:
        return fail(
            "S0798", f"merging `{name}` gives values that {str(value.dtype).removeprefix('torch.')} cannot hold", exit_code=1,
            notes=(f"{count} of {value.numel():,} elements of the result are NaN or infinite, and none of what was merged",),
            help="take smaller factors, or a model of a wider type",
        )  # fmt: skip
    return fail(
        "S0798", f"`{name}` of {who} is not finite", exit_code=1, notes=(f"{count} of {value.numel():,} elements are NaN or infinite",),
        help="leave this checkpoint out, or mend it; nothing was written",
    )  # fmt: skip


def beyond(name: str, dtype: object) -> Exception:
    """S0798: models that are finite lie so far apart that their difference is not."""
    return fail(
        "S0798", f"merging `{name}` gives values that {str(dtype).removeprefix('torch.')} cannot hold", exit_code=1,
        notes=("the models are finite, and the difference of two of them is beyond float32",), help="leave the model out that lies so far away",
    )  # fmt: skip
