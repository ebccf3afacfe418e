from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.merge import MergeMethod


@dataclass(frozen=True)
class Nuslerp(MergeMethod):
    """Spherical interpolation at the place that the factors say, of the checkpoints or of their task vectors.

    ``t = w2 / (w1 + w2)``, and the formula of ``merge slerp``; with ``deltas`` it is applied to ``theta_i - theta_0`` and the result is added
    to ``theta_0``, the model as the lines above left it. ``along`` takes the angle for the whole tensor, for each row or for each column;
    where the sine of an angle is below 1e-8 the interpolation is linear.

        merge nuslerp(along = row) of first * 0.4, second * 0.6

    Source: Shoemake, "Animating rotation with quaternion curves", 1985; applied to weights as in model merging practice.
    """

    models: ClassVar[tuple[int, int | None]] = (2, 2)

    deltas: bool = param(False, "interpolate the differences from the base")
    along: Literal["tensor", "row", "column"] = param("tensor", "what has an angle of its own")

    def check(self, weights: Sequence[float]) -> str:
        return "the two factors sum to zero" if abs(sum(weights)) < 1e-8 else ""

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        t = weights[1] / sum(weights)
        start = base.to(torch.float32)
        first, second = (e.to(torch.float32) - start if self.deltas else e.to(torch.float32) for e in experts)
        shape = first.shape
        if self.along == "tensor" or first.dim() < 2:
            first, second = first.reshape(1, -1), second.reshape(1, -1)
        elif self.along == "row":
            first, second = first.reshape(-1, shape[-1]), second.reshape(-1, shape[-1])
        else:
            first, second = first.reshape(shape[0], -1).T, second.reshape(shape[0], -1).T
        norms = first.double().norm(dim=1, keepdim=True) * second.double().norm(dim=1, keepdim=True)
        cosine = ((first.double() * second.double()).sum(1, keepdim=True) / norms.clamp_min(1e-8)).clamp(-1, 1)
        angle = torch.arccos(cosine)
        sine = torch.sin(angle)
        level = sine.abs() < 1e-8
        safe = torch.where(level, torch.ones_like(sine), sine)
        a = torch.where(level, torch.full_like(sine, 1 - t), torch.sin((1 - t) * angle) / safe)
        b = torch.where(level, torch.full_like(sine, t), torch.sin(t * angle) / safe)
        mixed = first * a.float() + second * b.float()
        mixed = mixed.T.reshape(shape) if self.along == "column" and len(shape) > 1 else mixed.reshape(shape)
        return mixed + start if self.deltas else mixed
