from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from surgery.core.method import param
from surgery.model.cut_attached import Kept
from surgery.model.dims.masks import Mask
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.delta import DeltaMethod, Tensors
from surgery.passes.kinds.geometry import Geometry


@dataclass(frozen=True)
class Splopa(DeltaMethod):
    """A change made of blocks that all layers share, pruned block by block together with its layer.

    The frozen weight gets a sum of Kronecker products of a small matrix of positions with a rank-one prototype block:

        W' = W + sum_j kron(P_j, c_j r_j)        P_j [out / block, in / block], c_j [block, 1], r_j [1, block]

    The prototypes are shared by all sites of the statement, the positions are of each site. Positions start at zero, which leaves the model
    unchanged (``init_range`` draws them uniform in plus or minus it), prototypes uniform in +-1/sqrt(block). Units that are removed from the
    layer must be whole blocks of ``block`` neighbours: then the rows or columns of every ``P_j`` go and the prototypes stay.

    Adds ``prototypes (out / block) (in / block)`` parameters per site, and ``2 prototypes block`` in all: 4,352 on one 64 x 64 layer with the
    defaults. Folds exactly.

        adapt splopa(prototypes = 64, block = 32) on layers[*].ffn.{up, down}

    Source: Hedegaard, Alok, Jose and Iosifidis, "Structured Pruning Adapters", 2022, arXiv:2211.10155, section 3.
    """

    prototypes: int = param(64, "number of prototype blocks", min=1)
    block: int = param(32, "rows and columns of a block", min=1)
    init_range: float = param(0.0, "first positions are uniform in plus or minus this; 0 leaves the model unchanged", min=0)
    seed: int = param(0, "changes every random initial value of this statement", min=0)

    places: ClassVar[tuple[str, ...]] = ("on",)

    def __post_init__(self) -> None:
        if self.init_range:
            object.__setattr__(self, "identity", "changed")  # of this statement; the class promises what the defaults keep

    def tensors(self, site: Geometry) -> tuple[TensorSpec, ...]:
        n, b = self.prototypes, self.block
        shape, bound = (n, site.out // b, site.inp // b), 1.0 / math.sqrt(b)
        positions = TensorSpec("positions", shape)
        if self.init_range:
            positions = TensorSpec("positions", shape, "uniform", (-self.init_range, self.init_range))
        key = f"prototypes {n} x {b}"
        return (
            positions,
            TensorSpec("columns", (n, b), "uniform", (-bound, bound), shared=f"{key}, columns"),
            TensorSpec("rows", (n, b), "uniform", (-bound, bound), shared=f"{key}, rows"),
        )

    def count(self, site: Geometry) -> int:
        return self.prototypes * (site.out // self.block * (site.inp // self.block) + 2 * self.block)

    def check(self, site: Geometry) -> str:
        if site.op != "linear":
            return f"it is a {site.op}, and blocks tile the weight of a linear layer"
        if site.out % self.block or site.inp % self.block:
            return f"its {site.out} x {site.inp} weight is not made of blocks of {self.block} x {self.block}"
        return ""

    def kept(self, site: Geometry, masks: Mapping[str, Mask | None]) -> dict[str, Kept] | str:
        """What stays of the tensors when units of the site go: whole blocks of positions."""
        blocks: list[Mask | None] = [None]
        for what in ("out", "in"):
            mask = masks.get(what)
            if mask is None:
                blocks.append(None)
                continue
            tiles = np.asarray(mask).reshape(-1, self.block)
            if (tiles.any(axis=1) != tiles.all(axis=1)).any():
                return f"splopa is made of blocks of {self.block} neighbours, and only a part of one would go"
            blocks.append(np.asarray(tiles.all(axis=1)))
        return {"positions": tuple(blocks), "columns": (None, None), "rows": (None, None)}

    def delta(self, site: Geometry, t: Tensors, weight: Tensor) -> Tensor:
        tiles = torch.einsum("nab,np,nq->apbq", t["positions"], t["columns"], t["rows"])
        return tiles.reshape(site.out, site.inp)
