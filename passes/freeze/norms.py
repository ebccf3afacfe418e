from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.passes.kinds.state import StateMethod


@dataclass(frozen=True)
class Norms(StateMethod):
    """Weights and biases of the normalisations in the selected parts stop training.

    freeze norms on layers[*]
    """

    sets: ClassVar[Literal["frozen", "trainable"]] = "frozen"
    missing: ClassVar[tuple[str, str]] = ("no normalisation", "select the norms themselves or a layer around them")

    def chooses(self, name: str, norm: bool) -> bool:
        return norm
