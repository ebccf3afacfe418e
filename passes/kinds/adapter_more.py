"""Functions of weights and factors for the kinds of adapter files that :mod:`surgery.model.adapter_more` lists.

Functions of expressions (see ``registry.function``): tensors in, tensors of float32 out, on one thread. Each form takes the weight as ``[out, in]``,
whatever way it is stored.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.passes.kinds.adapter_waves import lowpass, restored


def changed(weight: Tensor, *tensors: Tensor, axis: int, form: str, **params: Any) -> Tensor:
    """The stored weight with inputs on ``axis``, changed by ``form``."""
    made = FORMS[form](weight.float().movedim(axis, -1), *(t.float() if t.is_floating_point() else t for t in tensors), **params)
    return made.movedim(-1, axis).contiguous()


def moved_bias(bias: Tensor, shift: Tensor, *, axis: int) -> Tensor:
    """A bias with what was trained beside it, ``[1, out]``."""
    return (bias.float() + shift.float().flatten()).contiguous()


def glora_bias(bias: Tensor, weight: Tensor, *tensors: Tensor, axis: int, inputs: int, forms: tuple[int, int, int]) -> Tensor:
    """``b + b D + E + W C``; see :func:`glora` for the three."""
    across, scale, shift = _paths([t.float() for t in tensors], forms)
    made = bias.float() * (1 + scale) + shift
    if isinstance(across, Tensor):
        made = made + (weight.float().movedim(inputs, -1) @ across).flatten()
    return made.contiguous()


# ------------------------------------------------------------------ thin factors


def indexed(entries: Tensor, first: Tensor, second: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Factors whose entries are those of one vector at given places, each with a scale."""
    for places in (first, second):
        _within(places, entries.shape[0])
    return (entries.float()[first.long()] * a.float()).contiguous(), (entries.float()[second.long()] * b.float()).contiguous()


def tiny(a: Tensor, b: Tensor, mixed: Tensor, *vectors: Tensor, which: int) -> tuple[Tensor, Tensor]:
    """``B (sum_i v_i P_i) A`` with the vector number ``which``."""
    inner = torch.einsum("i,ijk->jk", vectors[which].float(), mixed.float())
    return a.float().contiguous(), (b.float() @ inner).contiguous()


def routed(a: Tensor, b: Tensor, logits: Tensor, *, task: int) -> tuple[Tensor, Tensor]:
    """The factors of one task: in every split of inputs and outputs a mixture of skills ``a [splits, skills, in / splits, r]`` and
    ``b [splits, skills, r, out / splits]`` with the task's shares."""
    splits, skills = a.shape[:2]
    shares = logits[task].float().reshape(splits, skills).sigmoid()
    shares = shares / (shares.sum(-1, keepdim=True) + 1e-12)
    first = torch.einsum("qs,qsdr->qdr", shares, a.float()).flatten(0, 1)
    second = torch.einsum("qs,qsrd->qrd", shares, b.float()).transpose(0, 1).flatten(1)
    return first.t().contiguous(), second.t().contiguous()


def of_task(embeddings: Tensor, columns: Tensor, rows: Tensor, *, task: int) -> Tensor:
    """Embeddings of virtual tokens ``[tokens, width]``, element by element times the task's product of thin factors."""
    return (embeddings.float() * (columns[task].float() @ rows[task].float())).contiguous()


def _within(places: Tensor, size: int) -> None:
    """Raises S0783 for places that there are not."""
    if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < size:
        raise fail(
            "S0783", f"an adapter has entries up to number {int(places.max())} of {size}",
            help="open the model that it was trained on, or save the adapter again",
        )  # fmt: skip


# ------------------------------------------------------------------ whole weights


def _paths(tensors: list[Tensor], forms: tuple[int, ...]) -> list[Tensor | float]:
    """Each of some tensors as a product of two factors, as it is, or zero where none is stored: ``forms`` counts what there is of it."""
    out: list[Tensor | float] = []
    for count in forms:
        mine, tensors = tensors[:count], tensors[count:]
        out.append(mine[0] @ mine[1] if count == 2 else mine[0] if count else 0.0)
    return out


def glora(weight: Tensor, *tensors: Tensor, forms: tuple[int, int]) -> Tensor:
    """``W + W A + B``, element by element, where ``A`` and ``B`` are products of factors, columns or numbers."""
    stretch, shift = _paths(list(tensors), forms)
    return weight + weight * stretch + shift


