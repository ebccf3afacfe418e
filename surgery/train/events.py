"""The moments of training at which methods act, and how a method says that it does.

A module that surgery added has ``surgery_events()`` and gives ``(method, module)``. The method takes part in every event of
:data:`EVENTS` for which it has a function: ``prepare(module, data)``, ``step_begin(module, step)``, ``after_backward(module, step)``,
``before_optimizer(module, step)``, ``after_optimizer(module, step)``, ``extra_loss(module)``, ``finalise(module)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import nn

EVENTS = ("prepare", "step_begin", "after_backward", "before_optimizer", "after_optimizer", "extra_loss", "finalise")


@runtime_checkable
class Schedule(Protocol):
    """A rule for the learning rate: a function of the tokens trained on so far."""

    def lr(self, tokens: float) -> float: ...


@dataclass(frozen=True)
class Subscriber:
    """A method that acts, the module that it acts for and the module's path."""

    method: Any
    module: nn.Module
    path: str

    def handles(self, event: str) -> bool:
        return callable(getattr(self.method, event, None))

    def send(self, event: str, *args: Any) -> Any:
        return getattr(self.method, event)(self.module, *args)


def subscribers(module: nn.Module) -> list[Subscriber]:
    """Everything in the module that acts during training, in module order."""
    found = []
    for path, part in module.named_modules():
        events = getattr(part, "surgery_events", None)
        if events is not None:
            method, owner = events()
            subscriber = Subscriber(method, owner, path)
            if any(subscriber.handles(e) for e in EVENTS):
                found.append(subscriber)
    return found


def schedules_of(module: nn.Module) -> list[tuple[Schedule, tuple[str, ...]]]:
    """The learning-rate rules that a loaded artifact carries in ``surgery_schedules``, with the parameters that each drives."""
    carried = getattr(module, "surgery_schedules", ())
    return [(schedule, tuple(names)) for schedule, names in carried if isinstance(schedule, Schedule)]
