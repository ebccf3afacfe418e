from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import ClassVar, Literal

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.kinds.mask import MaskMethod

BLOCK = 128
"""Columns that SparseGPT chooses and corrects together."""
DAMP = 0.01
"""Share of the mean diagonal that is added to the diagonal of a Gram matrix."""


@dataclass(frozen=True)
class Mask(MaskMethod):
    """Single weights become zero and stay zero.

    Of ``n`` weights exactly ``int(n ratio)`` go, those of lowest score; of equal scores the first:

        magnitude   |W[o, c]|
        wanda       |W[o, c]| |X[:, c]|          X: the inputs of the site on the calibration data
        sparsegpt   W[o, c]^2 / U[c, c]^2        U: upper Cholesky factor of the inverse of X^T X, damped by 1 %
        random      any

    They are chosen in the whole matrix (``per = matrix``; each expert of its own) or in each output's row (``per = row``, the usual
    way for wanda). With ``pattern = "N:M"`` at most ``N`` of each ``M`` consecutive inputs of a row stay: ``"2:4"`` is what sparse
    tensor cores read. ``sparsegpt`` goes through the columns in blocks of 128 and, column by column, corrects the weights to the
    right of what it drops (``W[:, c:] -= e U[c, c:]``, ``e`` the dropped part over ``U[c, c]``), so that the outputs change least;
    the other scores leave the remaining weights as they are. With data, the inputs of a layer are those behind the masked
    layers in front of it.

    The mask is part of the model: adapters on the weight keep their change off the zeros, live and folded alike; training keeps
    the zeros; a later mask adds to it. The score sees the stored weight, not what adapters add. Biases and embeddings have no mask.
    No parameter is removed, and dense kernels are no faster for it.

        prune mask(ratio = 50%) on layers[*].attn.{q, k, v, o}, layers[*].ffn.{up, down}
        prune mask(score = wanda, pattern = "2:4") on layers[*].ffn.{up, down} using text

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", 2023, arXiv:2306.11695, section 3;
    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023, arXiv:2301.00774, algorithm 1.
    """

    takes_data: ClassVar[bool] = True

    score: Literal["magnitude", "wanda", "sparsegpt", "random"] = param("magnitude", "what decides which weights go")
    ratio: float | None = param(None, "share of the weights that go; 50% when no pattern is given", min=0, max=1, unit="%", per_layer=True)
    pattern: str | None = param(None, 'how many of how many consecutive inputs of a row stay, for example "2:4"')
    per: Literal["matrix", "row"] | None = param(None, "among which weights the share is taken; row for wanda, else matrix")
    seed: int = param(0, "seed of the random score", min=0)

    def __post_init__(self) -> None:
        if self.pattern is not None:
            if self.ratio is not None:
                raise ValueError("`ratio` and `pattern` both say how many weights go: give one of them")
            if self.per is not None:
                raise ValueError("a `pattern` is taken in each row: leave `per` out")
            found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
            if found is None or not 0 < int(found[1]) < int(found[2]):
                raise ValueError(f'`pattern = "{self.pattern}"` is not of the form "N:M" with N of M weights staying, 0 < N < M')
        if self.score == "sparsegpt" and self.per == "row":
            raise ValueError("`sparsegpt` chooses among all rows of a block of columns: leave `per` out")

    @property
    def group(self) -> tuple[int, int] | None:
        """``(stay, of)`` of a pattern."""
        if self.pattern is None:
            return None
        stay, of = self.pattern.split(":")
        return int(stay), int(of)

    @property
    def share(self) -> float:
        return 0.5 if self.ratio is None else self.ratio

    @property
    def rows(self) -> bool:
        return self.per == "row" or (self.per is None and self.score == "wanda")

    @property
    def statistic(self) -> str:
        return {"wanda": "norms", "sparsegpt": "gram"}.get(self.score, "")

    def stand_in(self) -> MaskMethod:
        return replace(self, score="magnitude", per="row" if self.rows and self.pattern is None else self.per)

    def advice(self) -> tuple[bool, str]:
        if self.group is None:
            return True, ""
        return False, f"{self.pattern} is faster on kernels for this pattern only: dense ones compute with its zeros"

    def faults(self, site: Geometry) -> tuple[str, str] | None:
        if self.group is not None and site.fan_in % self.group[1]:
            return (
                f"the pattern {self.pattern} does not divide its {site.fan_in} inputs",
                f"choose a pattern whose second number divides {site.fan_in}, or give a `ratio`",
            )
        if self.dropped(site) == torch.Size(site.canonical).numel():
            return "no weight would stay", "choose a smaller `ratio`"
        return None

    def dropped(self, site: Geometry) -> int:
        each = max(1, site.experts)
        if self.group is not None:
            stay, of = self.group
            return each * site.out * (site.fan_in // of) * (of - stay)
        return each * (site.out * share_of(site.fan_in, self.share) if self.rows else share_of(site.out * site.fan_in, self.share))

    def drop(self, site: Geometry, weight: Tensor, statistic: Tensor | None, gone: Tensor | None) -> Tensor:
        if self.score == "random":
            score = torch.rand(weight.shape, generator=torch.Generator().manual_seed(self.seed))
        else:
            score = weight.abs()
            score = score if statistic is None else score * statistic.to(score.dtype)
        score = score if gone is None else score.masked_fill(gone, -1.0)
        if self.group is not None:
            return lowest_of_groups(score, *self.group)
        if self.rows:
            return lowest(score, share_of(site.fan_in, self.share))
        return lowest(score.flatten(-2), share_of(site.out * site.fan_in, self.share)).view(weight.shape)

    def solve(self, site: Geometry, weight: Tensor, statistic: Tensor, gone: Tensor | None) -> tuple[Tensor, Tensor] | None:
        if self.score != "sparsegpt":
            return None
        counts = _counts(site.out, self.share)
        choose = (
            None if self.group is not None else lambda score, start, stop: lowest(score.flatten(), counts(start, stop)).view(score.shape)
        )
        return sparsegpt(weight, statistic, choose, group=self.group, gone=gone)


def share_of(count: int, share: float) -> int:
    """``int(count share)`` in decimal arithmetic, so that 29% of 100 is 29."""
    return int(count * Decimal(str(share)))


def _counts(rows: int, share: float) -> Callable[[int, int], int]:
    """How many of ``rows`` times the columns ``start..stop`` go, so that all blocks together drop ``int(n share)``."""
    return lambda start, stop: share_of(rows * stop, share) - share_of(rows * start, share)


def lowest(score: Tensor, count: int) -> Tensor:
    """The ``count`` lowest of the last axis as a bool tensor; of equal ones the first."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    edge = score.kthvalue(count, dim=-1, keepdim=True).values
    below, ties = score < edge, score == edge
    wanted = count - below.sum(-1, keepdim=True)
    return below | (ties & (ties.cumsum(-1, dtype=torch.int32) <= wanted))


def lowest_of_groups(score: Tensor, stay: int, of: int) -> Tensor:
    """All but ``stay`` of every ``of`` consecutive entries of the last axis."""
    return lowest(score.unflatten(-1, (-1, of)), of - stay).flatten(-2)


def sparsegpt(
    weight: Tensor, gram: Tensor, choose: Callable[[Tensor, int, int], Tensor] | None, *, group: tuple[int, int] | None = None,
    gone: Tensor | None = None, block: int = BLOCK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Which entries of ``weight [out, in]`` go and what becomes of the others, for inputs with ``gram = X^T X [in, in]``.

    ``choose(score, start, stop)`` drops entries of one block of columns, given their scores; with ``group = (stay, of)`` all but ``stay`` of
    each ``of`` columns go instead. Entries that are ``gone`` already go first. Works in the dtype of ``gram``. An input that is always zero has
    no say: its weights go first and, where they stay, keep their values. Algorithm 1 of SparseGPT (arXiv:2301.00774).
    """
    gram = gram.clone()
    w = weight.to(gram.dtype).clone()
    diagonal = gram.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += DAMP * diagonal.mean()
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    drop = torch.zeros_like(w, dtype=torch.bool)

    def scores(values: Tensor, start: int, stop: int) -> Tensor:
        found = (values / factor.diagonal()[start:stop]).square()
        found = found.masked_fill(dead[start:stop], 0.0)
        return found if gone is None else found.masked_fill(gone[:, start:stop], -1.0)

    if group is not None:
        block = max(1, block // group[1]) * group[1]
    for start in range(0, w.shape[1], block):
        stop = min(start + block, w.shape[1])
        if choose is not None and group is None:
            drop[:, start:stop] = choose(scores(w[:, start:stop], start, stop), start, stop)
        errors = torch.zeros_like(w[:, start:stop])
        for c in range(start, stop):
            if group is not None and (c - start) % group[1] == 0:
                end = c + group[1]
                drop[:, c:end] = lowest_of_groups(scores(w[:, c:end], c, end), *group)
            error = w[:, c].masked_fill(~drop[:, c], 0) / factor[c, c]
            w[:, c:stop] -= error.unsqueeze(1) * factor[c, c:stop]
            errors[:, c - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return drop, w.masked_fill(drop, 0).to(weight.dtype)
