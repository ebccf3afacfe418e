from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.insert import Stream, Tensors
from surgery.passes.kinds.insert_generated import GeneratedBottleneck, kronecker_sum, xavier


@dataclass(frozen=True)
class Compacter(GeneratedBottleneck):
    """A bottleneck whose weights are sums of Kronecker products with one set of small matrices for all layers.

    ``h + f(z D + d) U + u`` where ``D [hidden, width]`` and ``U [width, hidden]`` are each

        H = sum_i A_i (x) s_i t_i      A_i [n, n], s_i [in / n, 1], t_i [1, out / n]

    ``A`` is one tensor for both weights of all parts that the statement selects; ``s`` and ``t`` are a weight's own. ``A`` starts as
    N(0, 1e-4), so that the output is unchanged up to rounding. Placed behind attention and feed-forward block this is Compacter, behind
    the feed-forward block alone Compacter++. Folding makes the two dense weights once.

    Adds ``2 (hidden + width) + hidden + width`` parameters per part and ``n^3`` once: 2,376 for T5-base's 768 features and a width of 24.

        insert compacter(width = 24, n = 4) after layers[*].{attn, ffn}

    Source: Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", 2021, arXiv:2106.04647, section 3.
    """

    identity_bound: ClassVar[float] = 1e-5

    std: float = param(1e-4, "standard deviation of the first values of the shared matrices", min=0)

    def generators(self, name: str, inp: int, out: int) -> tuple[TensorSpec, ...]:
        n = self.n
        return (
            TensorSpec("A", (n, n, n), "normal", (0.0, self.std), shared=f"A {n}"),
            xavier(f"{name}_left", (n, inp // n, 1), inp // n, 1),
            xavier(f"{name}_right", (n, 1, out // n), 1, out // n),
        )

    def count(self, site: Stream) -> int:
        return self.n**3 + (site.inp + self.width) + (self.width + site.out) + self.width + site.out

    def weight(self, name: str, t: Tensors) -> Tensor:
        return kronecker_sum(t["A"], torch.matmul(t[f"{name}_left"], t[f"{name}_right"]))
