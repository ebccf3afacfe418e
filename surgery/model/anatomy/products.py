"""What the anatomy calls a product with stored values, and a normalisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import fx

IntArray = np.ndarray[Any, np.dtype[np.int64]]
Node = Callable[[fx.Node], fx.Node]
Name = Callable[[str, str], str]


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

    def moved(self, node: Node, name: Name) -> Projection:
        """The same call in a copy of the layer: what stands in the place of its nodes and of its parameters."""
        weight, bias = name(self.weight, self.weight), name(self.bias, self.bias)
        return replace(self, node=node(self.node), x=node(self.x), weight=weight, bias=bias)


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

    def moved(self, node: Node, name: Name) -> Norm:
        """The same normalisation in a copy of the layer."""
        weight, bias = name(self.weight, self.weight), name(self.bias, self.bias)
        return Norm(node(self.x), node(self.out), self.kind, weight, bias, self.eps, [node(n) for n in self.inner])
