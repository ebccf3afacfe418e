"""What the anatomy calls a product with stored values, and a normalisation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import fx

IntArray = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(eq=False)
class Projection:
    """One call of a parametric product: ``kind`` is linear, conv1d (stored ``[in, out]``), conv, experts or matmul.

    ``rows`` are the rows of the stored parameter (on ``out_axis``) that make the output features, in their order;
    ``feature_axis`` is the output's axis that carries them.
    """

    order: int
    node: fx.Node
    x: fx.Node
    kind: str
    weight: str
    bias: str
    out_axis: int
    in_axis: int
    rows: IntArray
    stored: tuple[int, ...]
    feature_axis: int = -1

    @property
    def whole(self) -> bool:
        return len(self.rows) == self.stored[self.out_axis]


@dataclass(eq=False)
class Norm:
    """One normalisation: ``x`` its input, ``out`` its output (after scale and shift), ``kind`` layer, rms, batch, group."""

    x: fx.Node
    out: fx.Node
    kind: str
    weight: str = ""
    bias: str = ""
    eps: float | None = None
    inner: list[fx.Node] = field(default_factory=list)
