from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.passes.kinds.lowrank import LowRankMethod


@dataclass(frozen=True)
class Rslora(LowRankMethod):
    """LoRA with the scale that keeps its gradients stable at high rank.

    As ``lora`` in everything but the factor in front, ``alpha / sqrt(rank)`` instead of ``alpha / rank``:

        y = x W^T + b + (alpha / sqrt(rank)) (drop(x) A^T) B^T

    With ``alpha = 16, rank = 4`` the scale is 8. Folds exactly into the weight.

        adapt rslora(rank = 64, alpha = 16) on layers[*].attn.{q, k, v, o}

    Source: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, arXiv:2312.03732, theorem 3.2.
    """

    exchange: ClassVar[Mapping[str, Any] | None] = {"use_rslora": True}

    def scale(self) -> float:
        return self.alpha / math.sqrt(self.rank)
