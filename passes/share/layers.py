from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.core.method import param
from surgery.passes.kinds.tie import TieMethod


@dataclass(frozen=True)
class Layers(TieMethod):
    """Let layers share their weights, in groups.

    A shared tensor is one: it counts once, is stored once, is one initializer in ONNX, and its gradient is the sum over the layers
    that use it. Each layer keeps its place, its cache and what is attached to it. ``groups`` are ``pairs``, ``all``, the number of groups,
    or lists of layers; ``order`` says who is with whom, here for six layers in three groups:

        sequence    0 0 1 1 2 2
        cycle       0 1 2 0 1 2
        cycle_rev   0 1 2 2 1 0      the last cycle runs backwards

    The first layer's ``weights`` win, or the last layer's, or their mean. ``keep own norm`` leaves each layer its norms, ``keep own bias``
    its biases, ``keep own attn`` or any other part its own. An adapter put on shared layers afterwards is one for each layer;
    with ``shared = true`` it is one for all uses of a weight.

        share layers(groups = pairs) on layers[4..15] keep own norm
        share layers(groups = 3, order = cycle_rev, weights = mean) on layers
        share layers(groups = [[0, 1], [2, 5]]) on layers[0, 1, 2, 5]

    The output changes, unless the layers were equal. Counts: BERT-base has 109,482,240 parameters; with all 12 layers shared but
    their norms 31,549,440.

    Source: Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", 2020, arXiv:1909.11942,
    section 3.1; Xue et al., "Go Wider Instead of Deeper", 2021, arXiv:2107.11817, section 3, for norms of their own; Takase and Kiyono,
    "Lessons on Parameter Sharing across Layers in Transformers", 2021, arXiv:2104.06022, section 2, for the orders.
    """

    groups: Literal["pairs", "all"] | int | tuple[tuple[int, ...], ...] = param("pairs", "which layers share", min=1)
    order: Literal["sequence", "cycle", "cycle_rev"] = param("sequence", "how layers are dealt out to groups")
    weights: Literal["first", "last", "mean"] = param("first", "whose values the shared tensors start from")
