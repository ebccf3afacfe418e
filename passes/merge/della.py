from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.merge import TaskMethod
from surgery.passes.kinds.merge_math import Delta, Sparsifier, add_up, elect, rows_of
from surgery.passes.kinds.merge_sparse import RankedDrop, Scaled, norm_ratio


@dataclass(frozen=True)
class Della(TaskMethod):
    """Drops entries of task vectors at random, large ones less often, and averages those whose sign is elected.

    In each row of ``n`` entries the one of rank ``r`` (1 the smallest magnitude) stays with probability

        P = (density - epsilon) + 2 epsilon (r - 1) / (n - 1)        a row of one entry: P = density

    and is divided by its ``P`` (``rescale = inverse``, the paper); ``l1`` scales each tensor to its former L1 norm instead. Signs are elected
    as in ``merge ties`` unless ``ties`` is off.

        merge della(density = 50%, epsilon = 10%) of code, math

    Source: Deep et al., "DELLA-Merging", 2024, arXiv:2406.11617, section 3.
    """

    density: float = param(0.5, "mean probability that an entry stays", min=0, max=1, unit="%", per_layer=True)
    epsilon: float = param(0.15, "half the spread of the probabilities in a row", min=0, max=0.5, unit="%")
    rescale: Literal["inverse", "l1", "none"] = param("inverse", "how what stays is scaled up")
    scale: float = param(1.0, "factor of the merged change", per_layer=True)
    ties: bool = param(True, "elect signs and average the entries that agree")
    seed: int = param(0, "changes which entries stay", min=0)

    def __post_init__(self) -> None:
        if not (0 < self.density - self.epsilon and self.density + self.epsilon < 1) and self.epsilon:
            raise ValueError("density - epsilon must be above 0 and density + epsilon below 1")

    def sparsify(self, delta: Delta, shape: Sequence[int], model: int, seed: int, prepared: tuple[Any, ...]) -> Sparsifier:
        length = rows_of(shape)[1]

        def make() -> Sparsifier:
            return RankedDrop(length, self.density, self.epsilon, self.rescale == "inverse", seed)

        return Scaled(make(), norm_ratio(delta, shape, make)) if self.rescale == "l1" else make()

    def fuse(self, parts: Sequence[Tensor], weights: Sequence[float], prepared: tuple[Any, ...]) -> Tensor:
        return (
            elect(parts, weights, weighted=False, by_weight=False, zero=1.0, reuse=True)
            if self.ties
            else add_up(parts, weights, reuse=True)
        )
