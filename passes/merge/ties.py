from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.adapter_method import Refactored
from surgery.passes.kinds.merge_global import rank
from surgery.passes.kinds.merge_inputs import Operands, Source
from surgery.passes.kinds.merge_math import Delta, Sparsifier, elected
from surgery.passes.kinds.merge_sparse import Top, top
from surgery.passes.operation import Resolved


@dataclass(frozen=True)
class Ties(Refactored):
    """Trims task vectors, elects a sign for each entry, and averages the entries that agree.

    1. of each ``tau_i = theta_i - theta_0`` the fraction ``density`` of largest magnitude stays: of the whole model (``trim = global``, the
       paper, with one density for all layers) or of each tensor (``trim = tensor``)
    2. the sign of an entry is that of the summed ``tau_i`` (``elect = before``) or of the sum weighted by the factors (``elect = weighted``);
       where the sum is zero, a global trim takes the sign that most entries of the model have, a tensor's trim plus
    3. the mean of the entries with that sign, divided by their number (``divide = count``) or by their factors (``divide = weight``), or their
       sum (``divide = none``)
    4. ``theta = theta_0 + scale * mean``

    Exactly ``int(density * n)`` entries stay, of equal ones the first; of a tensor that is trimmed by itself at least one. The paper's method is the default; ``trim = tensor, elect = weighted,
    divide = weight`` is what merging tools commonly call TIES.

    Of adapters the changes of weights ``s B A`` take the place of task vectors; the result is factored again, to ``rank``, and the plan says what
    that keeps. ``factorwise = true`` with ``trim = tensor`` merges ``A`` and ``B`` each by themselves, as common adapter tools do.

        merge ties(density = 20%, scale = 1) of code, math

    Source: Yadav et al., "TIES-Merging", 2023, arXiv:2306.01708, section 3.
    """

    by_pieces: ClassVar[bool] = False  # ranking goes over every tensor a few times
    version: ClassVar[int] = 2
    """1 kept nothing of a tensor whose share is less than one entry."""

    density: float = param(0.2, "fraction of each task vector that stays", min=0, max=1, unit="%", per_layer=True)
    scale: float = param(1.0, "factor of the merged change", per_layer=True)
    trim: Literal["global", "tensor"] = param("global", "what the fraction is of")
    elect: Literal["before", "weighted"] = param("before", "whether signs are elected before or after the factors are applied")
    divide: Literal["count", "weight", "none"] = param("count", "what the mean divides by; `none` leaves the sum of what agrees")

    def check(self, weights: Sequence[float]) -> str:
        return "the factors sum to zero, and it divides by their sum" if self.divide == "weight" and abs(sum(weights)) < 1e-8 else ""

    @classmethod
    def together(cls, methods: Sequence[Any]) -> str:
        if methods[0].trim == "global" and len({m.density for m in methods}) > 1:
            return "a global trim has one `density` for the whole model; with `trim = tensor` it may differ by layer"
        return super().together(methods)

    def prepare(
        self, op: Resolved, operands: Mapping[str, Operands], sources: Sequence[Source], factors: Mapping[str, Sequence[float]]
    ) -> dict[str, tuple[Any, ...]]:
        if self.trim != "global":
            return {}
        return rank(op, operands, sources, self.density, factors if self.elect == "weighted" else None)

    def sparsify(self, delta: Delta, shape: Sequence[int], model: int, seed: int, prepared: tuple[Any, ...]) -> Sparsifier:
        if self.trim == "global" and prepared:
            key, ties = prepared[0][model]
            return Top(key, ties)
        size = math.prod(shape)
        return top(delta, shape, max(int(self.density * size), min(size, 1) if self.density else 0))

    def fuse(self, parts: Sequence[Tensor], weights: Sequence[float], prepared: tuple[Any, ...]) -> Tensor:
        return elected(parts, weights, self.elect, self.divide, prepared[1] if prepared else 1.0)
