from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.core.method import param
from surgery.passes.kinds.adapter_method import AdapterMerge


@dataclass(frozen=True)
class Svd(AdapterMerge):
    """The weighted sum of adapters, cut to the best factors of a smaller rank.

        dW = sum_i w_i dW_i = U S V^T,   B = U_r diag(S_r),   A = V_r^T,   scale 1

    is the nearest change of rank ``rank`` (Frobenius norm): exact where the sum has no larger rank, and the plan of a compile says what is kept
    where it has. ``rank = full`` keeps everything, also of changes that are no product of thin factors (DoRA's). ``even`` puts the square root
    of the singular values into both factors. ``clamp`` clips the entries of both factors to plus or minus that quantile of them all.

        merge svd(rank = 8) of news * 0.7, legal * 0.3

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936; as in adapter merging practice.
    """

    adapters: ClassVar[str] = "change"
    thin: ClassVar[bool] = True

    rank: Literal["largest", "full"] | int = param(
        "largest", "rank of the merged adapter: a number, the largest of those merged, or all that the sum has", min=1
    )
    clamp: float | None = param(None, "quantile of all entries at which both factors are clipped", min=0, max=1, unit="%")
    even: bool = param(False, "the square root of the singular values goes into each factor; else all of them go into B")
