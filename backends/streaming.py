"""Weights for writing: kept where a model is small, one tensor at a time where it is not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from surgery.model.program import Program
from surgery.model.realise import Realiser

KEPT_BYTES = 1 << 30
"""Up to this size in float32 weights that were realised for earlier checks are used again and what was written is run; above, weights are
streamed and the output is judged by names and shapes."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "": ""}


class _Kept(Mapping[str, torch.Tensor]):
    def __init__(self, program: Program, tensors: Any) -> None:
        self.program, self.tensors = program, tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self.tensors.of(self.program, name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.program.weights)

    def __len__(self) -> int:
        return len(self.program.weights)


def parameters(program: Program) -> int:
    """Elements of all stored tensors, tied ones once."""
    return sum(math.prod(e.shape) for e in program.weights.values())


def is_small(program: Program) -> bool:
    return 4 * parameters(program) <= KEPT_BYTES


def weights(program: Program, tensors: Any) -> Mapping[str, torch.Tensor]:
    """The program's tensors by name, to be asked for in the order of ``program.weights``."""
    return _Kept(program, tensors) if is_small(program) else Realiser(program.weights, tensors.functions)
