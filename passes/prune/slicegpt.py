from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.rotate import RotateMethod

DAMP = 0.01
"""Share of the mean diagonal that is added to the diagonal of a Gram matrix."""


@dataclass(frozen=True)
class Slicegpt(RotateMethod):
    """A narrower residual stream: turned into its principal axes at every place, the last of which are cut off.

    In a pre-norm model the stream may have another orthogonal basis ``Q_i`` at each place ``i`` (in front of each block, and behind
    the last one): norms without gains commute with it. So gains and shifts of norms move into the maps behind them, the mean that a
    layer norm takes away is taken from everything that writes the stream, maps that read turn as ``W Q_i``, those that write as
    ``Q_i^T W``, and each shortcut gets the matrix ``Q_i^T Q_{i+1}``. That the model is then what it was is measured (1e-4). ``Q_i``
    are the principal axes of the stream on the data (eigenvectors of ``X^T X``, float64, damped by 1 %), and the first

        d' = int((1 - ratio) d), rounded down to a multiple of round_to

    of the ``d`` features stay, in all weights and shortcuts. Norms still divide by the number ``d``.

    Adds ``d'^2`` parameters for each attention and feed-forward block (two per layer), and biases where maps behind layer norms have
    none; a tied head is untied. 25% therefore removes less than 25% of the parameters. A normed stream that is an output of
    the model goes back to its own features through one more map. Post-norm models, several stacks, parallel branches, experts and gated
    norms are refused. Everything goes on behind it: adapters, training, further cuts, exports.

        prune slicegpt(ratio = 25%) using text

    Source: Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", 2024, arXiv:2401.15024, section 3.
    """

    needs_data: ClassVar[bool] = True

    ratio: float = param(0.25, "share of the features of the stream that go", min=0, max=1, unit="%")
    round_to: int = param(8, "the features that stay are a multiple of this", min=1)

    def width(self, full: int) -> int:
        stay = int((1 - Decimal(str(self.ratio))) * full)
        return full if stay == full else stay - stay % self.round_to

    def basis(self, gram: Tensor) -> Tensor:
        damped = gram + torch.eye(len(gram), dtype=gram.dtype) * DAMP * gram.diagonal().mean()
        axes = torch.linalg.eigh(damped).eigenvectors.flip(1)
        # of the two directions of an axis the one whose largest entry is positive, so that the basis is the same on any machine
        largest = axes.abs().argmax(0)
        return axes * axes.gather(0, largest.unsqueeze(0)).sign()
