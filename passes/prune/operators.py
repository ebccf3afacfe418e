from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.core.method import param
from surgery.passes.kinds.drop import DropMethod


@dataclass(frozen=True)
class Operators(DropMethod):
    """Take out the parts whose absence moves the result least: layers, residual, attention or feed-forward blocks.

    Each selected part is bypassed alone and the model runs on all samples. With ``O`` the original results and ``M`` those without
    the part, averages and deviations taken by element over the samples:

        score = | avg(O) - avg(M) |  +  | std(O) - std(M) |

    The ``count``, or the ``ratio``, with the lowest scores go, or all but ``keep``. The weights that stay are as they were.
    Parts that change the size of what passes through, or that others need, are never chosen. The result compared is the model's
    first floating output: logits, hidden states, a latent image. Scoring runs the model once more for every part.

        prune operators(ratio = 25%) on layers[*].{attn, ffn} using text
        prune operators(count = 2) on stages[*].layers[*] using images

    The output changes; what is promised and measured is that it equals the output of the model before with these parts bypassed.

    Source: Castells et al., "LD-Pruner: Efficient Pruning of Latent Diffusion Models using Task-Agnostic Insights", 2024,
    arXiv:2404.11936, section 3 (removal of operators; replacing those that cannot be bypassed is not done here).
    """

    needs_data: ClassVar[bool] = True
    branches: ClassVar[bool] = True

    count: int | None = param(None, "parts that go", min=1)
    ratio: float | None = param(None, "share of the selected parts that goes, rounded down", unit="%")
    keep: int | None = param(None, "parts of the selected that stay", min=1)
    score: Literal["latent_distance"] = param("latent_distance", "what the choice goes by; `skip bypass` has others")
