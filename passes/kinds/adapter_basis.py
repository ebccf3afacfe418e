"""Whether the bases that an adapter's layers share are those that its config makes of the base model, where values may be read.

FRoD writes the weights of a sort as ``W_i = Q_i R`` (``sum_i W_i^T W_i = R^T R``) and takes the basis ``V = R^T E``, where ``E`` diagonalises

    T = mean_i (Q_i^T Q_i + a I)^-1        a: ``regularization_alpha``

A folder holds ``V``; peft takes what stands beside it, the directions ``U``, from a ``V`` that it makes anew from config and base. So with another ``a``,
or another base, what peft computes is neither what was trained nor what the folder says. In ``E``'s coordinates ``T`` is diagonal, and
``E^T Q_i^T Q_i E = V^-1 W_i^T W_i V^-T``: a test that signs, order and equal eigenvalues do not touch.

Source: doi:10.1609/aaai.v40i31.39813, section on the joint decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.core.source import Span
from surgery.model.adapter import Adapter
from surgery.model.adapter_forms import Dense
from surgery.model.program import Program
from surgery.model.realise import realise
from surgery.model.threads import one_thread
from surgery.model.weights import Expr, Load, loads
from surgery.passes.kinds.adapter_frames import by_path

FORM = ("form", "shared_basis")
CLOSE = 1e-2
"""How far from diagonal a matrix may be that single precision has made diagonal, as a share of what is not a multiple of one."""
NOISE = 1e-4
"""What single precision leaves off the diagonal, as a share of all."""


def check_bases(program: Program, adapter: Adapter, study: Any, span: Span) -> None:
    """Raises S0783 for a basis that another ``regularization_alpha`` or another base gives. Does nothing while planning, for weights that an
    earlier statement has changed, and for bases in half precision, whose rounding is as large as what is looked for."""
    if study is None:
        return
    sorts: dict[str, list[Dense]] = {}
    for part in adapter.dense.values():
        if FORM in part.params and part.tensors[0].dtype in ("float32", "float64"):
            sorts.setdefault(part.tensors[0].identity, []).append(part)
    for parts in sorts.values():
        weights = _weights(program, parts)
        if weights is None:
            continue
        with one_thread():
            apart = from_diagonal([realise(w).float().movedim(a, -1) for w, a in weights], realise(parts[0].tensors[0]), _alpha(parts[0]))
        if apart > CLOSE:
            names = ", ".join(p.path for p in parts[:2]) + (", ..." if len(parts) > 2 else "")
            raise fail(
                "S0783", f"{adapter.name} cannot be read: the basis that its folder has for {names} is not the one that its config makes of the base", span,
                "merged here",
                notes=(
                    f"`regularization_alpha` is {_alpha(parts[0]):g}; what it should make diagonal is not, in the stored basis ({apart:.1%} are off)",
                    "peft makes the basis anew when it loads, and mixes the two: neither what was trained nor what the folder says",
                ),
                help="give `regularization_alpha` the value of the training, and open the base of the training",
            )  # fmt: skip


def _alpha(part: Dense) -> float:
    return float(dict(part.params).get("alpha", 1e-3))


def _weights(program: Program, parts: Sequence[Dense]) -> list[tuple[Expr, int]] | None:
    """The stored weights of a sort with the axis of their inputs; None where one is not the stored one."""
    sites: Mapping[str, Any] = by_path(program)
    found: list[tuple[Expr, int]] = []
    for part in parts:
        site = sites.get(part.path)
        expr = program.weights[program.aliases.get(site.weight, site.weight)] if site is not None else None
        if expr is None or site is None or not isinstance(expr, Load) or len(expr.shape) != 2 or not loads(expr):
            return None
        found.append((expr, site.in_axis))
    return found


def from_diagonal(weights: Sequence[Tensor], basis: Tensor, alpha: float) -> float:
    """How much of ``T``, less its mean, is off the diagonal in the coordinates of a basis ``[in, in]``, for weights ``[out, in]``; 0 where there are too
    few rows for the basis to depend on ``alpha``."""
    size = basis.shape[0]
    if sum(w.shape[0] for w in weights) < size:
        return 0.0
    inverse = torch.linalg.pinv(basis.double())
    total = torch.zeros(size, size, dtype=torch.float64)
    one = torch.eye(size, dtype=torch.float64)
    for w in weights:
        own = w.double() @ inverse.t()
        total += torch.linalg.inv_ex(own.t() @ own + alpha * one)[0]
    if not bool(torch.isfinite(total).all()):
        return 1.0
    off = (total - torch.diag(total.diagonal())).norm()
    if off <= NOISE * total.norm():
        return 0.0
    return float(off / (total - total.diagonal().mean() * one).norm())
