from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.insert import Stream, Tensors
from surgery.passes.kinds.insert_generated import GeneratedBottleneck, kronecker_sum, xavier


@dataclass(frozen=True)
class Phm(GeneratedBottleneck):
    """A bottleneck of parametrised hypercomplex layers: each weight is a sum of Kronecker products of its own.

    ``h + f(z D + d) U + u`` where ``D [hidden, width]`` and ``U [width, hidden]`` are each

        H = sum_i A_i (x) B_i      A_i [n, n], B_i [in / n, out / n]

    With ``n = 1`` a weight is any dense one. ``A`` starts as N(0, ``std``), so that the output changes little at the start. Folding makes the
    two dense weights once.

    Adds ``2 n^3 + 2 hidden width / n + hidden + width`` parameters per part: 7,320 for T5-base's 768 features, a width of 24 and n = 12.

        insert phm(width = 24, n = 12) after layers[*].{attn, ffn}

    Source: Zhang et al., "Beyond Fully-Connected Layers with Quaternions", 2021, arXiv:2102.08597, section 3; as an adapter Karimi
    Mahabadi et al., "Compacter", 2021, arXiv:2106.04647, section 3.
    """

    identity_bound: ClassVar[float] = 1e-2

    std: float = param(0.01, "standard deviation of the first values of the small matrices", min=0)

    def generators(self, name: str, inp: int, out: int) -> tuple[TensorSpec, ...]:
        n = self.n
        return (
            TensorSpec(f"{name}_A", (n, n, n), "normal", (0.0, self.std)),
            xavier(f"{name}_B", (n, inp // n, out // n), inp // n, out // n),
        )

    def count(self, site: Stream) -> int:
        n = self.n
        return 2 * n**3 + (site.inp * self.width + self.width * site.out) // n + self.width + site.out

    def weight(self, name: str, t: Tensors) -> Tensor:
        return kronecker_sum(t[f"{name}_A"], t[f"{name}_B"])
