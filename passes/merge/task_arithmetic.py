from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.merge import TaskMethod
from surgery.passes.kinds.merge_math import add_up


@dataclass(frozen=True)
class TaskArithmetic(TaskMethod):
    """Adds the weighted differences of fine-tuned checkpoints to their base.

        theta = theta_0 + scale * sum_i w_i (theta_i - theta_0)        with `normalize` divided by sum_i w_i

    ``theta_0`` is the model as the lines above left it. A negative factor takes a skill away.

        merge task_arithmetic(scale = 0.8) of code * 1, math * 0.5

    Source: Ilharco et al., "Editing models with task arithmetic", 2023, arXiv:2212.04089, section 2.
    """

    scale: float = param(1.0, "factor of the summed change", per_layer=True)
    normalize: bool = param(False, "divide by the sum of the factors")

    def check(self, weights: Sequence[float]) -> str:
        return "the factors sum to zero, and it divides by their sum" if self.normalize and abs(sum(weights)) < 1e-8 else ""

    def fuse(self, parts: Sequence[Tensor], weights: Sequence[float], prepared: tuple[Any, ...]) -> Tensor:
        return add_up(parts, weights, sum(weights) if self.normalize else 1.0, reuse=True)
