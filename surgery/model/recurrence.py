"""Linear recurrences: what state space models compute along a sequence.

Written out as a loop over positions, such a scan fixes the length of a trace. As one operation it takes any length, has a gradient, which is
a recurrence again, and can be written as ONNX's Scan.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("surgery::recurrence", mutates_args=())
def recurrence(decay: Tensor, given: Tensor, dim: int) -> Tensor:
    """``h[t] = decay[t] h[t-1] + given[t]`` along ``dim``, all else apart, from ``h[-1] = 0``: every ``h[t]``, of the shape that both have.

    Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, arXiv:2312.00752, equation 2a.
    """
    out = torch.empty_like(given)
    state = torch.zeros_like(given.select(dim, 0)) if given.shape[dim] else None
    for at in range(given.shape[dim]):
        state = decay.select(dim, at) * state + given.select(dim, at)
        out.select(dim, at).copy_(state)
    return out


@recurrence.register_fake
def _(decay: Tensor, given: Tensor, dim: int) -> Tensor:
    return torch.empty_like(given)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.dim = inputs[2]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    """With ``g`` what reaches each state directly, ``G[t] = g[t] + decay[t+1] G[t+1]`` reaches it in all."""
    decay, states = ctx.saved_tensors
    dim = ctx.dim
    none = torch.zeros_like(decay.narrow(dim, 0, 1))
    following = torch.cat([decay.narrow(dim, 1, decay.shape[dim] - 1), none], dim)
    total = recurrence(following.flip(dim), grad.flip(dim), dim).flip(dim)
    before = torch.cat([none, states.narrow(dim, 0, states.shape[dim] - 1)], dim)
    return (total * before if ctx.needs_input_grad[0] else None), (total if ctx.needs_input_grad[1] else None), None


recurrence.register_autograd(_backward, setup_context=_setup)
