from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.core.method import param
from surgery.passes.kinds.drop import DropMethod


@dataclass(frozen=True)
class Layers(DropMethod):
    """Drop whole layers, those that change least what passes through them.

    A dropped layer's output becomes its input; its weights, its cache and what is attached to it leave the model, and the layers
    behind it move up by one: ``layers[4]`` becomes ``layers[3]``, in selectors, in the names of tensors and in the cache. Of the
    selected layers the ``count``, or the ``ratio``, with the lowest score go, or all but ``keep``:

        BI_l = 1 - mean over tokens of cos(x_l, x_{l+1})        block_influence
        a_l  = arccos(cos(x_l, x_{l+n})) / pi                   angular

    ``x_l`` is what enters layer ``l`` and ``x_{l+1}`` what leaves it. ``angular`` compares, at the last token, what enters
    a run of ``n`` layers with what leaves it and drops the run where it is smallest. ``magnitude`` is the sum of the absolute
    weights, ``random`` a seeded order, ``file`` a JSON object of numbers by role. ``contiguous`` drops neighbours,
    with any score those whose sum is lowest. Layers that compute something for others (the position bias of T5) or change
    the size of what passes through are never chosen; ``keep layers[0, -1]`` holds more back.

        prune layers(count = 9) on layers using text keep layers[0, -1]
        prune layers(ratio = 25%, score = angular) on layers using text

    The output changes; what is promised and measured is that it equals the output of the model before with these layers
    bypassed. Counts: LLaMA-2-7B has 202,383,360 parameters in a layer, 4,916,965,376 are left without 9 of its 32.

    Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, arXiv:2403.03853,
    section 3; Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024, arXiv:2403.17887, section 3.2 for ``angular``.
    """

    takes_data: ClassVar[bool] = True

    count: int | None = param(None, "layers that go", min=1)
    ratio: float | None = param(None, "share of the selected layers that goes, rounded down", unit="%")
    keep: int | None = param(None, "layers of the selected that stay", min=1)
    score: Literal["block_influence", "angular", "magnitude", "random", "file"] = param("block_influence", "what the choice goes by")
    contiguous: bool = param(False, "drop layers that follow each other")
    scores: str | None = param(None, "file of scores, relative to the spec, for `score = file`")
    seed: int = param(0, "changes what `score = random` gives", min=0)
