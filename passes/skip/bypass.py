from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.core.method import param
from surgery.passes.kinds.drop import DropMethod


@dataclass(frozen=True)
class Bypass(DropMethod):
    """Take out exactly the selected layers, attention or feed-forward blocks, or the least important of them.

    A layer's output becomes its input, as in ``prune layers``. A block beside the residual stream is left out of the sum:

        x + f(x)  becomes  x,    and where a norm follows the sum,  norm(x + f(x))  becomes  norm(x)

    Its weights, its norm in front, its keys and values in the cache and what is attached to it leave the model. A layer that has
    nothing left goes whole. Without an amount all that is selected goes; with ``count``, ``ratio`` or ``keep`` the parts
    with the lowest score, as in ``prune layers`` (``angular`` for whole layers only).

        skip bypass on layers[3..5].attn
        skip bypass(count = 4, score = block_influence) on layers[*].ffn using text keep layers[0].ffn

    The output changes; what is promised and measured is that it equals the output of the model before with these parts bypassed.

    Source: Castells et al., "LD-Pruner: Efficient Pruning of Latent Diffusion Models using Task-Agnostic Insights", 2024,
    arXiv:2404.11936, section 3, for bypassing single operators; Men et al., "ShortGPT", 2024, arXiv:2403.03853, for the score.
    """

    takes_data: ClassVar[bool] = True
    branches: ClassVar[bool] = True
    every: ClassVar[bool] = True

    count: int | None = param(None, "parts that go", min=1)
    ratio: float | None = param(None, "share of the selected parts that goes, rounded down", unit="%")
    keep: int | None = param(None, "parts of the selected that stay", min=1)
    score: Literal["block_influence", "angular", "magnitude", "random", "file"] = param("block_influence", "what the choice goes by")
    contiguous: bool = param(False, "take out layers that follow each other")
    scores: str | None = param(None, "file of scores, relative to the spec, for `score = file`")
    seed: int = param(0, "changes what `score = random` gives", min=0)
