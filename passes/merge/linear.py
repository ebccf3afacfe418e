from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.merge_math import add_up, chunks


@dataclass(frozen=True)
class Linear(MergeMethod):
    """The weighted average of checkpoints.

        theta = sum_i w_i theta_i / sum_i w_i        without `normalize` the sum itself

    Computed in float32 and rounded once to the stored type.

        merge linear of first * 0.7, second * 0.3

    Source: Wortsman et al., "Model soups", 2022, arXiv:2203.05482, section 2.
    """

    models: ClassVar[tuple[int, int | None]] = (1, None)

    normalize: bool = param(True, "divide by the sum of the factors")

    def check(self, weights: Sequence[float]) -> str:
        return "the factors sum to zero, and it divides by their sum" if self.normalize and abs(sum(weights)) < 1e-8 else ""

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        divisor = sum(weights) if self.normalize else 1.0
        factors = [w / divisor for w in weights]
        if len(experts) == 1 and factors == [1.0]:
            return experts[0]
        out = torch.empty_like(base)
        into, views = out.view(-1), [e.reshape(-1) for e in experts]
        for at in chunks(base.shape):
            into[at] = add_up([v[at].to(torch.float32) for v in views], factors)
        return out
