"""NaN and infinite elements in what is merged, found in one pass over each tensor."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from surgery.core.diagnostics import fail

PIECE = 1 << 17
EXPONENT = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}
"""Bits of an infinity by type: elements with all of them set are not finite, others are below."""


def is_finite(value: Tensor) -> bool:
    """Whether no element is NaN or infinite."""
    flat = value.reshape(-1)
    edge = EXPONENT.get(value.dtype)
    for start in range(0, flat.numel(), PIECE):
        piece = flat[start : start + PIECE]
        if edge is not None:
            if int(np.bitwise_and(piece.view(torch.int16).numpy(), 0x7FFF).max()) >= edge:
                return False
        # a sum is finite only if every element is; one that overflows is looked at again
        elif not bool(torch.isfinite(piece.to(torch.float32).sum())) and not bool(torch.isfinite(piece).all()):
            return False
    return True


def finite(value: Tensor, name: str, who: str) -> None:
    """Raises S0798 for elements that are NaN or infinite; ``who`` is the checkpoint that has them, empty for the result."""
    if not is_finite(value):
        raise _fault(value, name, who)


def _fault(value: Tensor, name: str, who: str) -> Exception:
    count = int((~torch.isfinite(value)).sum())
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
