"""Claims about a change of structure, measured on sample inputs before anything is emitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from surgery.core.source import NOWHERE, Span
from surgery.model.live import Tensors
from surgery.model.program import Program

Outputs = list[Tensor]


@dataclass(frozen=True)
class Claim:
    """``expected`` and ``found`` give equal floating outputs on equal flat inputs, up to ``tolerance``.

    ``text`` is what the certificate says (``removed = masked``). Both functions take the realised tensors and flat inputs as
    ``sample_inputs`` makes them for ``program``, and return the flat floating outputs of one forward pass in evaluation mode.
    """

    text: str
    program: Program
    expected: Callable[[Tensors, Sequence[Tensor]], Outputs]
    found: Callable[[Tensors, Sequence[Tensor]], Outputs]
    tolerance: float = 1e-5
    span: Span = NOWHERE
    inputs: str = ""
    """What stands in place of sample inputs where both functions have their own: they are then called once, with none."""