def projected(weight: Tensor, p: Tensor, *r: Tensor, decomposition: str, scale: float) -> Tensor:
    """``W - Q Z^T W + scale Q R``: what lies in the columns of ``P`` is taken out, and ``R`` put there. ``qr``: ``Q = Z`` is its basis; ``relu``:
    ``Q = P``, ``Z`` its positive part."""
    outer = torch.linalg.qr(p)[0] if decomposition == "qr" else p
    inner = outer if decomposition == "qr" else p.relu()
    left = weight - outer @ (inner.t() @ weight)
    return left + scale * (outer @ r[0]) if r else left


def entries(weight: Tensor, values: Tensor, places: Tensor, *factors: Tensor, scale: float) -> Tensor:
    """Single entries by their number in the weight, and thin factors beside them."""
    _within(places, weight.numel())
    made = weight.flatten().scatter_add(0, places.long(), values).reshape(weight.shape)
    return made + scale * (factors[1] @ factors[0]) if factors else made


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "swish": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "linear": lambda x: x,
    "relu6": F.relu6, "leaky_relu": F.leaky_relu, "mish": F.mish, "relu2": lambda x: F.relu(x).square(),
}  # fmt: skip
"""Functions by the names that transformers has for them."""


def network(weight: Tensor, first: Tensor, last: Tensor, *middle: Tensor, act: str, scale: float) -> Tensor:
    """``W`` plus what a small network makes of its columns: down, ``depth`` layers and as many with shortcuts to them, up."""
    function, depth = ACTIVATIONS[act], len(middle) // 2
    x = function(weight.t() @ first.t())
    passed = []
    for layer in middle[:depth]:
        passed.append(x)
        x = function(x @ layer.t())
    for layer in middle[depth:]:
        x = function(x @ layer.t()) + passed.pop()
    return weight + scale * (x @ last.t()).t()


def low_spectrum(weight: Tensor, u: Tensor, s: Tensor, v: Tensor) -> Tensor:
    """The weight with other terms in the place of those of its smallest singular values, as many as are given."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    top = values.shape[0] - s.shape[0]
    old = (left[:, top:] * values[top:]) @ right[top:]
    return weight + (u * s) @ v - old


def shared_basis(weight: Tensor, basis: Tensor, places: Tensor, values: Tensor, scales: Tensor, *, alpha: float = 1e-3) -> Tensor:
    """``U (S + diag(l)) V^T``: ``V`` is one for all layers of a sort, ``U`` the directions of ``W V^-T`` and ``S`` sparse. ``alpha`` says what ``V`` was
    made with, which is looked at beforehand (:mod:`adapter_basis`)."""
    _within(places, scales.shape[0])
    one = weight.double()
    try:
        made = torch.linalg.solve(basis.double(), one.t()).t()
    except RuntimeError:
        made = one @ torch.linalg.pinv(basis.double(), rtol=1e-6).t()
    length = made.norm(dim=0)
    there = length > 1e-12
    directions = torch.where(there, made / torch.where(there, length, 1.0), 0.0).float()
    inner = torch.diag(scales).index_put((places[0].long(), places[1].long()), values, accumulate=True)
    return directions @ inner @ basis.t()


def waves(weight: Tensor, spectrum: Tensor, *, family: str, scale: float, places: int, count: int) -> Tensor:
    """Plus the inverse wavelet transform of a spectrum that is zero but for places drawn with the seed ``places``; no ``family``: plus the
    spectrum. It stands in the middle of one with even sizes, from which the transform leaves the weight's."""
    out, inp = weight.shape
    chosen = torch.randperm(out * inp, generator=torch.Generator().manual_seed(places))[:count]
    dense = torch.zeros(out * inp).index_put_((chosen,), spectrum).reshape(out, inp)
    if not family:
        return weight + scale * dense
    more = len(lowpass(family)) - 2
    sizes = [n + more + (n + more) % 2 for n in (out, inp)]
    top, left = (sizes[0] - out) // 2, (sizes[1] - inp) // 2
    padded = F.pad(dense, (left, sizes[1] - inp - left, top, sizes[0] - out - top))
    made = restored(padded, family)
    top, left = (made.shape[0] - out) // 2, (made.shape[1] - inp) // 2
    return weight + scale * made[top : top + out, left : left + inp]


FORMS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (glora, projected, entries, network, low_spectrum, shared_basis, waves)
}  # fmt: skip
