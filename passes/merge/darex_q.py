from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.merge import TaskMethod
from surgery.passes.kinds.merge_math import Delta, Sparsifier, chunks
from surgery.passes.kinds.merge_sparse import Drop


@dataclass(frozen=True)
class DarexQ(TaskMethod):
    """Drops entries of task vectors at random and divides what stays by a chosen ``q`` instead of the probability of staying.

        theta = theta_0 + scale * sum_i w_i m_i tau_i / q        m_i ~ Bernoulli(density),  density <= q < 1

    A larger ``q`` trades variance of the outputs for bias. ``q = density`` is ``merge dare``. Without ``q`` it is chosen tensor by tensor from
    the task vector alone: the row-wise Chernoff bound of the paper for inputs of mean one, at the exponent ``eta``, averaged over rows.

        merge darex_q(density = 1%, eta = 0.37) of tuned

    Source: Deng et al., "DARE the Extreme", 2025, arXiv:2410.09344, section 4.
    """

    version: ClassVar[int] = 4
    """1 drew from torch's generator, 2 drew 16 bits an entry, 3 drew 8."""

    density: float = param(0.1, "probability that an entry of a task vector stays", min=0, max=1, unit="%", per_layer=True)
    q: float | None = param(None, "what the entries that stay are divided by; without it the bound chooses", min=0, max=1, per_layer=True)
    eta: float = param(0.4, "exponent of the bound", min=0)
    scale: float = param(1.0, "factor of the merged change", per_layer=True)
    seed: int = param(0, "changes which entries stay", min=0)

    def __post_init__(self) -> None:
        if self.q is not None and self.q < self.density:
            raise ValueError("q lies between the density and one")

    def sparsify(self, delta: Delta, shape: Sequence[int], model: int, seed: int, prepared: tuple[Any, ...]) -> Sparsifier:
        if not 0 < self.density < 1:
            return Drop(self.density, 1.0, seed)
        q = self.q if self.q is not None else bounded_q(delta, shape, self.density, self.eta)
        return Drop(self.density, 1.0 / q, seed)


def bounded_q(delta: Delta, shape: Sequence[int], density: float, eta: float) -> float:
    """The mean over rows of the ``q`` that minimises ``|eta (1 - density/q) S1 + eta^2 Phi S2 / (4 q^2) + ln(2/0.05)|`` on the grid
    ``density, density + 0.001, ... 0.998`` with ``S1``, ``S2`` the sums of a row's entries and of their squares."""
    drop = 1.0 - density
    phi = 0.5 if drop == 0.5 else (1 - 2 * drop) / math.log((1 - drop) / drop)
    grid = torch.arange(round(density * 1000), 999, dtype=torch.float64).div(1000).clamp_min(density)
    length = shape[-1] if len(shape) > 1 else math.prod(shape)
    best: list[Tensor] = []
    for at in chunks(shape):
        rows = delta(at).double().reshape(-1, length)
        first, second = rows.sum(1, keepdim=True), rows.square().sum(1, keepdim=True)
        bound = eta * (1 - density / grid) * first + eta**2 * phi * second / (4 * grid**2) + math.log(2 / 0.05)
        best.append(grid[bound.abs().argmin(1)])
    return float(torch.cat(best).mean())
