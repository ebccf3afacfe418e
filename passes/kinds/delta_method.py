"""What a method of kind ``delta`` is: the mathematics of a change of one weight. :mod:`surgery.passes.kinds.delta` does the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core.method import Method, param
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.geometry import Geometry

Tensors = Mapping[str, Tensor]
Folder = Callable[[int, int, Tensor], Tensor]
"""Rows ``[start, stop)`` of a canonical weight with a change in them; the rows that are given may be used up."""


@dataclass(frozen=True)
class DeltaMethod(Method):
    """Base of the methods that change one weight.

    Give either :meth:`delta` or :meth:`fold`; each is made from the other. ``reads`` names what the live module needs
    besides the site's input and output: ``weight`` (stored weight), ``bias``, ``base`` (the output before any adapter). A method
    whose change depends on the weight must read it.
    """

    kind: ClassVar[str] = "delta"

    shared: bool = param(False, "one adapter for all uses of a weight that layers share, in place of one for each layer", last=True)
    fold_class: ClassVar[str] = "merge"
    reads: ClassVar[tuple[str, ...]] = ()
    by_pieces: ClassVar[bool] = False
    """Whether most weights are folded block by block (:meth:`rows`), so that stored ones need not be in memory."""

    # -------------------------------------------------------------- mathematics of the method

    def tensors(self, site: Geometry) -> tuple[TensorSpec, ...]:
        """The tensors added at a site, in order."""
        raise NotImplementedError

    def count(self, site: Geometry) -> int:
        """How many parameters are added at a site, by the method's published formula."""
        raise NotImplementedError

    def delta(self, site: Geometry, t: Tensors, weight: Tensor) -> Tensor:
        """The change of the canonical ``weight`` (see :class:`Geometry`), same shape."""
        return self.fold(site, t, weight) - weight

    def fold(self, site: Geometry, t: Tensors, weight: Tensor) -> Tensor:
        """The canonical weight with the change in it."""
        return weight + self.delta(site, t, weight)

    def fold_into(self, site: Geometry, t: Tensors, weight: Tensor) -> Tensor:
        """The same bits as :meth:`fold`; ``weight`` may be used up."""
        return self.fold(site, t, weight)

    def rows(self, site: Geometry, t: Tensors, start: int, stop: int) -> Tensors | None:
        """The tensors with which :meth:`fold` changes rows ``[start:stop)`` of the canonical weight alone, given only these rows;
        None where a row depends on others."""
        return None

    def folder(self, site: Geometry, t: Tensors) -> Folder | None:
        """``fold(start, stop, weight)`` as :meth:`fold_into` with the tensors of :meth:`rows` does it, for float32 weights and without gradients, where
        there is less to say of every block; None where there is not."""
        return None

    def rebase(self, site: Geometry) -> tuple[str, int] | None:
        """Function and output number that give the rewritten base weight, for methods that move a part of it out."""
        return None

    def check(self, site: Geometry) -> str:
        """Why the method cannot stand at this site, or an empty text."""
        return ""

    def note(self, site: Geometry) -> str:
        """A remark about this site for the plan, or an empty text."""
        return ""

    def forward(self, site: Geometry, t: Tensors, x: Tensor, out: Tensor, extra: Tensors, training: bool) -> Tensor:
        """The site's output ``out`` with this method's change, from the site's input ``x``; methods give a faster one."""
        return self.through_weight(site, t, x, out, extra, training)

    def through_weight(
        self, site: Geometry, t: Tensors, x: Tensor, out: Tensor, extra: Tensors, training: bool, keep: Tensor | None = None
    ) -> Tensor:
        """:meth:`forward` by way of the change itself, which is zero where ``keep`` (canonical, None: nowhere) is false."""
        weight = extra.get("weight")
        dropout = getattr(self, "dropout", 0.0)
        if dropout and training and site.op != "embedding":
            x = F.dropout(x, dropout)
        delta = self.delta(site, t, None if weight is None else weight.to(out.dtype))  # type: ignore[arg-type]
        if keep is not None:
            delta = torch.where(keep, delta, delta.new_zeros(()))
        delta = delta.to(out.dtype)  # adapters of a half-precision base are float32
        return out + site.spread(site.apply(x, delta), axis=1 if site.op == "conv" else -1)

    def on_linear(self, site: Geometry, t: Tensors, x: Tensor, weight: Tensor, bias: Tensor | None, training: bool) -> Tensor | None:
        """Base product and change of a linear site together, for methods that have less work that way; None: not here."""
        return None

    def on_weight(self, site: Geometry, t: Tensors, stored: Tensor, weight: Tensor) -> Tensor:
        """The stored expert tensor with this method's change (of the canonical ``weight`` of the site's rows)."""
        t = {k: v.to(weight.dtype) for k, v in t.items()}
        change = site.from_canonical(self.delta(site, t, weight))
        return stored + site.spread(change, axis=site.out_axis)

    def wants_weight(self) -> bool:
        """Whether the change depends on the stored weight, so that nothing else may rewrite that weight under it."""
        return "weight" in self.reads
