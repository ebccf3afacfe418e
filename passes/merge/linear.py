from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from surgery.core.method import param
from surgery.model.flows import Parts
from surgery.model.pieces import Operand, whole
from surgery.passes.kinds.adapter_method import FACTORWISE, AdapterSide
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.merge_math import combination, combined


@dataclass(frozen=True)
class Linear(AdapterSide, MergeMethod):
    """The weighted average of checkpoints, or the weighted sum of adapters.

        theta = sum_i w_i theta_i / sum_i w_i        without `normalize` the sum itself
        dW    = sum_i w_i s_i B_i A_i                of adapters; with `normalize` divided by sum_i w_i

    Of checkpoints it is computed in float32 and rounded once to the stored type. Of adapters it is exact: their factors stand side by side in
    the merged one, whose rank is the sum of theirs and whose scale is 1, whatever theirs were. A part that one adapter alone has, with
    factor 1, stays as it is. ``factorwise`` adds ``A`` and ``B`` each by themselves instead, as common adapter tools do under this name:

        A = sum_i sign(w_i s_i) sqrt|w_i s_i| A_i,   B = sum_i sqrt|w_i s_i| B_i

    which needs equal ranks and holds products ``B_i A_j`` between adapters: it is not their sum.

        merge linear of first * 0.7, second * 0.3

    Source: Wortsman et al., "Model soups", 2022, arXiv:2203.05482, section 2.
    """

    by_pieces: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (1, None)
    reads_base: ClassVar[bool] = False
    spreads: ClassVar[bool] = True
    adapters: ClassVar[str] = "sum"

    normalize: bool | None = param(None, "divide by the sum of the factors; when nothing is said checkpoints are, and adapters are not")
    factorwise: bool = param(False, FACTORWISE, last=True)

    def check(self, weights: Sequence[float]) -> str:
        return "the factors sum to zero, and it divides by their sum" if self.normalize is not False and abs(sum(weights)) < 1e-8 else ""

    def merge(self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        return whole(experts[0]) if self._one(experts, weights) else combination(experts, weights, base, self._divisor(weights))

    def parts(
        self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]
    ) -> Parts | None:
        return None if self._one(experts, weights) else combined(experts, weights, base, self._divisor(weights))

    def _divisor(self, weights: Sequence[float]) -> float:
        return sum(weights) if self.normalize is not False else 1.0

    def _one(self, experts: Sequence[Operand], weights: Sequence[float]) -> bool:
        """Whether the result is the one model as it is."""
        return len(experts) == 1 and weights[0] == self._divisor(weights)
