from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from surgery.core.method import param
from surgery.model.flows import Parts
from surgery.model.pieces import Operand
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.merge_angles import arc, products
from surgery.passes.kinds.merge_math import combination, combined


@dataclass(frozen=True)
class Slerp(MergeMethod):
    """Spherical interpolation between two checkpoints, tensor by tensor.

    With the flattened tensors ``v0``, ``v1`` and the angle ``O`` between them:

        theta = sin((1 - t) O) / sin O  v0  +  sin(t O) / sin O  v1

    Where the directions agree up to ``|cos O| > 0.9995`` the interpolation is linear. ``t`` may differ by layer; what lies outside of the
    layers takes the first layer's.

        merge slerp(t = 0.5) of first, second

    Source: Shoemake, "Animating rotation with quaternion curves", 1985; applied to weights as in model merging practice.
    """

    by_pieces: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    reads_base: ClassVar[bool] = False
    spreads: ClassVar[bool] = True

    t: float = param(0.5, "0 is the first model, 1 the second", min=0, max=1, per_layer=True)

    def check(self, weights: Sequence[float]) -> str:
        return "" if all(w == 1 for w in weights) else "it takes no factors: `t` says how far it goes; `merge nuslerp` takes them"

    def merge(self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        return combination(experts, self._factors(*experts), base)

    def parts(self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Parts:
        return combined(experts, self._factors(*experts), base)

    def _factors(self, first: Operand, second: Operand) -> tuple[float, float]:
        lengths = products(first, second)
        scale = math.prod(n if n > 1e-8 else 1.0 for n in map(math.sqrt, lengths[:2]))
        return arc(lengths[2] / scale, self.t)
