"""The controller as a callback of the Hugging Face Trainer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from surgery.model.losses import IGNORED
from surgery.train.controller import Controller

STATE_FILE = "surgery_training.json"


class Callback(TrainerCallback):
    """``Trainer(..., callbacks=[Callback(model)])``.

    The Trainer clips gradients before it says that backward is done, so ``after_backward`` sees clipped ones. Extra losses are
    added to the ``loss`` of the model's output, whatever the number of batches that a step accumulates: where the Trainer has the model divide by
    the labels of them all, so does each batch's extra loss count by its share of these. Steps and tokens are kept in every checkpoint folder, and a resumed run goes
    on from there; the rates are set before each step, so the Trainer's own scheduler has no effect beside a schedule.
    """

    def __init__(self, module: nn.Module, *, schedules: Any = None, tokens_per_step: int | None = None) -> None:
        self.controller = Controller(module, schedules=schedules)
        self.tokens_per_step = tokens_per_step
        self._hook = module.register_forward_hook(self._add_loss, with_kwargs=True)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.drive(kwargs["optimizer"])
        if state.global_step:
            path = _folder(args, state) / STATE_FILE
            if path.is_file():
                self.controller.load_state_dict(json.loads(path.read_text()))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.after_backward()
        self.controller.before_optimizer()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.controller.after_optimizer(self.tokens_per_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = _folder(args, state)
        if state.is_world_process_zero and folder.is_dir():
            (folder / STATE_FILE).write_text(json.dumps(self.controller.state_dict()))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook.remove()
        self.controller.finalise()

    def _add_loss(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        loss = output.get("loss") if hasattr(output, "get") else None
        if module.training and isinstance(loss, Tensor):
            extra = self.controller.extra_loss()
            if extra is not None:
                output["loss"] = loss + extra * _share(module, kwargs)
        return output


def _share(module: nn.Module, given: Any) -> Tensor | float:
    """What a batch is of its step, by labels. One where the Trainer itself divides by the number of batches (it then gives no
    ``num_items_in_batch``)."""
    items, labels = given.get("num_items_in_batch"), given.get("labels")
    ready = given.get("shift_labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    # as the Trainer counts: a causal model has nothing to say of the first position
    causal = LOSS_MAPPING.get(getattr(module, "loss_type", None)) is ForCausalLMLoss
    if ready is None:
        ready = labels[..., 1:] if causal and not getattr(getattr(module, "config", None), "is_encoder_decoder", False) else labels
    own: Tensor = ready.ne(IGNORED).sum() / items
    return own


def _folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


__all__ = ["Callback", "STATE_FILE"]
