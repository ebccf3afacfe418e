from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.passes.kinds.state import StateMethod


@dataclass(frozen=True)
class Biases(StateMethod):
    """The biases of the selected parts train: parameters whose name ends in `bias`.

    unfreeze biases on layers[*]
    """

    sets: ClassVar[Literal["frozen", "trainable"]] = "trainable"
    missing: ClassVar[tuple[str, str]] = ("no bias", "models such as Llama have no biases: select other parameters")

    def chooses(self, name: str, norm: bool) -> bool:
        return name.rpartition(".")[2] == "bias"
