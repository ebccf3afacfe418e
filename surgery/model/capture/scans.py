"""Kernels that models call by name and that have a loop over positions where no such kernel is installed.

transformers marks the function that a kernel of another package may replace, with the kernel's name; older code chooses between both in a
function of its own. While a model is traced, those of this table are replaced by the same computation in whole tensors, so that a capture takes any length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
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


def weighted_past(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: Any = None, return_state: bool = False
) -> tuple[Tensor, list[Tensor] | None]:
    """The mean of all values so far, weighted by exponentials of keys that fade: ``key`` and ``value`` are ``[batch, length, channels]``,
    ``time_decay`` and ``time_first`` (what the newest key gets more) ``[channels]``. Gives ``[batch, length, channels]``, and the last sums where
    asked. Exponentials are relative to the largest so far, so that none overflows.

    Source: Peng et al., "RWKV: Reinventing RNNs for the Transformer Era", 2023, arXiv:2305.13048, equations 16 and appendix D.
    """
    if state is not None:
        raise RuntimeError("a scan in a graph begins without a past")
    own, fade = key.dtype, -torch.exp(time_decay)
    key = key.float()
    largest = torch.ops.surgery.running_maximum(fade.float().expand_as(key), key, 1)
    before = _one_later(largest, -1e38)
    kept, new = torch.exp(before + fade - largest), torch.exp(key - largest)
    sums = torch.ops.surgery.recurrence(kept, new * value, 1)
    weights = torch.ops.surgery.recurrence(kept, new, 1)
    top = torch.maximum(before, key + time_first)
    old, own_weight = torch.exp(before - top), torch.exp(key + time_first - top)
    out = (old * _one_later(sums, 0.0) + own_weight * value) / (old * _one_later(weights, 0.0) + own_weight)
    return out.to(own), [sums[:, -1], weights[:, -1], largest[:, -1]] if return_state else None


def _one_later(x: Tensor, first: float) -> Tensor:
    return F.pad(x[:, :-1], (0, 0, 1, 0), value=first)


KERNELS: dict[str, Callable[..., Any]] = {"selective_scan_fn": selective_scan, "rwkv_linear_attention": weighted_past}


@contextmanager
def whole_scans(model: nn.Module) -> Iterator[None]:
    """While inside, the modules of ``model``'s classes call what stands in :data:`KERNELS` for the functions that they mark so."""
    changed: list[tuple[dict[str, Any], str, Any]] = []
    for module in dict.fromkeys(type(m).__module__ for m in model.modules()):
        names = getattr(sys.modules.get(module), "__dict__", {})
        for name, function in list(names.items()):
            ours = KERNELS.get(_kernel(function) or (name if isinstance(function, FunctionType) else ""))
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
