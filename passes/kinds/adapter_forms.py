"""What the tensors of adapters of other kinds than LoRA compute: thin factors, or a weight in the place of the stored one.

Functions of expressions (see ``registry.function``): tensors in, tensors of float32 out, on one thread. The kinds, their shapes and their papers
are listed in :mod:`surgery.model.adapter_forms`.
"""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""``A [rank, in]`` and ``B [out, rank]``."""


def adalora(a: Tensor, e: Tensor, b: Tensor) -> Factors:
    """``B diag(E) A``: the singular values go to ``A [r, in]``."""
    return (a.float() * e.float()).contiguous(), b.float().contiguous()


def vera(b: Tensor, d: Tensor, first: Tensor, second: Tensor) -> Factors:
    """``diag(b) B diag(d) A`` with the rows of the shared ``B`` that ``b [out]`` has; ``A [r, longest]`` is cut where the layer is known."""
    out = second.float()[: b.shape[0]] * b.float().unsqueeze(1)
    return (first.float() * d.float().unsqueeze(1)).contiguous(), out.contiguous()


def loha(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Factors:
    """``(a1 b1) * (a2 b2)`` element by element is the product of the row-wise and the column-wise Kronecker products of its factors."""
    left = (a1.float().unsqueeze(2) * a2.float().unsqueeze(1)).flatten(1)
    right = (b1.float().unsqueeze(1) * b2.float().unsqueeze(0)).flatten(0, 1)
    return right.contiguous(), left.contiguous()


def _pair(*side: Tensor) -> Factors:
    """The factors of one side of a Kronecker product: as stored, or the side itself beside an identity of its smaller size."""
    if len(side) == 2:
        return side[1].float(), side[0].float()
    whole = side[0].float().flatten(1)
    out, inp = whole.shape
    return (whole, torch.eye(out)) if out <= inp else (torch.eye(inp), whole)


def _kron(first: Factors, second: Factors) -> Factors:
    """``kron(B1 A1, B2 A2) = kron(B1, B2) kron(A1, A2)``."""
    return torch.kron(first[0].contiguous(), second[0].contiguous()), torch.kron(first[1].contiguous(), second[1].contiguous())


def lokr_ff(w1: Tensor, w2: Tensor) -> Factors:
    return _kron(_pair(w1), _pair(w2))


def lokr_ft(w1: Tensor, a2: Tensor, b2: Tensor) -> Factors:
    return _kron(_pair(w1), _pair(a2, b2))


def lokr_tf(a1: Tensor, b1: Tensor, w2: Tensor) -> Factors:
    return _kron(_pair(a1, b1), _pair(w2))


def lokr_tt(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Factors:
    return _kron(_pair(a1, b1), _pair(a2, b2))


# ------------------------------------------------------------------ whole weights


def stretched(weight: Tensor, gain: Tensor, *, axis: int) -> Tensor:
    """The stored weight with one of its axes multiplied by ``gain``."""
    shape = [1] * weight.dim()
    shape[axis] = -1
    return (weight.float() * gain.float().reshape(shape)).contiguous()


def turned(weight: Tensor, entries: Tensor, *, axis: int, block: int, terms: int, most: float = 0.0) -> Tensor:
    """The stored weight with its inputs (``axis``) turned block by block: ``W R^T``, ``R`` the Cayley transform of skew-symmetric blocks.

    ``entries [blocks, block (block - 1) / 2]`` are those above the diagonals, one row for all blocks where they are shared. ``terms``: the
    transform as a Neumann sum of so many terms, as it was trained; 0: exactly ``(I + Q)^-1 (I - Q)``. ``most`` is what a block may be long
    at most where the turn is constrained (Frobenius norm; 0: any).
    """
    rows, columns = torch.triu_indices(block, block, 1)
    q = torch.zeros(entries.shape[0], block, block)
    q[:, rows, columns] = entries.float()
    q = q - q.transpose(1, 2)
    if most:
        length = q.norm(dim=(1, 2), keepdim=True)
        q = torch.where(length <= most, q, q * (most / length))
    r = _cayley(q, terms)
    moved = weight.float().movedim(axis, -1)
    count = moved.shape[-1] // block
    r = r.expand(count, block, block) if r.shape[0] == 1 else r
    parts = moved.reshape(*moved.shape[:-1], count, block)
    return torch.einsum("...kc,krc->...kr", parts, r).reshape(moved.shape).movedim(-1, axis).contiguous()


def _cayley(q: Tensor, terms: int) -> Tensor:
    one = torch.eye(q.shape[-1]).expand_as(q)
    if not terms:
        return torch.linalg.solve(one + q, one - q, left=False)
    # I + 2 Q + 2 Q^2 + ... with half of the last power; three terms were trained as four
    last = {2: 0, 3: 3}.get(terms, terms - 1)
    total, power = one.clone(), one
    for i in range(1, max(terms, last + 1)):
        power = power @ q
        total = total + (1.0 if i == last else 2.0) * power
    return total
