"""Calibration samples: what ``using data`` hands to a pass.

A sample is one row of the model's inputs; reading files and tokenising stand in ``surgery.model.data_read``. Here rows become
batches of flat inputs as the captured graph takes them, padded on the right, with a mask of the real tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from surgery.model.losses import IGNORED, shift_right, task_of
from surgery.model.program import Program, ValueSpec

TOKEN_INPUTS = ("input_ids", "decoder_input_ids")
"""The inputs of token ids; each has its own length and so its own mask of real tokens."""

MASK_OF = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


@dataclass(frozen=True)
class Batch:
    """Some samples as one call of the model.

    ``inputs`` are the flat tensors of the program's signature, ``labels`` what the loss takes besides the outputs. ``masks``
    holds for each input of tokens the symbolic sizes (batch, length) of that input in the graph and its real tokens, a bool
    tensor [batch, length]; it is empty where samples have no padding to tell apart. ``first`` numbers the first sample.
    """

    inputs: list[Tensor]
    labels: dict[str, Tensor] = field(default_factory=dict)
    masks: tuple[tuple[tuple[Any, Any], Tensor], ...] = ()
    first: int = 0
    rows: int = 1

    @property
    def keep(self) -> Tensor | None:
        """Real tokens of the main input, bool [batch, length]; None where there is no such thing."""
        return self.masks[0][1] if self.masks else None

    def mask_for(self, spec: Any, value: Tensor) -> Tensor | None:
        """Which rows of a value belong to real tokens: a bool tensor of the value's shape without its last axis, None when
        the value has no axis of tokens (``spec`` is the value's type in the graph, which names its axes)."""
        if not isinstance(spec, ValueSpec) or spec.kind != "tensor":
            return None
        for (batch, length), mask in self.masks:
            shape = spec.shape
            if len(shape) >= 2 and _same(shape[0], batch) and _same(shape[1], length):
                return _onto(mask, value, 1)
            if len(shape) == 4 and _same(shape[0], batch) and _same(shape[2], length):
                return _onto(mask, value, 2)
            if len(shape) >= 1 and _same(shape[0], batch * length):
                flat = mask.reshape(-1)
                return _spread(flat, value) if value.shape[0] == len(flat) else None
        return None


def _same(a: Any, b: Any) -> bool:
    return bool(a == b)


def _onto(mask: Tensor, value: Tensor, axis: int) -> Tensor | None:
    """A mask [batch, length] spread over a value whose axes 0 and ``axis`` they are."""
    if value.ndim <= axis or value.shape[0] != mask.shape[0] or value.shape[axis] != mask.shape[1]:
        return None
    shape = [1] * max(2, value.ndim - 1)
    shape[0], shape[axis] = mask.shape
    return mask.reshape(shape).expand(value.shape[:-1] if value.ndim > axis + 1 else value.shape)


def _spread(flat: Tensor, value: Tensor) -> Tensor:
    wide = value.shape[:-1] if value.ndim > 1 else value.shape
    return flat.reshape(-1, *[1] * (len(wide) - 1)).expand(wide)


Row = Mapping[str, Tensor]
"""One sample: each named input (and label) without its batch axis."""


@dataclass(frozen=True)
class Samples:
    """The chosen samples of one ``data`` statement, in their order.

    ``rows`` hold named inputs of one sample each; token ids may differ in length and are padded with ``pad``. ``batch`` is how
    many rows are one call. Iterating (after :meth:`bind`) gives batches for the bound program; :meth:`batches` for any program.
    """

    rows: Sequence[Row]
    batch: int = 8
    pad: int = 0
    source: str = ""
    program: Program | None = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Batch]:
        assert self.program is not None, "bind the samples to a program first"
        return self.batches(self.program)

    def bind(self, program: Program) -> Samples:
        return Samples(self.rows, self.batch, self.pad, self.source, program)

    @cached_property
    def digest(self) -> str:
        """sha256 over every value of every sample in order: what the lock pins. It does not depend on the batch size."""
        total = hashlib.sha256()
        for row in self.rows:
            for name in sorted(row):
                value = row[name].contiguous()
                total.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
                if value.numel():
                    total.update(memoryview(value.reshape(-1).view(torch.uint8).numpy()))
        return total.hexdigest()

    def batches(self, program: Program, batch: int | None = None, dtype: torch.dtype = torch.float32) -> Iterator[Batch]:
        """Batches for a program, in order; ``batch`` other than stated. Inputs that samples do not give are made as the live
        model makes them: masks, positions, types of zeros, empty caches, decoder inputs that are the labels or the text
        moved one to the right. Raises S0831 for an input that cannot be made."""
        from surgery.model.runtime_call import Call

        call = Call(program.signature, program.graph.graph)
        step = batch or self.batch
        for start in range(0, len(self.rows), step):
            rows = self.rows[start : start + step]
            given, masks = self._joined(rows, program)
            labels = {k: given.pop(k) for k in list(given) if k not in call.trees}
            _decoder(given, masks, labels, call, program)
            labels = _own_labels(given, masks, labels, program)
            for name, mask in masks.items():
                if MASK_OF[name] in call.trees and MASK_OF[name] not in given:
                    given[MASK_OF[name]] = mask.long()
            given = {k: _fit(v, dtype) for k, v in given.items()}
            flat = call.flat(dict(given), dtype, torch.device("cpu"))
            yield Batch(flat, labels, _masks(masks, call), start, len(rows))

    def _joined(self, rows: Sequence[Row], program: Program) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Rows side by side, and the real tokens of each input of tokens."""
        given: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            longest = max((len(v) for v in values if v.ndim), default=0)
            if all(v.shape == values[0].shape for v in values):
                given[name] = torch.stack(values)
            else:
                fill = IGNORED if name == "labels" else 0 if "mask" in name or "type" in name else self.pad
                given[name] = torch.stack([_padded(v, longest, fill) for v in values])
            if name in MASK_OF:
                lengths = torch.tensor([len(v) for v in values])
                masks[name] = torch.arange(longest) < lengths[:, None]
        for name, mask in masks.items():
            stated = given.get(MASK_OF[name])
            if stated is not None and stated.shape == mask.shape:
                masks[name] = mask & (stated != 0)
        return given, masks


def _padded(value: Tensor, length: int, fill: int) -> Tensor:
    out = value.new_full((length, *value.shape[1:]), fill)
    out[: len(value)] = value
    return out


def _fit(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def _masks(masks: Mapping[str, Tensor], call: Any) -> tuple[tuple[tuple[Any, Any], Tensor], ...]:
    found = []
    for name, mask in masks.items():
        shapes = call.shapes.get(name) or []
        if shapes and len(shapes[0]) == 2:
            found.append(((shapes[0][0], shapes[0][1]), mask))
    return tuple(found)


def _config(program: Program) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(**program.info.config)


def _decoder(given: dict[str, Tensor], masks: dict[str, Tensor], labels: dict[str, Tensor], call: Any, program: Program) -> None:
    """Decoder inputs that samples leave out: the labels, else the text itself, moved one to the right behind a start token."""
    if "decoder_input_ids" not in call.trees or "decoder_input_ids" in given:
        return
    target = labels.get("labels")
    if target is None and "input_ids" in given:
        target = given["input_ids"].masked_fill(~masks["input_ids"], IGNORED)
        task = task_of(program.info.architecture)
        if task is not None and task.shifts_labels:
            labels["labels"] = target
    if target is None or target.ndim != 2:
        return
    config = _config(program)
    if getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = next(
            (v for v in (getattr(config, "bos_token_id", None), getattr(config, "pad_token_id", None)) if v is not None), 0
        )
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0
    given["decoder_input_ids"] = shift_right(target, config)
    masks["decoder_input_ids"] = target != IGNORED


def _own_labels(given: Mapping[str, Tensor], masks: Mapping[str, Tensor], labels: dict[str, Tensor], program: Program) -> dict[str, Tensor]:
    """A causal model without labels predicts its own text."""
    if not labels and program.info.architecture.endswith(("ForCausalLM", "LMHeadModel")) and "input_ids" in given:
        return {"labels": given["input_ids"].masked_fill(~masks["input_ids"], IGNORED)}
    return labels
