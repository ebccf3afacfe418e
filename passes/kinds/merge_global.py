"""Facts of whole task vectors: the magnitude above which entries stay, and the sign that most of them have (TIES, global trim)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.model.realise import realise
from surgery.model.threads import one_thread
from surgery.passes.kinds.merge_finite import finite
from surgery.passes.kinds.merge_inputs import Operands, Source
from surgery.passes.kinds.merge_math import Sparsifier, chunks, delta_of, keep_all
from surgery.passes.kinds.merge_sparse import Ranking, Top, between, edges, keys_of, nothing
from surgery.passes.operation import Resolved

SAMPLE = 1 << 20
"""Entries of the whole model that say where its threshold lies, about."""
HELD = 1 << 26
"""Most magnitudes that are gathered: 256 MiB. With more, which are equal ones mostly, they are counted in two more passes."""

Walk = Callable[[], Iterator[tuple[str, Tensor, list[Tensor]]]]


def rank(
    op: Resolved, operands: Mapping[str, Operands], sources: Sequence[Source], density: float, factors: Mapping[str, Sequence[float]] | None
) -> dict[str, tuple[Any, ...]]:
    """For each tensor ``(((key, ties) of each model), majority sign)``: see :class:`~surgery.passes.kinds.merge_sparse.Top`.

    The sign is that of sums weighted by the factors of each tensor, which are the sources' own where ``factors`` has none; None: not weighted.
    Three streamed passes over all tensors: a sample, the thresholds, and the sign of the summed trimmed task vectors. Empty while planning.
    Raises S0798 for weights that are not finite.
    """
    study = op.study
    if study is None:
        return {}
    total = sum(math.prod(o.base.shape) for o in operands.values())
    keep = int(density * total)
    done = 0

    def walk() -> Iterator[tuple[str, Tensor, list[Tensor]]]:
        nonlocal done
        for name, o in operands.items():
            study.progress(f"merge {op.name}: ranking task vectors", done, 3 * len(operands))
            done += 1
            base, *experts = (realise(e, functions=study.tensors.functions) for e in (o.base, *o.experts))
            if done <= len(operands):
                for value, who in zip((base, *experts), ("the model", *(s.name for s in sources)), strict=True):
                    finite(value, name, who)
            yield name, base, experts

    with one_thread():
        if 0 < keep < total:
            found = _thresholds(walk, len(sources), keep, total)
        else:
            found = [(-1, 0) if keep else (0x7FFFFFFF, 0)] * len(sources)
        return _signs(walk, sources, found, keep, total, factors)


def _thresholds(walk: Walk, models: int, keep: int, total: int) -> list[tuple[int, int]]:
    """For each model the key of the last entry that stays, and how many entries of exactly this key do."""
    samples: list[list[np.ndarray[Any, Any]]] = [[] for _ in range(models)]
    for _, base, experts in walk():
        for i, expert in enumerate(experts):
            samples[i].append(keys_of(delta_of(expert, base)(slice(0, base.numel(), max(1, total // SAMPLE)))))
    limits = [edges(np.concatenate(s), keep / total) for s in samples]
    unmoved = [low == 0 for low, _ in limits]  # entries that did not change at all need not be gathered: that they stay or go is the same
    limits = [(max(low, 1), high) for low, high in limits]
    del samples
    held, above, inside = 0, [0] * models, [list[np.ndarray[Any, Any]]() for _ in range(models)]
    for _, base, experts in walk():
        for i, expert in enumerate(experts):
            delta = delta_of(expert, base)
            for at in chunks(base.shape):
                large, middle = between(delta(at), *limits[i])
                above[i] += large
                inside[i].append(middle)
                held += middle.size
        if held > HELD:
            return _ranked(walk, models, keep)
    out: list[tuple[int, int]] = []
    for i in range(models):
        middle = np.concatenate(inside[i])
        rest = keep - above[i]
        if unmoved[i] and rest >= middle.size:
            out.append((0, 0))
            continue
        if not 0 < rest <= middle.size:
            return _ranked(walk, models, keep)
        key = int(np.partition(middle, middle.size - rest)[middle.size - rest])
        out.append((key, rest - int(np.count_nonzero(middle > key))))
    return out


def _ranked(walk: Walk, models: int, keep: int) -> list[tuple[int, int]]:
    """The same from every entry, should a sample have been wrong."""
    rankings = [Ranking() for _ in range(models)]
    for step in ("count", "gather"):
        for _, base, experts in walk():
            for ranking, expert in zip(rankings, experts, strict=True):
                delta = delta_of(expert, base)
                for at in chunks(base.shape):
                    getattr(ranking, step)(delta(at))
        if step == "count":
            for ranking in rankings:
                ranking.settle(keep)
    return [r.threshold() for r in rankings]


def _signs(
    walk: Walk,
    sources: Sequence[Source],
    found: Sequence[tuple[int, int]],
    keep: int,
    total: int,
    factors: Mapping[str, Sequence[float]] | None,
) -> dict[str, tuple[Any, ...]]:
    left = [ties for _, ties in found]
    out: dict[str, tuple[Any, ...]] = {}
    majority = 0
    for name, base, experts in walk():
        mine = [(key, ties) for (key, _), ties in zip(found, left, strict=True)]
        tops: list[Sparsifier] = [keep_all if keep >= total else nothing if not keep else Top(*pair) for pair in mine]
        deltas = [delta_of(e, base) for e in experts]
        own = [1.0] * len(sources) if factors is None else factors.get(name) or [s.weight for s in sources]
        for at in chunks(base.shape):
            summed = torch.zeros(at.stop - at.start)
            for clean, delta, factor in zip(tops, deltas, own, strict=True):
                summed.add_(clean(delta(at), at), alpha=factor)
            majority += int(np.sign(summed.numpy()).sum())
        for i, clean in enumerate(tops):
            if isinstance(clean, Top):
                left[i] = clean.ties
        out[name] = (tuple(mine),)
    sign = 1.0 if majority >= 0 else -1.0
    return {name: (*facts, sign) for name, facts in out.items()}
