from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.merge import MergeMethod
from surgery.passes.kinds.merge_math import arc, chunks, dot, flat


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

    models: ClassVar[tuple[int, int | None]] = (2, 2)

    t: float = param(0.5, "0 is the first model, 1 the second", min=0, max=1, per_layer=True)

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        first, second = experts
        left, right = flat(first), flat(second)
        norms = [math.sqrt(dot(v, v, base.shape)) for v in (left, right)]
        scale = math.prod(n if n > 1e-8 else 1.0 for n in norms)
        a, b = arc(dot(left, right, base.shape) / scale, self.t)
        out = torch.empty_like(base)
        into = out.view(-1)
        for at in chunks(base.shape):
            into[at] = left(at) * a + right(at) * b
        return out
