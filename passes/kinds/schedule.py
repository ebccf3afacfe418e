"""Kind ``schedule``: rules for training that the emitted module carries; the compiler runs nothing of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from surgery.core.method import Method
from surgery.model.program import Program
from surgery.passes.kinds import attach
from surgery.passes.operation import Resolved, SiteChange


@dataclass(frozen=True)
class ScheduleMethod(Method):
    """Base of the rules for the learning rate: a function of the tokens trained on so far."""

    kind: ClassVar[str] = "schedule"
    fold_class: ClassVar[str] = "none"
    needs_sites: ClassVar[bool] = False

    def lr(self, tokens: float) -> float:
        """The learning rate after ``tokens`` tokens."""
        raise NotImplementedError

    def bound(self, program: Program) -> ScheduleMethod:
        """The rule with what it needs to know of the model filled in."""
        return self

    def note(self) -> str:
        """A remark for the plan, or an empty text."""
        return ""

    def factor(self, tokens_per_step: float, base_lr: float) -> Callable[[int], float]:
        """A function of the step for ``torch.optim.lr_scheduler.LambdaLR`` over an optimizer made with ``base_lr``.

        The rate of a step is the rate at the tokens trained on before it.
        """
        return lambda step: self.lr(step * tokens_per_step) / base_lr


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Put the rule with the program; on a selector it drives the parameters of those sites only."""
    method = op.method
    assert isinstance(method, ScheduleMethod)
    method = method.bound(program)
    names: dict[str, None] = {}
    for site in op.sites:
        names.update(dict.fromkeys(n for n in (site.weight, site.bias, *site.parameters) if n))
    for a in attach.attachments_of(program, op) if op.sites else ():
        names.update(dict.fromkeys(a.tensors))
    program.schedules.append((method, tuple(names)))
    return [SiteChange("", "", note=method.note())]


def carried(record: Mapping[str, Any]) -> list[tuple[ScheduleMethod, tuple[str, ...]]]:
    """The learning-rate rules in an artifact's record (``{"schedules": [{"method": {verb, name, params}, "targets"}]}``)."""
    from surgery.passes import registry

    found = []
    for entry in record.get("schedules", ()):
        data = entry["method"]
        cls = registry.get(data["verb"], data["name"])
        if issubclass(cls, ScheduleMethod):
            found.append((cls(**data["params"]), tuple(entry["targets"])))
    return found
