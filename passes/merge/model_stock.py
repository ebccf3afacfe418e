from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.merge import MergeMethod


@dataclass(frozen=True)
class ModelStock(MergeMethod):
    """Moves the average of fine-tuned checkpoints towards their base as far as their angle says.

    With ``d_i = theta_i - theta_0``, ``c`` the mean cosine of all pairs and ``N`` models:

        t = N c / (1 + (N - 1) c),        theta = t mean_i(theta_i) + (1 - t) theta_0

    The angle is of the whole tensor or, with ``rows``, of each row. The factors behind ``of`` are not used.

        merge model_stock of first, second

    Source: Jang et al., "Model Stock", 2024, arXiv:2403.19522, section 4.
    """

    models: ClassVar[tuple[int, int | None]] = (2, None)

    rows: bool = param(False, "an angle for each row")

    def check(self, weights: Sequence[float]) -> str:
        return "" if all(w == 1 for w in weights) else "it takes no factors: the angle between the models decides"

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        n = len(experts)
        length = base.shape[-1] if self.rows and base.dim() > 1 else base.numel()
        start = base.to(torch.float32).reshape(-1, length)
        offsets = [e.to(torch.float32).reshape(-1, length) - start for e in experts]
        norms = [o.double().norm(dim=1, keepdim=True) for o in offsets]
        cosines = [
            ((offsets[i].double() * offsets[j].double()).sum(1, keepdim=True) / (norms[i] * norms[j]).clamp_min(1e-6)).clamp(-1, 1)
            for i in range(n) for j in range(i)
        ]  # fmt: skip
        c = sum(cosines[1:], cosines[0]) / len(cosines)
        t = (n * c / (1 + (n - 1) * c)).float()
        mean = sum(offsets[1:], offsets[0]) / n
        return (start + t * mean).reshape(base.shape)
