from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.model.dims.masks import to_ranges
from surgery.model.weights import Apply, Expr, select
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.delta import Tensors
from surgery.passes.kinds.geometry import Geometry, take
from surgery.passes.kinds.lowrank import LowRankMethod, lora_tensors, low_rank_input, product


@dataclass(frozen=True)
class Dora(LowRankMethod):
    """LoRA on the direction of a weight, with a trained magnitude for each output.

    The weight with its low-rank change ``V = W + s B A`` (``s = alpha / rank``) is scaled, output by output, to a trained length:

        y = x (diag(m / n) V)^T + b,   n = |V| per output, held constant in backward,   m [out]

    ``m`` starts at the norms of ``W`` and ``B`` at zero: unchanged at the start up to the rounding of ``m / n``. The bias is not
    scaled. With dropout the whole branch, base product included, sees the dropped input. A convolution takes norms over all
    axes but the first, an embedding over its rows.

    Adds ``rank (in + out) + out`` parameters per site. Folds exactly: ``diag(m / n) (W + s B A)``.

        adapt dora(rank = 8, alpha = 16) on layers[*].attn.{q, v}

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv:2402.09353, equations 5 and 11.
    """

    identity: ClassVar[str] = "near"
    identity_bound: ClassVar[float] = 1e-5
    reads: ClassVar[tuple[str, ...]] = ("weight", "bias", "base")
    exchange: ClassVar[Mapping[str, Any] | None] = {"use_dora": True}

    def tensors(self, site: Geometry) -> tuple[TensorSpec, ...]:
        length = (site.experts, site.out) if site.experts else (site.out,)
        return (*lora_tensors(site, self.rank), TensorSpec("magnitude", length, "norms"))

    def count(self, site: Geometry) -> int:
        return super().count(site) + site.out * max(1, site.experts)

    def fold(self, site: Geometry, t: Tensors, weight: Tensor) -> Tensor:
        a, b = self.factors(site, t)
        v = weight + self.scale() * product(site, a, b)
        return (t["magnitude"] / _lengths(v).detach()).unsqueeze(-1) * v

    def delta(self, site: Geometry, t: Tensors, weight: Tensor) -> Tensor:
        return self.fold(site, t, weight) - weight

    def rows(self, site: Geometry, t: Tensors, start: int, stop: int) -> Tensors:
        return {**t, "B": t["B"][start:stop], "magnitude": t["magnitude"][start:stop]}  # a length is that of one row

    def recut(self, site: Geometry, kept: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Expr]], Expr]]:
        """Where inputs go the lengths shrink with them: the magnitude shrinks alike, so that what stays of the weight is as it was."""
        inner = kept["in"]
        ranges = None if inner is None else to_ranges(inner)

        def magnitude(given: Mapping[str, Expr]) -> Expr:
            parts = (given["magnitude"], given["A"], given["B"], select(given["weight"], site.out_axis, site.rows or ((0, site.full_out),)))
            params = tuple((k, v) for k, v in self.params().items() if k != "seed")
            params = (*params, ("site", site.pairs()), ("kept", ranges))
            return Apply(parts[0].shape, parts[0].dtype, "adapt/dora:shorter", parts, params)

        return {} if ranges is None else {"magnitude": magnitude}

    def ratio(self, site: Geometry, t: Tensors, weight: Tensor) -> Tensor:
        """``m / n`` per output.

        For matrices ``n^2 = |W|^2 + 2 s B.(W A^T) + s^2 B (A A^T) B^T`` row by row: the product ``B A`` is never formed. Norms are
        computed in float32 and rounded as the magnitude was, so that the two cancel at the start in any dtype.
        """
        scale, m = self.scale(), t["magnitude"]
        wide = torch.promote_types(m.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            a, b = (v.to(wide) for v in self.factors(site, t))
            weight = weight.to(wide)
            if site.op == "linear":
                square = _lengths(weight).square()
                square = square + b.mul(scale).mul(2 * F.linear(weight, a) + scale * (b @ (a @ a.t()))).sum(-1)
                n = square.clamp_min_(torch.finfo(wide).tiny).sqrt_()
            else:
                n = _lengths(weight + scale * product(site, a, b))
        return m / n.to(m.dtype)

    def forward(self, site: Geometry, t: Tensors, x: Tensor, out: Tensor, extra: Tensors, training: bool) -> Tensor:
        a, b = self.factors(site, t)
        ratio = self.ratio(site, t, extra["weight"])
        channels = 1 if site.op == "conv" else -1
        base, bias = extra["base"], extra.get("bias")
        if self.dropout and training and site.op != "embedding":
            x = F.dropout(x, self.dropout)
            base, bias = site.apply(x, extra["weight"].to(x.dtype)), None
        else:
            base = take(base, site.rows, channels % base.dim())
        h = low_rank_input(site, x, a)
        shape = (-1,) + (1,) * (base.dim() - 2) if channels == 1 else (-1,)
        if bias is not None:
            base = base - bias.to(base.dtype).view(shape)
        growth = (ratio - 1).to(base.dtype)
        b = (b.reshape(b.shape[0], -1) * (ratio * self.scale()).unsqueeze(-1)).to(h.dtype)
        if site.op == "conv":
            change = site.pointwise(h, b)
            change = torch.addcmul(change, base, growth.view(shape))
            return out + site.spread(change, axis=1)
        change = torch.addcmul(F.linear(h, b), base, growth)
        return out + site.spread(change, axis=-1).to(out.dtype)


def norms(stored: Tensor, *, site: Any, **_: Any) -> Tensor:
    """The initial magnitude: the length of each output's weights."""
    weight = Geometry.of(site).to_canonical(stored)
    return _lengths(weight.float() if weight.dtype != torch.float64 else weight)


def shorter(magnitude: Tensor, a: Tensor, b: Tensor, stored: Tensor, *, site: Any, kept: Any, **params: Any) -> Tensor:
    """The magnitude for a weight that keeps only the inputs ``kept`` (ranges): ``m |V kept| / |V|`` of each output."""
    geometry, method = Geometry.of(site), Dora(**params)
    wide = torch.promote_types(magnitude.dtype, torch.float32)
    v = geometry.to_canonical(stored.to(wide)) + method.scale() * product(geometry, a.to(wide), b.to(wide))
    v = v.reshape(*v.shape[:-1], geometry.inp // geometry.groups, -1)
    some = take(v, kept, v.dim() - 2)
    old, new = _lengths(v.flatten(-2)), _lengths(some.flatten(-2))
    return (magnitude.to(wide) * new / old.clamp_min(torch.finfo(wide).tiny)).to(magnitude.dtype)


def _lengths(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=-1)
