from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.passes.kinds.adapter_method import AdapterMerge


@dataclass(frozen=True)
class Cat(AdapterMerge):
    """The weighted sum of adapters, their factors side by side.

        A = [w_1 s_1 A_1; w_2 s_2 A_2; ...] [sum r_i, in],   B = [B_1, B_2, ...] [out, sum r_i],   scale 1

    so that ``B A = sum_i w_i s_i B_i A_i`` exactly, whatever the ranks, scales and signs. It is what ``merge linear`` does with adapters; the
    name is the one that common adapter tools have for it.

        merge cat of news * 0.7, legal * 0.3

    Source: as in adapter merging practice; compare Zhang et al., "Composing Parameter-Efficient Modules with Arithmetic Operations", 2023,
    arXiv:2306.14870, section 3.
    """

    adapters: ClassVar[str] = "sum"
