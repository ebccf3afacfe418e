from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.model.pieces import Operand
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.merge_angles import Along, gram, weave
from surgery.passes.kinds.merge_math import delta_of


@dataclass(frozen=True)
class ModelStock(MergeMethod):
    """Moves the average of fine-tuned checkpoints towards their base as far as their angle says.

    With ``d_i = theta_i - theta_0``, ``c`` the mean cosine of all pairs and ``N`` models:

        t = N c / (1 + (N - 1) c),        theta = t mean_i(theta_i) + (1 - t) theta_0

    The angle is of the whole tensor or, with ``rows``, of each row; where ``1 + (N - 1) c`` vanishes the base stays. The factors behind ``of`` are not used.

        merge model_stock of first, second

    Source: Jang et al., "Model Stock", 2024, arXiv:2403.19522, section 4.
    """

    by_pieces: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (2, None)

    rows: bool = param(False, "an angle for each row")

    def check(self, weights: Sequence[float]) -> str:
        return "" if all(w == 1 for w in weights) else "it takes no factors: the angle between the models decides"

    def merge(self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        n = len(experts)
        along: Along = "row" if self.rows and base.dim() > 1 else "tensor"
        shape = tuple(base.shape) or (1,)
        offsets = [delta_of(e, base) for e in experts]
        inner = gram(offsets, shape, along)
        cosines = [
            (inner[i, j] / (inner[i, i].sqrt() * inner[j, j].sqrt()).clamp_min(1e-6)).clamp(-1, 1)
            for i in range(n) for j in range(i)
        ]  # fmt: skip
        c = sum(cosines[1:], cosines[0]) / len(cosines)
        spread = 1 + (n - 1) * c
        alone = spread.abs() < 1e-6  # the models pull apart so far that nothing of their mean is left
        t = torch.where(alone, torch.zeros_like(c), n * c / torch.where(alone, torch.ones_like(c), spread))
        return weave(offsets, [t / n] * n, shape, along, base, base)
