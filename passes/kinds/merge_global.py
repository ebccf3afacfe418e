"""Facts of whole task vectors: the magnitude above which entries stay, and the sign that most of them have (TIES, global trim)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.model.program import Program
from surgery.model.realise import realise
from surgery.passes.kinds.merge import Source
from surgery.passes.kinds.merge_math import Ranking, Sparsifier, Top, chunks, delta_of, keep_all, nothing
from surgery.passes.operation import Resolved


def rank(
    program: Program, op: Resolved, names: Sequence[str], sources: Sequence[Source], density: float, weighted: bool
) -> dict[str, tuple[Any, ...]]:
    """For each tensor ``(((key, ties) of each model), majority sign)``: see :class:`~surgery.passes.kinds.merge_math.Top`.

    Three streamed passes over all tensors: bins, thresholds, and the sign of the summed trimmed task vectors. Empty while planning.
    """
    study = op.study
    if study is None:
        return {}
    total = sum(math.prod(program.weights[n].shape) for n in names)
    keep = int(density * total)
    rankings = [Ranking() for _ in sources]
    work = 3 * len(names)

    def walk(step: int) -> Iterator[tuple[str, Tensor, list[Tensor]]]:
        for i, name in enumerate(names):
            study.progress(f"merge {op.name}: ranking task vectors", step * len(names) + i, work)
            exprs = [program.weights[name], *(program.weights[name] if s.own else s.weights[s.aliases.get(name, name)] for s in sources)]
            base, *experts = (realise(e, functions=study.tensors.functions) for e in exprs)
            yield name, base, experts

    if 0 < keep < total:
        for _, base, experts in walk(0):
            for ranking, expert in zip(rankings, experts, strict=True):
                delta = delta_of(expert, base)
                for at in chunks(base.shape):
                    ranking.count(delta(at))
        for ranking in rankings:
            ranking.settle(keep)
        for _, base, experts in walk(1):
            for ranking, expert in zip(rankings, experts, strict=True):
                delta = delta_of(expert, base)
                for at in chunks(base.shape):
                    ranking.gather(delta(at))
        found = [r.threshold() for r in rankings]
    else:
        found = [(-1, 0) if keep else (0x7FFFFFFF, 0)] * len(sources)
    left = [ties for _, ties in found]
    out: dict[str, tuple[Any, ...]] = {}
    majority = 0
    for name, base, experts in walk(2):
        mine = [(key, ties) for (key, _), ties in zip(found, left, strict=True)]
        tops: list[Sparsifier] = [keep_all if keep >= total else nothing if not keep else Top(*pair) for pair in mine]
        deltas = [delta_of(e, base) for e in experts]
        for at in chunks(base.shape):
            summed = torch.zeros(at.stop - at.start)
            for clean, delta, source in zip(tops, deltas, sources, strict=True):
                summed.add_(clean(delta(at), at), alpha=source.weight if weighted else 1.0)
            majority += int(np.sign(summed.numpy()).sum())
        for i, clean in enumerate(tops):
            if isinstance(clean, Top):
                left[i] = clean.ties
        out[name] = (tuple(mine),)
    sign = 1.0 if majority >= 0 else -1.0
    return {name: (*facts, sign) for name, facts in out.items()}
