"""Cosines between what enters and what leaves a region, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.core.site import NodeRef, Site
from surgery.model.data import Samples
from surgery.model.program import Program
from surgery.model.study import Study


def cosines(
    study: Study, program: Program, samples: Samples, runs: Sequence[tuple[Site, Site]], *, last: bool = False
) -> list[list[Tensor]]:
    """For each run (first and last region) the float64 cosines of the value that enters the first and the one that leaves the last, one
    tensor a batch; of real tokens, with ``last`` of each sample's last real token only. An undefined cosine counts as 0.5.
    Where shapes differ the cosine is minus infinity.

    What enters is held from its batch to the end of the run.
    """
    found: list[list[Tensor]] = [[] for _ in runs]
    inputs: list[list[Tensor]] = [[] for _ in runs]
    hooks: dict[NodeRef, list[tuple[int, bool]]] = {}
    for i, (first, end) in enumerate(runs):
        assert first.input is not None and end.output is not None
        hooks.setdefault(first.input, []).append((i, True))
        hooks.setdefault(end.output, []).append((i, False))

    def hook_for(entries: list[tuple[int, bool]]) -> object:
        def hook(value: Tensor, keep: Tensor | None) -> None:
            rows = tokens(value, keep, last)
            for i, enters in sorted(entries):  # a value that leaves one run may enter another
                if enters:
                    inputs[i].append(rows)
                else:
                    found[i].append(cosine(inputs[i].pop(0), rows))

        return hook

    study.observe(program, samples, outputs={ref: hook_for(e) for ref, e in hooks.items()}, text="comparing layers")  # type: ignore[misc]
    return found


def tokens(value: Tensor, keep: Tensor | None, last: bool) -> Tensor:
    """Rows [tokens, features] of a value [batch, length, features], [rows, features] or [batch, channels, ...] (an image: pixels)."""
    if keep is not None:
        if last and keep.ndim == 2:
            place = keep.long() * torch.arange(1, keep.shape[1] + 1)
            return value[torch.arange(len(value)), place.argmax(1)]
        return value[keep]
    if value.ndim == 4:
        value = value.movedim(1, -1).reshape(value.shape[0], -1, value.shape[1])
    if last and value.ndim == 3:
        return value[:, -1]
    return value.reshape(-1, value.shape[-1])


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Row by row in float64; NaN (a zero row) counts as 0.5. Rows of unlike number or size have no cosine: minus infinity."""
    if x.shape != y.shape:
        return torch.full((1,), -torch.inf, dtype=torch.float64)
    x, y = x.double(), y.double()
    value = (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    return value.nan_to_num(nan=0.5, posinf=0.5, neginf=0.5)
