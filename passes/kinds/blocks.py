"""Folding a change whose rows do not depend on each other, block by block of rows.

A fold of a whole matrix makes three or four matrices of its size on the way (the wide copy, the product, its scaled copy, the sum), and
for large ones the time goes into fresh pages of memory and not into arithmetic. Blocks that fit into a core's cache use the same
few pages again. Blocks have a fixed number of rows, so the bits do not depend on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.model.byrows import Operand, Place, Rows
from surgery.model.flows import Parts, gathered
from surgery.model.pieces import Pieces
from surgery.model.room import room
from surgery.passes.kinds.geometry import Geometry

if TYPE_CHECKING:
    from surgery.passes.kinds.delta import DeltaMethod, Tensors

BLOCK = 1 << 17
"""Elements of a block: 512 KiB in float32."""


def spans(rows: int, width: int) -> list[tuple[int, int]]:
    """The rows that are computed at once: a multiple of 16, the unit of products; what is left over belongs to the last block, because
    libraries compute a product of one or two rows in another order."""
    step = max(16, BLOCK // max(1, width) // 16 * 16)
    starts = list(range(0, max(1, rows // step) * step, step))
    return list(zip(starts, [*starts[1:], rows], strict=True))


def fold_by_rows(method: DeltaMethod, site: Geometry, t: Tensors, stored: Tensor | Pieces, wide: torch.dtype) -> Tensor | None:
    """The folded weight in the dtype of ``stored``, rounded once from ``wide``; None where the method or the layout needs all rows
    at once. ``stored`` is the site's part of the weight, ``t`` the method's tensors in ``wide``. Of a matrix that is still in its file
    the rows of a block are read when their turn comes.

    Rows are those of the canonical weight: of a weight that is stored transposed they are its columns, of expert tensors each expert has
    its own. Grouped convolutions, whose rows belong to different inputs, and embeddings, whose rows are as long as the vocabulary, are left.
    """
    if site.op not in ("linear", "conv", "experts") or site.groups != 1 or stored.dim() < 2:
        return None
    one = replace(site, op="linear", experts=0) if site.experts else site
    if method.rows(one, _of_expert(t, 0) if site.experts else t, 0, 1) is None:
        return None
    if isinstance(stored, Pieces):
        if site.op == "linear" and not site.transposed:
            return gathered(_parts(method, site, t, stored, wide), stored.shape, stored.dtype)
        stored = stored.whole()
    out = room(stored.shape, stored.dtype)
    source, target = site.to_canonical(stored), site.to_canonical(out)
    for expert in range(site.experts) if site.experts else (None,):
        own = t if expert is None else _of_expert(t, expert)
        _fold_matrix(method, one, own, source if expert is None else source[expert], target if expert is None else target[expert], wide)
    return out


def _of_expert(t: Tensors, expert: int) -> Tensors:
    return {name: tensor[expert] for name, tensor in t.items()}


def _fold_matrix(method: DeltaMethod, site: Geometry, t: Tensors, source: Tensor, target: Tensor, wide: torch.dtype) -> None:
    all_rows = spans(*source.shape)
    # rows that do not stand side by side are copied as they stand: sums along them are added in an order that depends on it
    place = torch.empty(max(stop - start for start, stop in all_rows), source.shape[1], dtype=wide) if source.is_contiguous() else None
    folded = _Folder(method, site, t)
    for start, stop in all_rows:
        rows = source[start:stop]
        weight = rows.to(wide, copy=True) if place is None else place[: stop - start].copy_(rows)
        target[start:stop] = folded(start, stop, weight)


def stored_parts(method: DeltaMethod, site: Geometry, t: Tensors, stored: Tensor | Pieces, wide: torch.dtype) -> Parts | None:
    """The folded weight in ``wide`` in parts of some rows; None where :func:`fold_by_rows` does not read the matrix from its file in this way."""
    if not isinstance(stored, Pieces) or site.op != "linear" or site.transposed or site.groups != 1 or stored.dim() != 2:
        return None
    return None if method.rows(site, t, 0, 1) is None else _parts(method, site, t, stored, wide)


def _parts(method: DeltaMethod, site: Geometry, t: Tensors, stored: Pieces, wide: torch.dtype) -> Parts:
    rows, width = stored.shape
    quick = method.folder(site, t) if wide == torch.float32 and not torch.is_grad_enabled() else None
    folded, place = quick or _Folder(method, site, t), Place(width, wide)
    for start, stop in spans(rows, width):
        block = stored[start * width : stop * width].view(-1, width)
        yield folded(start, stop, place(stop - start).copy_(block))


class _Folder:
    """Rows ``[start, stop)`` of a matrix with the method's change in them, from these rows alone."""

    def __init__(self, method: DeltaMethod, site: Geometry, t: Tensors) -> None:
        self.method, self.site, self.t, self.part = method, site, t, site

    def __call__(self, start: int, stop: int, weight: Tensor) -> Tensor:
        own = self.method.rows(self.site, self.t, start, stop)
        assert own is not None
        if self.part.out != stop - start or self.part.rows:
            self.part = replace(self.site, out=stop - start, full_out=stop - start, rows=())
        return self.method.fold_into(self.part, own, weight)


def folded_rows(method: DeltaMethod, site: Geometry, stored: Operand, tensors: Sequence[Operand]) -> Rows | None:
    """The folded weight in float32 some rows at a time, as :func:`fold_by_rows` makes it of whole tensors; None where that is not so, and where the
    rows of the stored float32 weight are not there by themselves."""
    if site.op != "linear" or site.transposed or stored.expr.dtype != "float32" or (current := stored.rows()) is None:
        return None
    t = {s.name: v.whole().to(torch.float32) for s, v in zip(method.tensors(site), tensors, strict=True)}
    if method.rows(site, t, 0, 1) is None:
        return None
    folded, place = _Folder(method, site, t), Place(stored.expr.shape[1], torch.float32)
    return lambda start, stop: folded(start, stop, place(stop - start).copy_(current(start, stop)))
