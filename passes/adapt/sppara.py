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


@dataclass(frozen=True)
class Sppara(DeltaMethod):
    """A parallel 1x1 convolution beside a convolution, pruned together with it.

    A full matrix over the channels is added at the central tap of the frozen kernel:

        W'[o, i, centre] = W[o, i, centre] + P[o, i]        P [out, in / groups]

    which equals a 1x1 convolution beside it. Removed output channels take rows of ``P`` with them, removed input channels columns. ``P``
    starts at zero, which leaves the model unchanged; the paper draws it uniform in +-``init_range`` with 1e-4. For convolutions with
    kernels of odd size; biases train with ``adapt bitfit``.

    Adds ``out in / groups`` parameters per site. Folds exactly.

        adapt sppara on "**".conv

    Source: Hedegaard, Alok, Jose and Iosifidis, "Structured Pruning Adapters", 2022, arXiv:2211.10155, section 3.
    """

    init_range: float = param(0.0, "first values are uniform in plus or minus this; 0 leaves the model unchanged", min=0)
    seed: int = param(0, "changes every random initial value of this statement", min=0)

    places: ClassVar[tuple[str, ...]] = ("on",)

    def __post_init__(self) -> None:
        if self.init_range:
            object.__setattr__(self, "identity", "changed")  # of this statement; the class promises what the defaults keep

    def tensors(self, site: Geometry) -> tuple[TensorSpec, ...]:
        shape = (site.out, site.inp // site.groups)
        if self.init_range:
            return (TensorSpec("P", shape, "uniform", (-self.init_range, self.init_range)),)
        return (TensorSpec("P", shape),)

    def count(self, site: Geometry) -> int:
        return site.out * (site.inp // site.groups)

    def check(self, site: Geometry) -> str:
        if site.op != "conv":
            return f"it is a {site.op} and no convolution: its matrix would be as large as the weight"
        return "a kernel of even size has no central tap" if any(k % 2 == 0 for k in site.kernel) else ""

    def delta(self, site: Geometry, t: Tensors, weight: Tensor) -> Tensor:
        taps = math.prod(site.kernel)
        return F.pad(t["P"].unsqueeze(-1), (taps // 2, taps - 1 - taps // 2)).flatten(1)
