"""The numeric gate: a rewritten graph must compute what the graph before it computed, on inputs of several kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from surgery.model.program import Program
from surgery.model.sample import placeholders, sample_inputs
from surgery.model.threads import one_thread

TOLERANCE = {"fp32": 3e-5, "fp16": 1e-2, "bf16": 6e-2}
"""Allowed difference as a share of the output's largest value. A fused operation adds in another order, and nothing else."""

NOT_RUN = float("inf")


@dataclass(frozen=True)
class Case:
    """Inputs of one kind: ``past`` steps in the cache; ``left``: padding stands in front, as decoders have it."""

    name: str
    batch: int
    length: int
    padding: bool = False
    past: int = 0
    left: bool = False


CASES = (
    Case("random", 1, 5),
    Case("padded", 3, 11, padding=True),
    Case("cached", 2, 1, padding=True, past=4),
    Case("continued", 2, 3, padding=True, past=4, left=True),
)


@dataclass(frozen=True)
class Sample:
    """Inputs, what the graph gives for them, and which positions of the sequence count (None: all)."""

    case: Case
    inputs: list[Tensor]
    expected: list[Tensor]
    valid: Tensor | None


class Gate:
    """Holds what a graph computes on all cases before any rewrite; :meth:`error` measures a graph against it."""

    def __init__(self, program: Program, graph: fx.GraphModule, dtype: torch.dtype) -> None:
        self.samples: list[Sample] = []
        names = [n for n, _ in placeholders(program)]
        cached = any("past_key" in n or "past_value" in n for n in names)
        for case in CASES:
            if case.past and not cached:
                continue
            inputs = sample_inputs(
                program, batch=case.batch, length=case.length, seed=11, padding=case.padding, dtype=dtype, past=case.past
            )  # fmt: skip
            valid = _pad_left(names, inputs) if case.left else None
            try:
                expected = run(graph, inputs)
            except RuntimeError:
                continue  # a size that the model itself cannot run (fewer positions, a fixed cache)
            self.samples.append(Sample(case, inputs, expected, valid))

    def error(self, graph: fx.GraphModule) -> tuple[float, str]:
        """The largest difference as a share of its output's scale, and on which inputs; NOT_RUN with the reason when it does not run."""
        worst, where = 0.0, ""
        if not self.samples:
            return NOT_RUN, "the graph before runs on none of the inputs"
        for sample in self.samples:
            try:
                found = run(graph, sample.inputs)
            except Exception as exc:
                return NOT_RUN, f"{sample.case.name} inputs: {type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"
            for i, (want, got) in enumerate(zip(sample.expected, found, strict=True)):
                ratio = difference(want, got, sample.valid)
                if ratio > worst:
                    worst, where = ratio, f"output {i} on {sample.case.name} inputs"
        return worst, where


def _pad_left(names: Sequence[str], inputs: list[Tensor]) -> Tensor | None:
    """Turns the padding of two-dimensional masks around, in place in the list; gives the mask."""
    found: Tensor | None = None
    for i, (name, value) in enumerate(zip(names, inputs, strict=True)):
        if "mask" in name and value.ndim == 2 and not value.is_floating_point():
            inputs[i] = found = value.flip(1)
    return found


def difference(want: Tensor, got: Tensor, valid: Tensor | None) -> float:
    """``max |want - got| / max |want|`` over the positions that count; infinite for another shape, or for what is not finite on one side.

    ``valid`` [batch, steps] is compared with axis 1 of an output, or with axis 2 of a cache [batch, heads, steps, width]; of a longer
    mask the last steps are those of the output.
    """
    if want.shape != got.shape:
        return NOT_RUN
    if want.numel() == 0:
        return 0.0
    if valid is not None and want.ndim in (3, 4):
        axis = 1 if want.ndim == 3 else 2
        steps = want.shape[axis]
        if want.shape[0] == valid.shape[0] and steps <= valid.shape[1]:
            on = valid[:, valid.shape[1] - steps :].bool()
            on = on[:, :, None] if want.ndim == 3 else on[:, None, :, None]
            if not bool(on.all()):
                want, got = want.masked_fill(~on, 0.0), got.masked_fill(~on, 0.0)
    if want.dtype is torch.float32:
        gap, scale = _float_gap(want, got), _largest(want)
        if gap < NOT_RUN and scale < NOT_RUN:  # so everything is finite; the difference of close numbers is exact in their own type
            return gap / max(scale, 1e-6)
    want, got = want.double(), got.double()
    same = (want == got) | (want.isnan() & got.isnan())
    gap = torch.where(same, torch.zeros_like(want), (want - got).abs())
    if not bool(gap.isfinite().all()):
        return NOT_RUN
    scale = float(want[want.isfinite()].abs().max()) if bool(want.isfinite().any()) else 0.0
    return float(gap.max()) / max(scale, 1e-6)


def _float_gap(want: Tensor, got: Tensor) -> float:
    """``max |want - got|``, NaN when there is one; in one pass and without a copy where nothing differs."""
    return 0.0 if torch.equal(want, got) else _largest(want - got)


def _largest(values: Tensor) -> float:
    """``max |values|``, NaN when there is one."""
    low, high = torch.aminmax(values)
    return float(torch.maximum(-low, high))


def run(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The flat tensors that a graph gives, on one thread."""
    with one_thread(), torch.no_grad():
        out: Any = graph(*inputs)
    return [t.detach() for t in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(t, Tensor)]
