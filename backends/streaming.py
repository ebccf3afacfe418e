"""Weights for writing: kept where a model is small, one tensor at a time where it is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from surgery.model.program import Program
from surgery.model.realise import Realiser
from surgery.model.running import is_small

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


def weights(program: Program, tensors: Any) -> Mapping[str, torch.Tensor]:
    """The program's tensors by name, to be asked for in the order of ``program.weights``."""
    return _Kept(program, tensors) if is_small(program) else Realiser(program.weights, tensors.functions)
