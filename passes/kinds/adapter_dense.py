"""Weights in the place of stored ones, for the kinds of adapter files that :mod:`surgery.model.adapter_dense` lists.

Functions of expressions (see ``registry.function``): tensors in, tensors of float32 out, on one thread. Each form takes the weight as ``[out, in]``,
whatever way it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surgery.core.diagnostics import fail


def changed(weight: Tensor, *tensors: Tensor, axis: int, form: str, **params: Any) -> Tensor:
    """The stored weight with inputs on ``axis``, changed by ``form``."""
    made = FORMS[form](weight.float().movedim(axis, -1), *(t.float() if t.is_floating_point() else t for t in tensors), **params)
    return made.movedim(-1, axis).contiguous()


def changed_bias(bias: Tensor, *tensors: Tensor, axis: int, form: str, **params: Any) -> Tensor:
    """A bias that is changed with the outputs."""
    return FORMS[form](bias.float().unsqueeze(-1), *(t.float() for t in tensors), **params).squeeze(-1).contiguous()


# ------------------------------------------------------------------ thin factors


def delora(a: Tensor, b: Tensor, strength: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Terms of unit length, together as long as ``strength`` says, columns times the norms that the weight's had."""
    a, b = a.float(), b.float()
    lengths = a.norm(dim=1).clamp(min=1e-4) * b.norm(dim=0).clamp(min=1e-4)
    return (a * norm.float()).contiguous(), (b * (strength.float() / a.shape[0] / lengths)).contiguous()


def vblora(first: Tensor, second: Tensor, bank: Tensor, *, top: int) -> tuple[Tensor, Tensor]:
    """Every tile of a factor is a mixture of the ``top`` vectors with the largest logits."""

    def mixed(logits: Tensor) -> Tensor:
        best, where = logits.float().topk(top, dim=-1)
        return (best.softmax(-1).unsqueeze(-1) * bank.float()[where]).sum(-2)

    a = mixed(first).flatten(1)
    b = mixed(second).transpose(1, 2).flatten(0, 1)
    return a.contiguous(), b.contiguous()


# ------------------------------------------------------------------ whole weights


