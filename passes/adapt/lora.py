from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.passes.kinds.lowrank import LowRankMethod


@dataclass(frozen=True)
class Lora(LowRankMethod):
    """Low-rank change beside a frozen weight.

    The weight ``W [out, in]`` stays as it is; two thin trained factors add to its output:

        y = x W^T + b + (alpha / rank) (drop(x) A^T) B^T        A [rank, in], B [out, rank]

    ``A`` starts uniform in +-1/sqrt(in), ``B`` at zero, so the model is unchanged at the start. At an embedding ``A``
    (``[rank, rows]``) starts at zero and ``B`` standard normal, and there is no dropout. A convolution runs ``A`` with the
    site's kernel, stride, padding, dilation and groups and ``B`` as a 1x1 convolution. Slices of fused projections and
    3-D expert tensors are sites like any other.

    Adds ``rank (in + out)`` parameters per site: 294,912 for query and value of RoBERTa-base at rank 8. Folds exactly:
    ``W + (alpha / rank) B A``.

        adapt lora(rank = 8, alpha = 16, dropout = 5%) on layers[*].attn.{q, v}

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685, section 4.1.
    """

    exchange: ClassVar[Mapping[str, Any] | None] = {}
