"""One driver for everything that acts during training, for a plain loop; :mod:`surgery.train.callback` wraps it for the Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.diagnostics import fail
from surgery.train.events import Schedule, Subscriber, schedules_of, subscribers


class Controller:
    """Sends the training events of a module that surgery made, and sets learning rates by its schedules.

    ``schedules`` overrides what the module carries: rules, or pairs of a rule and the parameter names that it drives (none:
    all). Tokens are counted from the ``input_ids`` of training forwards unless each step states them.

        controller = Controller(model, optimizer)
        for batch in batches:
            loss = controller.step(lambda: model(**batch).loss)
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer | None = None, *,
        schedules: Iterable[Schedule | tuple[Schedule, tuple[str, ...]]] | None = None,
    ) -> None:  # fmt: skip
        self.module = module
        self.subscribers: list[Subscriber] = subscribers(module)
        given = schedules_of(module) if schedules is None else [s if isinstance(s, tuple) else (s, ()) for s in schedules]
        self.schedules: list[tuple[Schedule, tuple[str, ...]]] = list(given)
        self.steps = 0
        self.tokens = 0
        self._counted = 0
        self._driven: list[tuple[Schedule, list[dict[str, Any]]]] = []
        self.optimizer = optimizer
        self._hook = module.register_forward_pre_hook(self._count, with_kwargs=True) if self.schedules else None
        if optimizer is not None:
            self.drive(optimizer)

    # ------------------------------------------------------------ the loop

    def step(self, loss: Callable[[], Tensor], *, tokens: int | None = None) -> Tensor:
        """One optimizer step: events, ``loss()``, backward, optimizer, gradients cleared. Returns the loss, extra losses included."""
        if self.optimizer is None:
            raise fail("S0772", "Controller.step needs an optimizer", exit_code=2, help="make it with Controller(module, optimizer)")
        self.begin()
        value = loss()
        extra = self.extra_loss()
        value = value if extra is None else value + extra
        value.backward()
        self.after_backward()
        self.before_optimizer()
        self.optimizer.step()
        self.after_optimizer(tokens)
        self.optimizer.zero_grad(set_to_none=True)
        return value.detach()

    def prepare(self, data: Any) -> None:
        """Before training, with calibration batches."""
        self._send("prepare", data)

    def begin(self) -> None:
        """Before the forward of a step: schedules set the rate for the tokens trained on so far."""
        for schedule, groups in self._driven:
            rate = schedule.lr(self.tokens)
            for group in groups:
                value = rate * group.get("lr_scale", 1.0)
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(value)
                else:
                    group["lr"] = value
        self._send("step_begin", self.steps)

    def extra_loss(self) -> Tensor | None:
        """The sum of what methods add to the loss, None when nobody adds."""
        parts = [s.send("extra_loss") for s in self.subscribers if s.handles("extra_loss")]
        parts = [p for p in parts if p is not None]
        return torch.stack([p.reshape(()) for p in parts]).sum() if parts else None

    def after_backward(self) -> None:
        self._send("after_backward", self.steps)

    def before_optimizer(self) -> None:
        self._send("before_optimizer", self.steps)

    def after_optimizer(self, tokens: int | None = None) -> None:
        """After the optimizer's step, while gradients are alive; ``tokens`` replaces the counted number for this step."""
        self._send("after_optimizer", self.steps)
        counted = self._counted if tokens is None else tokens
        if self.schedules and not counted:
            raise fail(
                "S0773", "a schedule follows the tokens trained on, and this step had none to count", exit_code=2,
                help="state them: controller.step(loss, tokens = n); only `input_ids` of the module's own forward are counted",
            )  # fmt: skip
        self.tokens += counted
        self._counted = 0
        self.steps += 1

    def finalise(self) -> None:
        """After training: grown or shrunk ranks become physical, helpers go."""
        self._send("finalise")
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    # ------------------------------------------------------------ optimizer and state

    def drive(self, optimizer: torch.optim.Optimizer) -> None:
        """Take over the rates of an optimizer. A group that a rule drives only in part is split in two."""
        self.optimizer = optimizer
        self._driven = []
        named = dict(self.module.named_parameters())
        for schedule, names in self.schedules:
            if not names:
                self._driven.append((schedule, optimizer.param_groups))
                continue
            wanted = {id(named[n]) for n in names if n in named}
            for group in list(optimizer.param_groups):
                inside = [p for p in group["params"] if id(p) in wanted]
                if inside and len(inside) < len(group["params"]):
                    group["params"] = [p for p in group["params"] if id(p) not in wanted]
                    optimizer.param_groups.append({**group, "params": inside})
            groups = [g for g in optimizer.param_groups if g["params"] and id(g["params"][0]) in wanted]
            self._driven.append((schedule, groups))

    def state_dict(self) -> dict[str, int]:
        """What an exact resume needs: steps and tokens. What methods learn lives in their modules' own state."""
        return {"steps": self.steps, "tokens": self.tokens}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps, self.tokens = int(state["steps"]), int(state["tokens"])

    def _send(self, event: str, *args: Any) -> None:
        for subscriber in self.subscribers:
            if subscriber.handles(event):
                subscriber.send(event, *args)

    def _count(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if module.training and isinstance(ids, Tensor) and not ids.is_floating_point():
            world = torch.distributed.get_world_size() if torch.distributed.is_available() and torch.distributed.is_initialized() else 1
            self._counted += ids.numel() * world
