from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.passes.kinds.state import StateMethod


@dataclass(frozen=True)
class Bitfit(StateMethod):
    """Train the biases and nothing else.

    Freezes the base as every adapter does and lets the parameters of the selected parts train whose name ends in ``bias``,
    those of normalisations included. No parameter is added. BERT-base has 102,912 of them (0.094 %). Nothing to fold. A
    selection without any bias (models such as Llama) is an error.

        adapt bitfit on layers[*], embed.**

    Source: Ben Zaken, Ravfogel and Goldberg, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
    Language-models", 2021, arXiv:2106.10199, section 3.
    """

    fold_class: ClassVar[str] = "merge"
    sets: ClassVar[Literal["frozen", "trainable"]] = "trainable"
    exclusive: ClassVar[bool] = True
    attachments: ClassVar[bool] = False
    missing: ClassVar[tuple[str, str]] = ("no bias", "select parts that have biases, or use an adapter such as lora")

    def chooses(self, name: str, norm: bool) -> bool:
        return name.rpartition(".")[2] == "bias"
