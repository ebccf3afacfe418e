from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from surgery.core.method import param
from surgery.passes.kinds.stack import StackMethod


@dataclass(frozen=True)
class Stack(StackMethod):
    """Stacks layers of one or several checkpoints into a model of another depth.

    ``slices`` has one entry for each checkpoint behind ``of``: the layers that are taken of it, in the order in which they run. A
    checkpoint may be named several times, and a slice may name a layer twice. Without ``slices`` all layers of each follow each other.
    What stands in front of the layers comes from the first checkpoint, what stands behind them from the last, tied tensors from the first.

        merge stack(slices = [layers[0..23], layers[20..39]]) of first, second
        merge stack(slices = [layers[0..2, 1..3]], scale = {0..2: 1, 3..5: 0}) of base

    ``scale`` multiplies what each layer of the result adds to the stream (its ``o`` and ``down`` projections): with 0 a layer of a pre-norm
    model passes on what it gets, so that inserted copies start as an identity. ``share`` lets a layer that is taken again use the
    tensors of its first copy. Layers get new numbers, in selectors, names of tensors and the cache, and the config says how many there
    are and what it lists layer by layer.

    The output changes unless the slices are exactly the layers of one model; what is promised and measured is that the result computes
    what these layers compute in this order. Counts: a layer of LLaMA-2-13B has 317,204,480 parameters; ``[0..23]`` and ``[20..39]`` of two
    of them make 44 layers and 14,284,682,240 parameters.

    Source: Kim et al., "SOLAR 10.7B: Scaling Large Language Models with Simple yet Effective Depth Up-Scaling", 2023, arXiv:2312.15166, section 2.
    """

    slices: tuple[Any, ...] | None = param(
        None, "the layers of each checkpoint, in the order in which they run; without it all", unit="layers"
    )
    scale: float = param(1.0, "factor of what a layer of the result adds to the stream", per_layer=True)
    share: bool = param(False, "a layer that is taken again uses the tensors of its first copy")
