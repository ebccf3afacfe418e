from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.kinds.lowrank import LowRankMethod, factor_shapes, product


@dataclass(frozen=True)
class Pissa(LowRankMethod):
    """LoRA that starts from the principal singular vectors of the weight.

    With ``W = U S V^T`` and ``s = alpha / rank`` the largest ``rank`` components move into the factors and the base keeps the rest:

        B = U_r diag(sqrt(S_r / s)),   A = diag(sqrt(S_r / s)) V_r^T,   W <- W - s B A

    so training changes the directions that matter most. The sum is the old weight up to rounding (relative 1e-4 in float32;
    a base kept in half precision rounds its residual again, about 4e-3 in bfloat16). ``iterations = 0`` computes the full
    decomposition; a positive number uses a randomised one with so many power iterations, much faster on large weights.

    Parameters and fold as ``lora``. Against the original checkpoint the trained change is a LoRA of rank ``2 rank``.

        adapt pissa(rank = 16, alpha = 16, iterations = 4) on layers[*].attn.{q, v}

    Source: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation", 2024, arXiv:2404.02948, section 3.
    """

    identity: ClassVar[str] = "near"
    identity_bound: ClassVar[float] = 1e-4
    version: ClassVar[int] = 1
    exchange: ClassVar[Mapping[str, Any] | None] = {"init_lora_weights": "pissa"}

    iterations: int = param(0, "power iterations of a randomised decomposition; 0 computes it in full", min=0, max=64)

    def tensors(self, site: Geometry) -> tuple[TensorSpec, ...]:
        a, b = factor_shapes(site, self.rank)
        return TensorSpec("A", a, "principal", output=0), TensorSpec("B", b, "principal", output=1)

    def rebase(self, site: Geometry) -> tuple[str, int]:
        return "principal", 2

    def check(self, site: Geometry) -> str:
        if self.rank > site.max_rank:
            return f"the weight has {site.max_rank} singular values, fewer than the rank {self.rank}"
        if not self.alpha:
            return "alpha = 0 leaves nothing to divide the singular values by"
        return super().check(site)


def principal(stored: Tensor, *, site: Any, seed: int = 0, **params: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``A``, ``B`` and the residual of a stored weight (of the site's rows), all float32; each group or expert on its own."""
    geometry, method = Geometry.of(site), Pissa(**params)
    weight = geometry.to_canonical(stored.float())
    groups, rank, scale = geometry.groups, method.rank // geometry.groups, method.scale()
    batched = weight.reshape(groups, geometry.out // groups, -1) if geometry.op == "conv" else weight
    if method.iterations:
        u, s, vt = _randomised(batched, rank, method.iterations, seed)
    else:
        u, s, vt = torch.linalg.svd(batched, full_matrices=False)
    root = (s[..., :rank] / scale).sqrt()
    a_shape, b_shape = factor_shapes(geometry, method.rank)
    a = (root.unsqueeze(-1) * vt[..., :rank, :]).reshape(a_shape)
    b = (u[..., :rank] * root.unsqueeze(-2)).reshape(b_shape)
    residual = weight - scale * product(geometry, a, b)
    return a.contiguous(), b.contiguous(), geometry.from_canonical(residual).contiguous()


def _randomised(weight: Tensor, rank: int, iterations: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Halko, Martinsson and Tropp's subspace iteration (arXiv:0909.4061, algorithm 4.4) with its own generator."""
    generator = torch.Generator().manual_seed(seed)
    columns = min(rank + 8, *weight.shape[-2:])
    probe = torch.randn(*weight.shape[:-2], weight.shape[-1], columns, generator=generator)
    q, _ = torch.linalg.qr(weight @ probe)
    for _ in range(iterations):
        q, _ = torch.linalg.qr(weight.mT @ q)
        q, _ = torch.linalg.qr(weight @ q)
    u, s, vt = torch.linalg.svd(q.mT @ weight, full_matrices=False)
    return q @ u, s, vt
