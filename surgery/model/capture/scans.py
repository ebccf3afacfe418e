"""Kernels that models call by name and that have a loop over positions where no such kernel is installed.

transformers marks the function that a kernel of another package may replace, with the kernel's name. While a model is traced, those of this
table are replaced by the same computation in whole tensors, so that a capture takes any length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.model import recurrence  # noqa: F401  (registers surgery.recurrence)


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **unused: Any,
) -> Any:
    """The selective scan of Mamba: ``hidden_states``, ``dt`` and ``z`` are ``[batch, channels, length]``, ``A [channels, states]``, ``B`` and
    ``C`` ``[batch, states, length]``, ``D`` and ``delta_bias`` ``[channels]``. Gives ``[batch, channels, length]``, and the last state where asked.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv:2312.00752, algorithm 2.
    """
    own = hidden_states.dtype
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = F.softplus(dt)
    decay = torch.exp(A[None, :, None, :] * dt[:, :, :, None])
    given = dt[:, :, :, None] * B.transpose(1, 2)[:, None, :, :].float() * hidden_states[:, :, :, None].float()
    states = torch.ops.surgery.recurrence(decay, given, 2)
    out = torch.matmul(states.to(own).transpose(1, 2), C.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)
    if D is not None:
        out = out + hidden_states * D[None, :, None]
    if z is not None:
        out = out * F.silu(z)
    return (out, states[:, :, -1]) if return_last_state else out


KERNELS: dict[str, Callable[..., Any]] = {"selective_scan_fn": selective_scan}


@contextmanager
def whole_scans(model: nn.Module) -> Iterator[None]:
    """While inside, the modules of ``model``'s classes call what stands in :data:`KERNELS` for the functions that they mark so."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for module in dict.fromkeys(type(m).__module__ for m in model.modules()):
        names = getattr(sys.modules.get(module), "__dict__", {})
        for name, function in list(names.items()):
            ours = KERNELS.get(_kernel(function))
            if ours is not None:
                changed.append((names, name, function))
                names[name] = ours
    try:
        yield
    finally:
        for names, name, function in changed:
            names[name] = function


def _kernel(function: Any) -> str:
    """The name of the kernel that a function stands in for; empty where it stands for none."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is None or cells is None or not hasattr(function, "__wrapped__"):
        return ""
    at = dict(zip(code.co_freevars, cells, strict=True)).get("func_name")
    value = None if at is None else at.cell_contents
    return value if isinstance(value, str) else ""
