"""Weights that are written in a narrower type: what half precision has no number for is an error, and no infinity in a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from surgery.core.diagnostics import Label, SurgeryError, fail
from surgery.core.source import Span


def narrowed(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``value`` in ``dtype``. Raises S0874 where a finite number becomes infinite in float16."""
    out = value.to(dtype)
    if dtype == torch.float16 and value.dtype in (torch.float32, torch.float64, torch.bfloat16) and value.numel():
        lost = torch.isinf(out) & torch.isfinite(value)
        if bool(lost.any()):
            size = float(value[lost].abs().max())
            raise fail(
                "S0874", f"`{name}` overflows in fp16: it holds {size:.6g}, and the largest number is 65504", None,
                help="nothing was written; write `dtype = bf16`, which has the range of fp32, or `fp32`",
            )  # fmt: skip
    return out


@contextmanager
def placing(span: Span | None) -> Iterator[None]:
    """Gives an S0874 or S0888 from where no statement is known the place of the one that asked for the type."""
    try:
        yield
    except SurgeryError as exc:
        if span is None or any(d.code not in ("S0874", "S0888") or d.labels for d in exc.diagnostics):
            raise
        found = [replace(d, labels=(Label(span, "asked for here"),)) for d in exc.diagnostics]
        raise SurgeryError(*found, exit_code=exc.exit_code) from None
