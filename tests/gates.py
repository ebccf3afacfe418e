"""Gates for graphs that stand alone, without a program whose inputs could be sampled."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from surgery.backends.fuse.gate import difference, run


class Exactly:
    """Stands for the gate, but finds every difference too large: cleanup does not even round."""

    def __init__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> None:
        self.inputs = inputs
        self.expected = [t.clone() for t in run(graph, [t.clone() for t in inputs])]

    def error(self, graph: fx.GraphModule) -> tuple[float, str]:
        found = run(graph, [t.clone() for t in self.inputs])
        same = all(torch.equal(a, b) for a, b in zip(self.expected, found, strict=True))
        return (0.0, "") if same else (1.0, "changed")


class Close(Exactly):
    """The same with rounding allowed."""

    def error(self, graph: fx.GraphModule) -> tuple[float, str]:
        found = run(graph, [t.clone() for t in self.inputs])
        return max(difference(a, b, None) for a, b in zip(self.expected, found, strict=True)), ""
