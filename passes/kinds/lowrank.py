"""The normal form of low-rank changes: ``dW = s B A`` with thin ``A`` and ``B``, and its fast arithmetic.

A method gives :meth:`LowRankMethod.factors`; a core, a diagonal or a gate between the factors belongs into one of them.
Layouts are those of the adapter files that people exchange: ``A [r, in]``, ``B [out, r]`` (convolution: ``A [r, in / groups, *k]``,
``B [out, r / groups, 1, ..]``; experts: ``A [experts, r, in]``, ``B [experts, out, r]``; embedding: ``A [r, rows]``, ``B [width, r]``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core.method import param
from surgery.model.room import scratch
from surgery.passes.kinds import lowrank_linear
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.delta import DeltaMethod, Tensors
from surgery.passes.kinds.delta_method import Folder
from surgery.passes.kinds.geometry import Geometry


@dataclass(frozen=True)
class LowRankMethod(DeltaMethod):
    """Base of the methods whose change is a scaled product of two thin factors.

    ``exchange`` are the fields of an adapter file's config that say this method (see :mod:`surgery.model.adapter`); None where such files
    have no word for it.
    """

    exchange: ClassVar[Mapping[str, Any] | None] = None
    by_pieces: ClassVar[bool] = True

    rank: int = param(8, "columns of the thin factors", min=1, per_layer=True)
    alpha: float = param(16.0, "numerator of the scale", min=0, per_layer=True)
    dropout: float = param(0.0, "probability of zeroing an input of the added branch while training", min=0, max=0.99, unit="%")
    seed: int = param(0, "changes every random initial value of this statement", min=0)

    def scale(self) -> float:
        """The factor ``s`` in front of the product."""
        return self.alpha / self.rank

    def factors(self, site: Geometry, t: Tensors) -> tuple[Tensor, Tensor]:
        """``A`` and ``B`` in stored layout, without the scale."""
        return t["A"], t["B"]

    def tensors(self, site: Geometry) -> tuple[TensorSpec, ...]:
        return lora_tensors(site, self.rank)

    def count(self, site: Geometry) -> int:
        return self.rank * (site.fan_in + site.out // site.groups) * max(1, site.experts)

    def check(self, site: Geometry) -> str:
        if self.rank % site.groups:
            return f"its {site.groups} groups share the rank, and {self.rank} is not a multiple of {site.groups}"
        return ""

    def note(self, site: Geometry) -> str:
        notes = []
        if self.rank > site.max_rank:
            notes.append(f"rank {self.rank} is more than the {site.max_rank} that this weight can have")
        if self.dropout and site.op in ("embedding", "experts"):
            notes.append(f"dropout has no place at an {'embedding' if site.op == 'embedding' else 'expert tensor'}")
        return "; ".join(notes)

    def delta(self, site: Geometry, t: Tensors, weight: Tensor) -> Tensor:
        a, b = self.factors(site, t)
        return self.scale() * product(site, a, b)

    def fold_into(self, site: Geometry, t: Tensors, weight: Tensor) -> Tensor:
        own = type(self)
        if own.delta is not LowRankMethod.delta or own.fold is not DeltaMethod.fold:
            return super().fold_into(site, t, weight)
        a, b = self.factors(site, t)
        scale = self.scale()
        if site.op == "linear" and weight.dtype == torch.float32 == a.dtype == b.dtype and not torch.is_grad_enabled():
            # a power of two rounds nothing, so that one product that adds into the weight can give the same bits
            if math.frexp(scale)[0] == 0.5 and adds_last(*b.shape, a.shape[1]):
                return weight.addmm_(b, a, alpha=scale)
            # no fresh memory for the product: it would cost more than the product
            (place,) = scratch((b.shape[0], a.shape[1]), 1)
            change = torch.mm(b, a, out=place)
        else:
            change = product(site, a, b)
        return weight.add_(change if scale == 1 else change.mul_(scale))

    def rows(self, site: Geometry, t: Tensors, start: int, stop: int) -> Tensors | None:
        own = type(self)
        if own.delta is not LowRankMethod.delta or own.factors is not LowRankMethod.factors or own.fold is not DeltaMethod.fold:
            return None  # a gate, a norm or a core between the factors may look at all rows
        return {**t, "B": t["B"][start:stop]}

    def folder(self, site: Geometry, t: Tensors) -> Folder | None:
        own, (a, b), scale = type(self), self.factors(site, t), self.scale()
        if own.fold_into is not LowRankMethod.fold_into or site.op != "linear" or self.rows(site, t, 0, 1) is None:
            return None
        if not a.dtype == b.dtype == torch.float32 or math.frexp(scale)[0] != 0.5:
            return None
        rank, columns = a.shape

        def fold(start: int, stop: int, weight: Tensor) -> Tensor:
            part = b[start:stop]
            if adds_last(stop - start, rank, columns):
                return weight.addmm_(part, a, alpha=scale)
            return self.fold_into(site, {**t, "B": part}, weight)

        return fold

    def forward(self, site: Geometry, t: Tensors, x: Tensor, out: Tensor, extra: Tensors, training: bool) -> Tensor:
        a, b = self.factors(site, t)
        if self.dropout and training and site.op != "embedding":
            x = F.dropout(x, self.dropout)
        return add_low_rank(site, x, out, a, b, self.scale())

    def on_linear(self, site: Geometry, t: Tensors, x: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor | None:
        if type(self).forward is not LowRankMethod.forward:
            return None
        a, b = self.factors(site, t)
        if not lowrank_linear.fits(x, weight, bias, a, b):
            return None
        p = self.dropout if training else 0.0
        return lowrank_linear.LowRankLinear.apply(x, weight, bias, a, b, self.scale(), p)  # type: ignore[no-any-return,no-untyped-call]

    def on_weight(self, site: Geometry, t: Tensors, stored: Tensor, weight: Tensor) -> Tensor:
        if type(self).delta is not LowRankMethod.delta:  # more than the product: the general way
            return super().on_weight(site, t, stored, weight)
        a, b = (v.to(stored.dtype) for v in self.factors(site, t))
        b = site.spread(b, axis=1)
        # one product that adds into a copy of the weight: no change of full size is ever held beside it
        if site.transposed:
            return torch.baddbmm(stored, a.transpose(1, 2), b.transpose(1, 2), alpha=self.scale())
        return torch.baddbmm(stored, b, a, alpha=self.scale())


@lru_cache(maxsize=256)
def adds_last(rows: int, rank: int, columns: int) -> bool:
    """Whether a product of these sizes that adds into a matrix forms its sums first, here and on one thread: then it has the bits of a product and a
    sum. Libraries differ in this, by processor and by size; it is tried on random numbers."""
    generator = torch.Generator().manual_seed(0)
    b, a, into = (torch.randn(shape, generator=generator) for shape in ((rows, rank), (rank, columns), (rows, columns)))
    return torch.equal(torch.addmm(into, b, a, alpha=2.0), into + torch.mm(b, a).mul_(2.0))


def lora_tensors(site: Geometry, rank: int) -> tuple[TensorSpec, ...]:
    """LoRA's tensors: ``A`` uniform in +-1/sqrt(fan in) and ``B`` zero; an embedding has ``A`` zero and ``B`` normal."""
    a, b = factor_shapes(site, rank)
    if site.op == "embedding":
        return TensorSpec("A", a), TensorSpec("B", b, "normal", (0.0, 1.0))
    bound = 1.0 / math.sqrt(site.fan_in)
    return TensorSpec("A", a, "uniform", (-bound, bound)), TensorSpec("B", b)


