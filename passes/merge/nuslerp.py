from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.model.pieces import Operand
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.merge_angles import Along, gram, weave, wide_of
from surgery.passes.kinds.merge_math import delta_of


@dataclass(frozen=True)
class Nuslerp(MergeMethod):
    """Spherical interpolation at the place that the factors say, of the checkpoints or of their task vectors.

    ``t = w2 / (w1 + w2)``, and the formula of ``merge slerp``; with ``deltas`` it is applied to ``theta_i - theta_0`` and the result is added
    to ``theta_0``, the model as the lines above left it. ``along`` takes the angle for the whole tensor, for each row or for each column;
    where the sine of an angle is below 1e-8 the interpolation is linear.

        merge nuslerp(along = row) of first * 0.4, second * 0.6

    Source: Shoemake, "Animating rotation with quaternion curves", 1985; applied to weights as in model merging practice.
    """

    by_pieces: ClassVar[bool] = True
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    deltas: bool = param(False, "interpolate the differences from the base")
    along: Literal["tensor", "row", "column"] = param("tensor", "what has an angle of its own")

    def check(self, weights: Sequence[float]) -> str:
        return "the two factors sum to zero" if abs(sum(weights)) < 1e-8 else ""

    def merge(self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        t = weights[1] / sum(weights)
        vectors = [delta_of(e, base) if self.deltas else wide_of(e) for e in experts]
        along: Along = self.along if base.dim() > 1 else "tensor"
        shape = (base.shape[0], math.prod(base.shape[1:])) if along == "column" else tuple(base.shape) or (1,)
        inner = gram(vectors, shape, along)
        lengths = inner[0, 0].sqrt() * inner[1, 1].sqrt()
        angle = torch.arccos((inner[0, 1] / lengths.clamp_min(1e-8)).clamp(-1, 1))
        sine = torch.sin(angle)
        level = sine.abs() < 1e-8
        safe = torch.where(level, torch.ones_like(sine), sine)
        a = torch.where(level, torch.full_like(sine, 1 - t), torch.sin((1 - t) * angle) / safe)
        b = torch.where(level, torch.full_like(sine, t), torch.sin(t * angle) / safe)
        return weave(vectors, [a, b], shape, along, base, base if self.deltas else None)
