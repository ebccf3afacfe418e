"""What passes may learn from weights and calibration data while ``compile`` walks a spec."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from surgery.model.live import Tensors
from surgery.model.program import Program


@dataclass
class Study:
    """Reads weights of the program as the lines above left it. ``progress(text, done, total)`` reports long work."""

    tensors: Tensors
    progress: Callable[..., None] = lambda *what: None

    def tensor(self, program: Program, name: str) -> Tensor:
        """One realised tensor by its name or a tied name, in its stored dtype. Do not change it in place."""
        return self.tensors.of(program, name)
