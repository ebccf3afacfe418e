from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.merge import TaskMethod
from surgery.passes.kinds.merge_math import Delta, Sparsifier, add_up, elect, rows_of
from surgery.passes.kinds.merge_sparse import Band, RowBand, nothing, top


@dataclass(frozen=True)
class Breadcrumbs(TaskMethod):
    """Cuts the largest and the smallest entries off task vectors and adds what lies between.

    In each row (``per = row``, the paper) or tensor the fraction ``gamma`` of largest magnitude goes first; of what is left the largest stay,
    so that ``density`` of all entries are kept, and the rest goes.

        theta = theta_0 + scale * sum_i w_i tau~_i

    Exactly ``int(density n)`` entries are kept and ``int(gamma n)`` cut off the top, fewer where that would leave too few; of equal ones the first counts as
    larger. With ``ties`` signs are elected as in
    ``merge ties``.

        merge breadcrumbs(density = 15%, gamma = 0.6%, scale = 0.2) of code, math

    Source: Davari and Belilovsky, "Model Breadcrumbs", 2024, arXiv:2312.06795, section 3.
    """

    by_pieces: ClassVar[bool] = False  # ranking goes over every tensor a few times
    version: ClassVar[int] = 2
    """1 kept fewer entries where both shares together are more than all."""

    density: float = param(0.15, "fraction that is kept", min=0, max=1, unit="%", per_layer=True)
    gamma: float = param(0.006, "fraction of largest entries that goes", min=0, max=1, unit="%", per_layer=True)
    per: Literal["row", "tensor"] = param("row", "what the fractions are of")
    scale: float = param(0.2, "factor of the merged change", per_layer=True)
    ties: bool = param(False, "elect signs and average the entries that agree")

    def sparsify(self, delta: Delta, shape: Sequence[int], model: int, seed: int, prepared: tuple[Any, ...]) -> Sparsifier:
        n = rows_of(shape)[1] if self.per == "row" else math.prod(shape)
        gone = min(int(self.gamma * n), n - int(self.density * n))
        kept = gone + int(self.density * n)
        if self.per == "row":
            return RowBand(n, gone, kept)
        inner = top(delta, shape, gone) if gone else nothing
        return Band(top(delta, shape, kept), inner)

    def fuse(self, parts: Sequence[Tensor], weights: Sequence[float], prepared: tuple[Any, ...]) -> Tensor:
        return (
            elect(parts, weights, weighted=False, by_weight=False, zero=1.0, reuse=True)
            if self.ties
            else add_up(parts, weights, reuse=True)
        )