def factor_shapes(site: Geometry, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The stored shapes of ``A`` and ``B``."""
    if site.experts:
        return (site.experts, rank, site.inp), (site.experts, site.out, rank)
    if site.op == "conv":
        ones = (1,) * len(site.kernel)
        return (rank, site.inp // site.groups, *site.kernel), (site.out, rank // site.groups, *ones)
    return (rank, site.inp), (site.out, rank)


def product(site: Geometry, a: Tensor, b: Tensor) -> Tensor:
    """``B A`` in canonical form, group by group for grouped convolutions."""
    if site.op != "conv":
        return b @ a
    g = site.groups
    parts = b.reshape(g, site.out // g, -1) @ a.reshape(g, a.shape[0] // g, -1)
    return parts.reshape(site.out, -1)


def low_rank_input(site: Geometry, x: Tensor, a: Tensor) -> Tensor:
    """``A x``: the small activation between the factors (``[..., r]``, of a convolution ``[n, r, ...]``)."""
    if site.op == "embedding":
        return F.embedding(x, a.t(), padding_idx=site.padding_idx)
    a = a.to(x.dtype)
    return site.convolve(x, a) if site.op == "conv" else F.linear(x, a)


def add_low_rank(site: Geometry, x: Tensor, out: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``out + scale * B A x``.

    The second product adds straight into the result (``addmm`` with its ``alpha``), so neither the change nor its scaled
    copy exists at full size in forward, and backward reads the incoming gradient as it is.
    """
    h = low_rank_input(site, x, a)
    if site.op == "conv":
        return out + site.pointwise(h, (b * scale).to(h.dtype))
    b = site.spread(b.to(h.dtype))
    y = torch.addmm(out.reshape(-1, out.shape[-1]).to(h.dtype), h.reshape(-1, h.shape[-1]), b.t(), alpha=scale)
    return y.view(out.shape).to(out.dtype)
