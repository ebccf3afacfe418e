"""Training of emitted modules: the events at which methods act, driven from a plain loop or from the Hugging Face Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.train.controller import Controller
from surgery.train.switch import disabled

if TYPE_CHECKING:
    from surgery.train.callback import Callback

__all__ = ["Callback", "Controller", "disabled"]


def __getattr__(name: str) -> Any:
    if name == "Callback":  # transformers is slow to import and a plain loop does without
        from surgery.train.callback import Callback

        return Callback
    raise AttributeError(name)
