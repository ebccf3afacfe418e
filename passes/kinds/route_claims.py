"""The promise that experts compute at the start what the dense block computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.core.source import Span
from surgery.model.claims import Claim, Outputs
from surgery.model.live import Tensors, live_root
from surgery.model.program import Program


def same_as_dense(before: Program, after: Program, span: Span) -> Claim:
    """The outputs of the whole model before and after the conversion, in float32."""

    def run(program: Program, tensors: Tensors, inputs: Sequence[Tensor]) -> Outputs:
        root = live_root(program, tensors, dtype=torch.float32).eval()
        with torch.no_grad():
            found = root(*inputs)
        return [t for t in found if isinstance(t, Tensor) and t.is_floating_point()]

    return Claim(
        "experts = dense at init", after, lambda tensors, inputs: run(before, tensors, inputs),
        lambda tensors, inputs: run(after, tensors, inputs), 1e-5, span,
    )  # fmt: skip
