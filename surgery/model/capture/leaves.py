"""Modules that stand in captured graphs besides those of ``torch.nn``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from surgery.model.attend import attend


class Attention(nn.Module):
    """Scaled dot product attention whose dropout follows ``.training``.

    ``q`` (..., queries, width), ``k`` and ``v`` (..., keys, width), ``mask`` broadcastable to (..., queries, keys).
    """

    def __init__(self, p: float, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> None:
        super().__init__()
        self.p = p
        self.is_causal = is_causal
        self.scale = scale
        self.enable_gqa = enable_gqa

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        p = self.p if self.training else 0.0
        return attend(q, k, v, mask, p, self.is_causal, scale=self.scale, enable_gqa=self.enable_gqa)

    def extra_repr(self) -> str:
        return f"p={self.p}, is_causal={self.is_causal}, scale={self.scale}, enable_gqa={self.enable_gqa}"


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): in training each row of the batch is zeroed with probability ``p`` and the
    others are divided by ``1 - p``."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = 1 - self.p
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        draw = keep + torch.rand(shape, dtype=x.dtype, device=x.device)
        draw.floor_()
        return x.div(keep) * draw

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Jitter(nn.Module):
    """Multiplicative noise: in training every element is multiplied by a draw of its own, uniform in [``low``, ``high``)."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low = low
        self.high = high

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).uniform_(self.low, self.high) if self.training else x

    def extra_repr(self) -> str:
        return f"low={self.low}, high={self.high}"
