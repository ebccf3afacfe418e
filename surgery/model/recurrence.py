"""Recurrences along a sequence: the linear one of state space models, and the one of sums and maxima that keeps exponentials in bounds.

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
    total = _reaching(decay, grad, dim)
    before = torch.cat([none, states.narrow(dim, 0, states.shape[dim] - 1)], dim)
    return (total * before if ctx.needs_input_grad[0] else None), (total if ctx.needs_input_grad[1] else None), None


def _reaching(decay: Tensor, grad: Tensor, dim: int) -> Tensor:
    following = torch.cat([decay.narrow(dim, 1, decay.shape[dim] - 1), torch.zeros_like(decay.narrow(dim, 0, 1))], dim)
    return recurrence(following.flip(dim), grad.flip(dim), dim).flip(dim)


recurrence.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("surgery::running_maximum", mutates_args=())
def running_maximum(added: Tensor, given: Tensor, dim: int) -> Tensor:
    """``m[t] = max(m[t-1] + added[t], given[t])`` along ``dim``, all else apart, from minus infinity: every ``m[t]``, of the shape that both
    have."""
    out = torch.empty_like(given)
    best = torch.full_like(given.select(dim, 0), -torch.inf) if given.shape[dim] else None
    for at in range(given.shape[dim]):
        best = torch.maximum(best + added.select(dim, at), given.select(dim, at))  # type: ignore[operator]
        out.select(dim, at).copy_(best)
    return out


@running_maximum.register_fake
def _(added: Tensor, given: Tensor, dim: int) -> Tensor:
    return torch.empty_like(given)


def _setup_maximum(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    added, given, ctx.dim = inputs
    none = torch.full_like(output.narrow(ctx.dim, 0, 1), -torch.inf)
    before = torch.cat([none, output.narrow(ctx.dim, 0, output.shape[ctx.dim] - 1)], ctx.dim)
    ctx.save_for_backward((before + added > given).to(given.dtype))


def _backward_maximum(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    """What reaches ``m[t]`` goes to the one of both that it is."""
    (kept,) = ctx.saved_tensors
    total = _reaching(kept, grad, ctx.dim)
    return total * kept, total * (1 - kept), None


running_maximum.register_autograd(_backward_maximum, setup_context=_setup_maximum)
