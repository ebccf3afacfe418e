from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.delta import DeltaMethod, Tensors
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.kinds.lowrank import add_low_rank


@dataclass(frozen=True)
class Splora(DeltaMethod):
    """A low-rank change that is pruned together with its layer.

    The frozen weight gets the product of two thin factors, without a scale:

        W' = W + C R        C [out, rank], R [rank, in]

    so that removing outputs removes rows of ``C`` and removing inputs columns of ``R``: a pruned adapter is the adapter of the pruned
    layer, and pruning, training and folding may come in any order. A convolution (odd kernel) gets ``C R`` at the central tap of its kernel.
    ``R`` starts uniform in +-1/sqrt(in) and ``C`` at zero, which leaves the model unchanged; the paper draws ``C`` uniform in
    +-``init_range`` with 1e-4. Biases train with ``adapt bitfit``.

    Adds ``rank (in + out)`` parameters per site (a convolution ``rank (in / groups + out)``); ``rank (|kept in| + |kept out|)`` are left after
    pruning. Folds exactly.

        adapt splora(rank = 16) on layers[*].ffn.{up, down}

    Source: Hedegaard, Alok, Jose and Iosifidis, "Structured Pruning Adapters", 2022, arXiv:2211.10155, section 3.
    """

    rank: int = param(16, "columns of C and rows of R", min=1, per_layer=True)
    init_range: float = param(0.0, "first values of C are uniform in plus or minus this; 0 leaves the model unchanged", min=0)
    seed: int = param(0, "changes every random initial value of this statement", min=0)

    places: ClassVar[tuple[str, ...]] = ("on",)

    def __post_init__(self) -> None:
        if self.init_range:
            object.__setattr__(self, "identity", "changed")  # of this statement; the class promises what the defaults keep

    def tensors(self, site: Geometry) -> tuple[TensorSpec, ...]:
        lead = (site.experts,) if site.experts else ()
        inner = site.inp // site.groups
        bound, spread = 1.0 / math.sqrt(inner), self.init_range
        rows = TensorSpec("R", (*lead, self.rank, inner), "uniform", (-bound, bound))
        cols = TensorSpec("C", (*lead, site.out, self.rank))
        return rows, TensorSpec("C", cols.shape, "uniform", (-spread, spread)) if spread else cols

    def count(self, site: Geometry) -> int:
        return self.rank * (site.inp // site.groups + site.out) * max(1, site.experts)

    def check(self, site: Geometry) -> str:
        return no_centre(site) or ("an embedding has no inputs that could be pruned" if site.op == "embedding" else "")

    def delta(self, site: Geometry, t: Tensors, weight: Tensor) -> Tensor:
        return at_centre(site, t["C"] @ t["R"])

    def forward(self, site: Geometry, t: Tensors, x: Tensor, out: Tensor, extra: Tensors, training: bool) -> Tensor:
        if site.op != "linear":
            return super().forward(site, t, x, out, extra, training)
        return add_low_rank(site, x, out, t["R"], t["C"], 1.0)


def no_centre(site: Geometry) -> str:
    """Why a kernel has no central tap, or an empty text."""
    return "a kernel of even size has no central tap" if any(k % 2 == 0 for k in site.kernel) else ""


def at_centre(site: Geometry, matrix: Tensor) -> Tensor:
    """``matrix [out, in / groups]`` as a canonical weight: of a convolution at the central tap of an otherwise empty kernel."""
    if site.op != "conv":
        return matrix
    taps = math.prod(site.kernel)
    return F.pad(matrix.unsqueeze(-1), (taps // 2, taps - 1 - taps // 2)).flatten(1)
