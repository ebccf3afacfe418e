"""LD-Pruner's score of a part: how far the model's result moves when this part alone is bypassed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.core.site import Site
from surgery.model.program import Program
from surgery.passes.kinds.drop_extract import Extraction, is_layer
from surgery.passes.operation import Resolved


def distance(original: Tensor, changed: Tensor) -> float:
    """``|avg(O) - avg(M)| + |std(O) - std(M)|`` of results ``[n, ...]`` over their ``n`` samples.

    Averages and standard deviations (with ``n`` below the root) are by element, the norms Euclidean over all elements.

    Source: Castells et al., "LD-Pruner: Efficient Pruning of Latent Diffusion Models using Task-Agnostic Insights", 2024,
    arXiv:2404.11936, section 3.
    """
    o, m = original.double(), changed.double()
    middle = (o.mean(0) - m.mean(0)).norm()
    spread = (o.std(0, correction=0) - m.std(0, correction=0)).norm()
    return float(middle + spread)


def distances(program: Program, op: Resolved, sites: Sequence[Site]) -> list[float]:
    """The distance of each part, in order. The parts are bypassed in copies of the program; one pass of all samples for each."""
    assert op.study is not None
    original = results(program, op)
    found = []
    for number, site in enumerate(sites, 1):
        copy = program.copy()
        Extraction(copy, op.origin.span).run([site] if is_layer(site) else [], [] if is_layer(site) else [site])
        found.append(distance(original, results(copy, op)))
        op.study.progress("bypassing one part after the other", number, len(sites))
    return found


def results(program: Program, op: Resolved) -> Tensor:
    """The first floating result of every sample, side by side; padding counts as zero, longer results end with the shortest."""
    assert op.study is not None
    parts: list[Tensor] = []
    for batch, out in zip(op.data.batches(program), op.study.outputs(program, op.data), strict=True):
        value = next((t for t in out if isinstance(t, Tensor) and t.is_floating_point()), None)
        if value is None:
            raise fail("S0475", "the model has no floating result to compare", op.origin.span, "chosen by latent_distance")
        for _, real in batch.masks:
            if tuple(value.shape[:2]) == tuple(real.shape):
                value = value * real.reshape(*real.shape, *(1,) * (value.ndim - 2)).to(value.dtype)
        parts.append(value)
    shape = [min(sizes) for sizes in zip(*(p.shape[1:] for p in parts), strict=True)]
    return torch.cat([p[(slice(None), *(slice(n) for n in shape))] for p in parts])