def butterfly(weight: Tensor, turns: Tensor, stretch: Tensor) -> Tensor:
    """``diag(s) (B_m ... B_1 W^T)^T``; ``B_i`` are block diagonals of Cayley turns whose rows and columns are shuffled, so that blocks of
    one factor reach across those of the one before."""
    factors, blocks, size, _ = turns.shape
    skew = 0.5 * (turns - turns.transpose(-1, -2))
    one = torch.eye(size).expand_as(skew)
    turned = torch.linalg.solve(one + skew, one - skew, left=False)
    moved = weight.t()
    for i in range(factors):
        order = _shuffle(blocks * size, blocks // 2**i, size // 2) if factors > 1 else torch.arange(blocks * size)
        # P D P^T with P taking row order[j] to place j
        inner = torch.empty_like(moved)
        inner[order] = moved
        inner = torch.bmm(turned[i], inner.reshape(blocks, size, -1)).reshape(moved.shape)
        moved = inner[order]
    return moved.t() * stretch


def _shuffle(size: int, parts: int, run: int) -> Tensor:
    """In each of ``parts`` equal stretches the runs of ``run`` entries with even numbers, then those with odd ones."""
    runs = torch.arange(size).reshape(parts, -1, run)
    return torch.cat([runs[:, 0::2], runs[:, 1::2]], 1).flatten()


def reflected(weight: Tensor, u: Tensor, *, orthogonal: bool) -> Tensor:
    """``W (I - 2 u_1 u_1^T) (I - 2 u_2 u_2^T) ...`` for columns of unit length, made orthogonal first where the file was trained so."""
    columns: list[Tensor] = []
    for column in u.t():
        for other in columns if orthogonal else ():
            column = column - other * torch.dot(other, column)
        columns.append(column / column.norm())
    for column in columns:
        weight = weight - 2 * torch.outer(weight @ column, column)
    return weight


def block_sum(weight: Tensor, block: Tensor) -> Tensor:
    """``W[o, i] + M[i mod r, o]`` for ``M [r, out]``."""
    times = -(-weight.shape[1] // block.shape[0])
    return weight + block.t().repeat(1, times)[:, : weight.shape[1]]


def block_repeated(weight: Tensor, block: Tensor, *, repeats: int) -> Tensor:
    """The same with a block ``[r, repeats]`` that stands beside itself until it has all outputs."""
    return block_sum(weight, block.repeat(1, weight.shape[0] // repeats))


def block_product(weight: Tensor, block: Tensor, *, multiple: int) -> Tensor:
    """``W`` plus every ``r x r`` block of it times that of its rows in ``M [out / r, r, r]``, plus that."""
    r = block.shape[-1]
    parts = weight.reshape(weight.shape[0] // r, r, weight.shape[1] // r, r).permute(2, 0, 1, 3)
    return weight + (parts @ block + block).permute(1, 2, 0, 3).reshape(weight.shape)


def circulant(weight: Tensor, kernel: Tensor) -> Tensor:
    """``W[m b + i, n b + j] + k[m, n, (j - i) mod b] / in``: each block is one row that goes on by one entry from row to row."""
    m, n, b = kernel.shape
    places = (torch.arange(b).unsqueeze(0) - torch.arange(b).unsqueeze(1)) % b
    return weight + kernel[:, :, places].permute(0, 2, 1, 3).reshape(m * b, n * b) / weight.shape[1]


def granular(weight: Tensor, a: Tensor, b: Tensor, *hybrid: Tensor, scale: float) -> Tensor:
    """Block ``(j, i)`` of the change: the slice ``j`` of the middle of ``a_i``, times the slice ``i`` of ``b_j``."""
    k, rows, rank = a.shape
    part = rank // k
    middle = a.reshape(k, rows, k, part)
    ends = b.reshape(k, k, part, -1)
    delta = torch.einsum("irjp,jipo->joir", middle, ends).reshape(weight.shape)
    if hybrid:
        delta = delta + hybrid[1] @ hybrid[0]
    return weight + scale * delta


def hadamard(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return weight + weight * (b @ a)


def random_bases(
    weight: Tensor, strength: Tensor, gain: Tensor, first: Tensor, second: Tensor, *, scale: float, smaller: int, larger: int
) -> Tensor:
    """A sum of random bases with scales for their ranks and for the smaller side, transposed where a layer has more inputs than outputs. The terms of
    the two sides are counted in two orders, as they were trained: bases first in ``second``, ranks first in ``first``."""
    short, long = min(weight.shape), max(weight.shape)
    bases = strength.shape[1]
    a = strength.unsqueeze(-1) * first[:, :1, :short] * gain  # [r, bases, short]
    b = second[:long, :bases]  # [long, bases, r]
    delta = b.flatten(1) @ a.flatten(0, 1)
    return weight + scale * (delta if short == weight.shape[1] else delta.t())


def elements(weight: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """Raises S0783 for an element that the weight does not have."""
    for axis, size in enumerate(weight.shape):
        if places.numel() and not 0 <= int(places[axis].min()) <= int(places[axis].max()) < size:
            raise fail(
                "S0783", f"an adapter changes elements up to {int(places[axis].max())} of a weight that has {size} there",
                help="open the model that it was trained on, or save the adapter again",
            )  # fmt: skip
    return weight.clone().index_put_((places[0].long(), places[1].long()), values, accumulate=True)


def turned_outputs(weight: Tensor, angle: Tensor, stretch: Tensor, *, kind: str, group: int) -> Tensor:
    """In each group of outputs the entries ``i`` and ``i + group / 2`` are turned by an angle and stretched: two numbers for a pair, for an
    output, or for each of an output's two terms."""
    half = group // 2
    if kind == "road_1":
        angle, stretch = (t.reshape(-1, half).repeat_interleave(2, 0).flatten() for t in (angle, stretch))
    if kind == "road_4":
        angles, stretches = angle.reshape(-1, 2, group), stretch.reshape(-1, 2, group)
        straight, across = (stretches[:, 0] * angles[:, 0].cos()).flatten(), (stretches[:, 1] * angles[:, 1].sin()).flatten()
    else:
        straight, across = stretch * angle.cos(), stretch * angle.sin()
    pairs = weight.reshape(-1, 2, half, weight.shape[1])
    other = torch.stack([-pairs[:, 1], pairs[:, 0]], 1).reshape(weight.shape)
    return weight * straight.unsqueeze(1) + other * across.unsqueeze(1)


def frequencies(weight: Tensor, spectrum: Tensor, *, scale: float, places: int, count: int) -> Tensor:
    """The real part of the inverse transform of a spectrum that is zero but for places drawn with the seed ``places``."""
    chosen = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(places))[:count]
    dense = torch.zeros(weight.numel()).index_put_((chosen,), spectrum).reshape(weight.shape)
    return weight + scale * torch.fft.ifft2(dense).real


FORMS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f
    for f in (
        butterfly, reflected, block_sum, block_repeated, block_product, circulant, granular, hadamard, random_bases, elements, turned_outputs, frequencies,
    )
}  # fmt: skip
