"""One forward pass of a program: whole where it is small, part by part where it is not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.model.live import Tensors, live_root
from surgery.model.program import Program
from surgery.model.threads import one_thread

SMALL_BYTES = 1 << 28
"""Size in float32 up to which a model is run whole, with weights that are kept for the next run; above, one part's weights are in memory."""


def parameters(program: Program) -> int:
    """Elements of all stored tensors, tied ones once."""
    return sum(math.prod(e.shape) for e in program.weights.values())


def is_small(program: Program) -> bool:
    return 4 * parameters(program) <= SMALL_BYTES


class Runner:
    """Runs one program on flat inputs in evaluation mode and float32, on one thread; both ways give the same bits."""

    def __init__(self, program: Program, tensors: Tensors) -> None:
        self.program = program
        self.tensors = tensors
        self._root = live_root(program, tensors, dtype=torch.float32).eval() if is_small(program) else None

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The flat outputs."""
        if self._root is not None:
            with one_thread(), torch.no_grad():
                found = self._root(*inputs)
            return tuple(found) if isinstance(found, tuple | list) else (found,)
        from surgery.model.study import Study

        return Study(self.tensors).flat_outputs(self.program, [list(inputs)])[0]


def floats(outputs: Sequence[Any]) -> list[Tensor]:
    """The floating tensors among flat outputs."""
    return [t for t in outputs if isinstance(t, Tensor) and t.is_floating_point()]


def outputs_of(program: Program) -> Callable[[Tensors, Sequence[Tensor]], list[Tensor]]:
    """The floating outputs of a program as a claim computes them. The program is read when it is first run and must not change any more."""
    made: list[Runner] = []

    def run(tensors: Tensors, inputs: Sequence[Tensor]) -> list[Tensor]:
        if not made or made[0].tensors is not tensors:
            made[:] = [Runner(program, tensors)]
        return floats(made[0](inputs))

    return run


def difference(x: torch.Tensor, y: torch.Tensor, *, relative: bool = True) -> tuple[float, float]:
    """Largest absolute difference, and the factor by which a tolerance grows for tensors of this size. The difference is infinite where shapes
    differ or a value of either is not a number."""
    error, scale = float("inf"), 1.0
    if x.shape == y.shape:
        error = float((x.double() - y.double()).abs().max()) if x.numel() else 0.0
        scale = max(1.0, float(x.abs().max())) if relative and x.numel() else 1.0
    if math.isnan(error / scale):
        error, scale = float("inf"), 1.0
    return error, scale
