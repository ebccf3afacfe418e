from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from surgery.core.method import param
from surgery.passes.kinds.adapter_method import Refactored
from surgery.passes.kinds.merge_math import Delta, Sparsifier
from surgery.passes.kinds.merge_sparse import dropped


@dataclass(frozen=True)
class Dare(Refactored):
    """Drops entries of task vectors at random, scales up what stays, and adds the weighted changes.

        tau~_i = m_i tau_i / density        m_i ~ Bernoulli(density)
        theta = theta_0 + scale * sum_i w_i tau~_i

    ``rescale = inverse`` is the paper's; ``l1`` scales each tensor so that its L1 norm is what it was, ``none`` leaves it. Every tensor of every
    model draws from its own seed, so the result is the same in every run.

    Of adapters the changes of weights ``s B A`` take the place of task vectors; the result is factored again, to ``rank``. ``factorwise = true``
    drops entries of ``A`` and ``B`` each by themselves, as common adapter tools do.

        merge dare(density = 10%) of code * 1, math * 0.5

    Source: Yu et al., "Language Models are Super Mario", 2024, arXiv:2311.03099, section 3.
    """

    version: ClassVar[int] = 4
    """1 drew from torch's generator, 2 drew 16 bits an entry, 3 drew 8."""

    density: float = param(0.1, "probability that an entry of a task vector stays", min=0, max=1, unit="%", per_layer=True)
    rescale: Literal["inverse", "l1", "none"] = param("inverse", "how what stays is scaled up")
    scale: float = param(1.0, "factor of the merged change", per_layer=True)
    seed: int = param(0, "changes which entries stay", min=0)

    def sparsify(self, delta: Delta, shape: Sequence[int], model: int, seed: int, prepared: tuple[Any, ...]) -> Sparsifier:
        return dropped(self.density, self.rescale, seed)
