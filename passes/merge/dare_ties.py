from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.adapter_method import Refactored
from surgery.passes.kinds.merge_math import Delta, Sparsifier, elected
from surgery.passes.kinds.merge_sparse import dropped


@dataclass(frozen=True)
class DareTies(Refactored):
    """Drops entries of task vectors at random, as ``merge dare`` does, and averages those whose sign is elected.

    The election is that of ``merge ties``: ``elect`` and ``divide`` have the same meaning, a sum of zero counts as plus. ``rescale = l1,
    elect = weighted, divide = none`` is what merging tools commonly call DARE-TIES.

        merge dare_ties(density = 20%) of code, math

    Source: Yu et al., "Language Models are Super Mario", 2024, arXiv:2311.03099; Yadav et al., "TIES-Merging", 2023, arXiv:2306.01708.
    """

    version: ClassVar[int] = 4
    """1 drew from torch's generator, 2 drew 16 bits an entry, 3 drew 8."""

    density: float = param(0.1, "probability that an entry of a task vector stays", min=0, max=1, unit="%", per_layer=True)
    rescale: Literal["inverse", "l1", "none"] = param("inverse", "how what stays is scaled up")
    scale: float = param(1.0, "factor of the merged change", per_layer=True)
    seed: int = param(0, "changes which entries stay", min=0)
    elect: Literal["before", "weighted"] = param("before", "whether signs are elected before or after the factors are applied")
    divide: Literal["count", "weight", "none"] = param("count", "what the mean divides by; `none` leaves the sum of what agrees")

    def check(self, weights: Sequence[float]) -> str:
        return "the factors sum to zero, and it divides by their sum" if self.divide == "weight" and abs(sum(weights)) < 1e-8 else ""

    def sparsify(self, delta: Delta, shape: Sequence[int], model: int, seed: int, prepared: tuple[Any, ...]) -> Sparsifier:
        return dropped(self.density, self.rescale, seed)

    def fuse(self, parts: Sequence[Tensor], weights: Sequence[float], prepared: tuple[Any, ...]) -> Tensor:
        return elected(parts, weights, self.elect, self.divide)
