from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.passes.kinds.state import StateMethod


@dataclass(frozen=True)
class All(StateMethod):
    """Every parameter of the selected parts stops training, what was attached there included.

    A part of a fused tensor cannot be changed by itself: that is an error. Tensors that a method keeps fixed are left alone.

        freeze all on layers[0..3]
    """

    sets: ClassVar[Literal["frozen", "trainable"]] = "frozen"

    def chooses(self, name: str, norm: bool) -> bool:
        return True
