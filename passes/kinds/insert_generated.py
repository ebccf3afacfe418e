"""Bottlenecks whose two weights are made of smaller tensors while they train; folding leaves a plain bottleneck (fold class ``const``).

A *hypercomplex* linear map ``in -> out`` is a sum of ``n`` Kronecker products, ``H = sum_i A_i (x) B_i`` with ``A_i [n, n]`` and
``B_i [in / n, out / n]``, ``y = z H``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.insert import InsertMethod, Stream, Tensors


def kronecker_sum(a: Tensor, b: Tensor) -> Tensor:
    """``sum_i A_i (x) B_i`` for ``a [n, p, q]`` and ``b [n, r, s]``: ``[p r, q s]``."""
    made = torch.einsum("iac,ikp->akcp", a, b)
    return made.reshape(a.shape[1] * b.shape[1], a.shape[2] * b.shape[2])


@dataclass(frozen=True)
class GeneratedBottleneck(InsertMethod):
    """Base of the methods that insert ``h + f(z D + d) U + u`` with generated ``D [inp, width]`` and ``U [width, out]``."""

    fold_class: ClassVar[str] = "const"
    identity: ClassVar[str] = "near"
    places: ClassVar[tuple[str, ...]] = ("after", "beside")

    width: int = param(24, "features of the bottleneck", min=1, per_layer=True)
    n: int = param(4, "Kronecker products in a weight; divides the width and the features of the model", min=1)
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "identity"] = param(
        "gelu_tanh", "function between the two projections"
    )
    seed: int = param(0, "changes every random initial value of this statement", min=0)

    def generators(self, name: str, inp: int, out: int) -> tuple[TensorSpec, ...]:
        """What makes one of the two weights, called ``down`` and ``up``."""
        raise NotImplementedError

    def weight(self, name: str, t: Tensors) -> Tensor:
        """That weight ``[inp, out]``."""
        raise NotImplementedError

    def check(self, site: Stream) -> str:
        wrong = next((size for size in (self.width, site.inp, site.out) if size % self.n), None)
        return "" if wrong is None else f"{wrong} features are not divided by n = {self.n}"

    def tensors(self, site: Stream) -> tuple[TensorSpec, ...]:
        down, up = self.generators("down", site.inp, self.width), self.generators("up", self.width, site.out)
        specs = (*down, TensorSpec("down_bias", (self.width,)), *up, TensorSpec("up_bias", (site.out,)))
        return tuple({spec.name: spec for spec in specs}.values())  # both weights may share a generator

    def forward(self, site: Stream, t: Tensors, z: Tensor, out: Tensor, training: bool) -> Tensor:
        down, up = self.weight("down", t).to(z.dtype), self.weight("up", t).to(z.dtype)
        h = z @ down + t["down_bias"].to(z.dtype)
        f = {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "identity": lambda x: x, "tanh": torch.tanh}
        h = f[self.activation](h) if self.activation in f else getattr(F, self.activation)(h)
        return (out + (h @ up + t["up_bias"].to(z.dtype))).to(out.dtype)

    def plain(self, site: Stream, t: Tensors) -> tuple[Tensor, ...]:
        """The tensors of the plain bottleneck that computes the same, in its order."""
        return self.weight("down", t).t(), t["down_bias"], self.weight("up", t).t(), t["up_bias"]

    def plain_params(self) -> dict[str, object]:
        return {"width": self.width, "activation": self.activation}


def xavier(name: str, shape: tuple[int, ...], inp: int, out: int) -> TensorSpec:
    """Uniform with the deviation ``sqrt(2) sqrt(2 / (inp + out))``."""
    bound = math.sqrt(2.0) * math.sqrt(6.0 / (inp + out))
    return TensorSpec(name, shape, "uniform", (-bound, bound))
