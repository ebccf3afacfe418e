from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surgery.core.method import param
from surgery.model.pieces import Operand, whole
from surgery.model.program import Program
from surgery.passes.kinds.match_axes import AXES
from surgery.passes.kinds.match_pass import aligned
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.merge_inputs import Operands, Source
from surgery.passes.kinds.merge_math import combination
from surgery.passes.operation import Resolved


@dataclass(frozen=True)
class WeightMatching(MergeMethod):
    """Averages checkpoints that were trained apart, after bringing their units into one order.

    Two networks can compute the same with their units in another order, and their average then means nothing. Each named checkpoint is moved
    by permutations ``pi`` that leave what it computes as it is, so that its weights lie closest to those of the model as the lines above left it:

        pi = argmax sum_l <theta_0, pi(theta_i)>        theta = (1 - t) theta_0 + t sum_i w_i pi(theta_i) / sum_i w_i

    Units that may change places are those of the dimension classes of ``axes``: the residual ``width`` (one order for the whole model),
    ``heads`` with their key-value groups, inside a head (``head_dim``) the columns of values and outputs, and where no rotary embedding couples
    them those of queries and keys, hidden units of ``ffn``, and ``channels`` between other layers. One set of units is assigned at a time while
    the others are held, until nothing improves. The plan of a compile says how far the weights came together; that the moved
    checkpoint computes what it did is measured.

        merge weight_matching(t = 0.5) of other
        merge weight_matching(axes = [ffn, heads], t = 1) of other

    With ``t = 1`` the model becomes the moved checkpoint, ready for another merge. For networks with batch norms, measure running statistics
    again afterwards. Pointless for checkpoints that were tuned from one base. Needs two tensors and ``n x n`` numbers for the largest set of
    ``n`` units in memory.

    Source: Ainsworth et al., "Git Re-Basin: Merging Models modulo Permutation Symmetries", 2023, arXiv:2209.04836, section 3.2; Ito et al.,
    "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching", 2024, arXiv:2402.04051, for the alignment of singular vectors.
    """

    t: float = param(0.5, "0 is the model, 1 the moved checkpoints", min=0, max=1, per_layer=True)
    axes: tuple[str, ...] | None = param(None, "whose units may change places: width, heads, head_dim, ffn, channels; without it all")
    sweeps: int = param(100, "most times that every set of units is assigned", min=1, max=10000)
    seed: int = param(0, "changes the order in which sets of units are assigned", min=0)

    def __post_init__(self) -> None:
        wrong = [a for a in self.axes or () if a not in AXES]
        if wrong:
            raise ValueError(f"`{wrong[0]}` is no axis; there are {', '.join(AXES)}")
        if self.vocab != "same":
            raise ValueError("units are matched over whole tensors, so that vocabularies must be the same")

    def check(self, weights: Sequence[float]) -> str:
        return "the factors sum to zero, and it divides by their sum" if abs(sum(weights)) < 1e-8 else ""

    def align(
        self, program: Program, op: Resolved, names: Sequence[str], operands: Mapping[str, Operands], sources: Sequence[Source]
    ) -> Mapping[str, Operands]:
        return aligned(program, op, operands, sources, self.axes or AXES, self.sweeps, self.seed)

    def merge(self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        if self.t == 1 and len(experts) == 1:
            return whole(experts[0])
        if self.t == 0:
            return whole(base)
        return combination([base, *experts], [1 - self.t, *(self.t * w / sum(weights) for w in weights)], base)
