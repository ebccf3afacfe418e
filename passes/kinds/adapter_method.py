"""Methods that merge adapters: what they say, the parameters that they have for it, and the functions of their expressions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.model.byrows import Operand, Rows, by_rows
from surgery.passes.kinds import adapter_math
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.kinds.merge import MergeMethod, TaskMethod
from surgery.passes.kinds.merge_finite import NotFinite, beyond
from surgery.passes.kinds.merge_math import add_up

FACTORWISE = "of adapters: merge A and B each by themselves, which needs equal ranks and adds products between adapters"


@dataclass(frozen=True)
class AdapterSide:
    """What a method that merges adapters says: ``adapters`` is what it does with them (see :mod:`surgery.passes.kinds.adapter`), ``checkpoints``
    whether it merges those, too, and ``thin`` whether a sum of thin factors is all it needs."""

    adapters: ClassVar[str] = ""
    checkpoints: ClassVar[bool] = True
    thin: ClassVar[bool] = False

    def combine(self, changes: Sequence[Tensor], weights: Sequence[float], seed: int, prepared: Sequence[Any] = ()) -> Tensor:
        """One change from those of several adapters, all float32 and of one shape."""
        return add_up(list(changes), list(weights))


@dataclass(frozen=True)
class AdapterMerge(AdapterSide, MergeMethod):
    """Base of the methods that merge adapters and nothing else."""

    checkpoints: ClassVar[bool] = False


@dataclass(frozen=True)
class Refactored(AdapterSide, TaskMethod):
    """Base of the methods on task vectors that merge adapters, too: their changes of a weight take the place of task vectors, and what comes
    out is factored again by its singular vectors."""

    adapters: ClassVar[str] = "change"

    rank: Literal["largest", "full"] | int = param(
        "largest",
        "of adapters: rank of the merged one, a number, the largest of those merged, or all that the change has",
        min=1,
        last=True,
    )
    factorwise: bool = param(False, FACTORWISE, last=True)

    def combine(self, changes: Sequence[Tensor], weights: Sequence[float], seed: int, prepared: Sequence[Any] = ()) -> Tensor:
        try:
            return self.merge(torch.zeros_like(changes[0]), changes, weights, seed, tuple(prepared))
        except NotFinite:
            raise beyond("the changes of adapters", torch.float32) from None


def change(
    cls: type[Any], *tensors: Tensor, parts: Any, weights: Any, size: int, site: Any, number: int, prepared: Any = (), **params: Any
) -> Any:
    """The function ``merge/NAME:change``: ``A`` and ``B`` of the merged change of several adapters, and what they keep of it."""
    return adapter_math.change(
        cls(**params), tensors, parts=parts, weights=weights, size=size, site=Geometry.of(site), seed=number, prepared=prepared
    )


def each(cls: type[Any], *tensors: Tensor, scales: Any, number: int, **params: Any) -> Any:
    """The function ``merge/NAME:each``: ``A`` and ``B`` of several adapters merged each by themselves."""
    return adapter_math.each(cls(**params), tensors, scales=scales, seed=number)


def _rows(cls: type[Any], *tensors: Operand, part: Any, site: Any) -> Rows | None:
    """What :func:`alone` gives, some rows at a time."""
    return adapter_math.change_rows([t.whole() for t in tensors], part) if adapter_math.has_rows(part, Geometry.of(site)) else None


@by_rows(_rows)
def alone(cls: type[Any], *tensors: Tensor, part: Any, site: Any) -> Tensor:
    """The function ``merge/NAME:alone``: the change that one adapter makes at one place."""
    return next(adapter_math.changes(tensors, [part], Geometry.of(site))).contiguous()
