"""Arithmetic of merging adapters: changes of weights, and thin factors made from them again.

Every function here is one of an expression: it gets tensors and plain parameters and runs on one thread, so that its results do not depend
on how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from surgery.model.byrows import Place, Rows
from surgery.model.room import room
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.kinds.lowrank import factor_shapes

Part = tuple[Any, ...]
"""How one part of an adapter is computed: ``("low", s)`` takes ``A``, ``B`` and is ``s B A``; ``("method", "verb/name", params, names)`` takes the
tensors ``names`` and the stored weight, and is what that method makes of them."""


def changes(tensors: Sequence[Tensor], parts: Sequence[Part], site: Geometry) -> Iterator[Tensor]:
    """The change ``[out, in]`` (float32, canonical) that each part makes."""
    rest = list(tensors)
    for part in parts:
        if part[0] == "low":
            a, b = rest.pop(0).float(), rest.pop(0).float()
            if site.experts:
                yield torch.bmm(b, a).mul_(float(part[1]))
                continue
            b, a = b.flatten(1), a.flatten(1)
            yield torch.mm(b, a, out=room((b.shape[0], a.shape[1]), torch.float32)).mul_(float(part[1]))
            continue
        from surgery.passes import registry

        _, name, params, names = part
        method: Any = registry.get(*name.split("/"))(**dict(params))
        t = {n: rest.pop(0).float() for n in names}
        weight = site.to_canonical(site.select(rest.pop(0).float()))
        yield method.delta(site, t, weight)


def has_rows(part: Part, site: Geometry) -> bool:
    """Whether rows of a part's change can be had by themselves, in the order in which they stand in the stored weight."""
    return bool(part[0] == "low") and site.op == "linear" and not site.transposed


def change_rows(tensors: Sequence[Tensor], part: Part) -> Rows:
    """The change of :func:`changes` for such a part, some rows at a time."""
    a, b = (t.float().flatten(1) for t in tensors)
    place, scale = Place(a.shape[1], torch.float32), float(part[1])
    return lambda start, stop: torch.mm(b[start:stop], a, out=place(stop - start)).mul_(scale)


def change(
    method: Any, tensors: Sequence[Tensor], *, parts: Any, weights: Any, size: int, site: Geometry, seed: int, prepared: Any = ()
) -> tuple[Tensor, Tensor, Tensor]:
    """``A``, ``B`` of rank ``size`` for the merged change, and of its squared Frobenius norm what they keep and the whole."""
    clamp, even = getattr(method, "clamp", None), bool(getattr(method, "even", False))
    plain = getattr(method, "thin", False) and all(p[0] == "low" for p in parts)
    total = sum(t.shape[0] for t in tensors[::2]) if plain else 0
    # clipping looks at signs, which a decomposition chooses freely: then it is that of the formed change, as in other tools
    if plain and clamp is None and total < min(site.out, site.fan_in):
        scales = [w * p[1] for w, p in zip(weights, parts, strict=True)]
        a = torch.cat([t.float().flatten(1) * s for t, s in zip(tensors[::2], scales, strict=True)])
        b = torch.cat([t.float().flatten(1) for t in tensors[1::2]], dim=1)
        u, s, vt = thin(a, b)
    else:
        merged = method.combine(list(changes(tensors, parts, site)), list(weights), seed, tuple(prepared))
        u, s, vt = torch.linalg.svd(merged, full_matrices=False)
    whole = s.double().square()
    a, b = factored(u, s, vt, size, even)
    if clamp is not None:
        a, b = clamped(a, b, float(clamp))
    a_shape, b_shape = factor_shapes(site, size)
    return a.reshape(a_shape).contiguous(), b.reshape(b_shape).contiguous(), torch.stack([whole[:size].sum(), whole.sum()]).float()


def thin(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular value decomposition of ``B A`` without forming it: of the product of the triangles of ``B`` and ``A^T``."""
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.t())
    u, s, vt = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    return qb @ u, s, vt @ qa.t()


def factored(u: Tensor, s: Tensor, vt: Tensor, size: int, even: bool) -> tuple[Tensor, Tensor]:
    """``A [size, in]`` and ``B [out, size]`` of the ``size`` largest singular values, which stand in ``B`` or, ``even``, half in each."""
    u, s, vt = u[:, :size], s[:size], vt[:size]
    left, right = (s.sqrt(), s.sqrt()) if even else (s, torch.ones_like(s))
    a, b = right.unsqueeze(1) * vt, u * left
    if (missing := size - s.numel()) > 0:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    return a, b


def clamped(a: Tensor, b: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Both factors clipped to plus or minus the quantile ``share`` of all their entries."""
    both = np.concatenate([b.flatten().numpy(), a.flatten().numpy()])
    limit = float(np.quantile(both, share))
    return a.clamp(-limit, limit), b.clamp(-limit, limit)


def each(method: Any, tensors: Sequence[Tensor], *, scales: Any, seed: int) -> tuple[Tensor, Tensor]:
    """``A`` and ``B`` merged each by themselves, with the roots of the factors on both and their signs on ``A``."""
    from surgery.passes.kinds.attach import seed_of

    roots = [math.sqrt(abs(s)) for s in scales]
    signed = [math.copysign(r, s) for r, s in zip(roots, scales, strict=True)]
    a = method.combine([t.float().contiguous() for t in tensors[::2]], signed, seed_of(seed, "A"))
    b = method.combine([t.float().contiguous() for t in tensors[1::2]], roots, seed_of(seed, "B"))
    return a, b
