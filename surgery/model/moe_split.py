"""Dividing the units of a feed-forward block into equal parts."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from surgery.core.diagnostics import fail

ROUNDS = 12
"""Rounds of assignment and averaging; most matrices stand still sooner."""


def unit_rows(rows: Tensor) -> Tensor:
    """``rows [n, d]`` scaled to length one, in float32 (float64 stays)."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-12)


def balanced_clusters(rows: Tensor, parts: int, seed: int) -> Tensor:
    """The numbers of ``rows [n, d]`` part by part, ``n / parts`` each, ascending within a part: ``[n]`` int64.

    Spherical k-means with equal sizes: rows of length one go to the most similar centre that has room, then pairs of rows change places
    while that helps. Deterministic for a seed. Raises ValueError when ``parts`` does not divide ``n``,
    S0752 for rows that are not finite.
    """
    n = rows.shape[0]
    if n % parts:
        raise ValueError(f"{n} rows cannot be {parts} equal parts")
    if not bool(torch.isfinite(rows).all()):
        count = int((~torch.isfinite(rows)).sum())
        raise fail(
            "S0752", "a feed-forward block that is to be divided has weights that are not finite", exit_code=1,
            notes=(f"{count} of {rows.numel():,} elements are NaN or infinite",),
            help="clusters need finite weights: mend or train the checkpoint again",
        )  # fmt: skip
    x = unit_rows(rows)
    centres = _spread_out(x, parts, torch.Generator().manual_seed(seed))
    owner = np.full(n, -1)
    for _ in range(ROUNDS):
        found = assign((x @ centres.t()).numpy(), n // parts)
        if np.array_equal(found, owner):
            break
        owner = found
        sums = torch.zeros_like(centres).index_add_(0, torch.from_numpy(owner), x)
        centres = sums / sums.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return torch.from_numpy(np.argsort(owner, kind="stable"))


def _spread_out(x: Tensor, parts: int, generator: torch.Generator) -> Tensor:
    """First centres: rows drawn one after the other, far ones more likely (k-means++)."""
    chosen = [int(torch.randint(x.shape[0], (1,), generator=generator))]
    distance = torch.full((x.shape[0],), float("inf"), dtype=x.dtype)
    while len(chosen) < parts:
        distance = torch.minimum(distance, (2 - 2 * (x @ x[chosen[-1]])).clamp(min=0))
        distance[chosen] = 0
        weights = distance if float(distance.sum()) > 0 else torch.ones_like(distance).index_fill_(0, torch.tensor(chosen), 0)
        chosen.append(int(torch.multinomial(weights.double(), 1, generator=generator)))
    return x[chosen].clone()


def assign(likeness: np.ndarray, room: int) -> np.ndarray:
    """For each row of ``likeness [n, parts]`` its part, ``room`` rows each, with a large sum of likeness.

    Rows with the most to lose choose first; then pairs of parts exchange rows until no exchange of two rows helps.
    """
    n, parts = likeness.shape
    order = np.argsort(-likeness, axis=1, kind="stable")
    best = np.take_along_axis(likeness, order, axis=1)
    lead = best[:, 0] - best[:, min(1, parts - 1)]
    owner = np.empty(n, np.int64)
    left = np.full(parts, room)
    for row in np.argsort(-lead, kind="stable"):
        for part in order[row]:
            if left[part]:
                owner[row], left[part] = part, left[part] - 1
                break
    for _ in range(4):
        if not any([_exchange(likeness, owner, a, b) for a in range(parts) for b in range(a + 1, parts)]):
            break
    return owner


def _exchange(likeness: np.ndarray, owner: np.ndarray, a: int, b: int) -> bool:
    """Swap rows of two parts, the most rewarding pairs first, as long as a pair gains."""
    in_a, in_b = np.flatnonzero(owner == a), np.flatnonzero(owner == b)
    to_b = likeness[in_a, b] - likeness[in_a, a]
    to_a = likeness[in_b, a] - likeness[in_b, b]
    from_a, from_b = np.argsort(-to_b, kind="stable"), np.argsort(-to_a, kind="stable")
    count = int((to_b[from_a] + to_a[from_b] > 1e-6).sum())
    owner[in_a[from_a[:count]]] = b
    owner[in_b[from_b[:count]]] = a
    return count > 0
