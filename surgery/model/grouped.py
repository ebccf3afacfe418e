"""Products of sorted rows with one matrix a group: what routed experts compute.

torch's own operation wants bfloat16 to be traced, aligned sizes and dense gradients to be run, and knows no float64. This one takes every
float type and size, has a gradient, and can be traced; on an accelerator it hands over to torch's kernel where that takes the operands.
Rows behind the last group give zeros. The work is that of the rows, never of rows times groups.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("surgery::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows ``offsets[e - 1] : offsets[e]`` of ``x [rows, in]`` times ``weight[e] [in, out]``: ``[rows, out]``."""
    weight = weight.to(x.dtype)
    if _kernel_takes(x, weight):
        made = torch._grouped_mm(x, weight, offs=offsets)
        behind = torch.arange(x.shape[0], device=x.device) >= offsets[-1]  # the kernel leaves them as the memory was
        return made.masked_fill_(behind.unsqueeze(-1), 0)
    out = x.new_zeros(x.shape[0], weight.shape[-1])
    for e, (a, b) in enumerate(itertools.pairwise((0, *offsets.tolist()))):
        if b > a:
            torch.mm(x[a:b], weight[e], out=out[a:b])
    return out


@grouped_mm.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[-1])


@torch.library.custom_op("surgery::grouped_outer", mutates_args=())
def grouped_outer(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """For each group ``x[rows]^T grad[rows]``: the gradient ``[groups, in, out]`` of its matrix."""
    if _kernel_takes(x, grad) and grad.dtype is x.dtype and grad.is_contiguous():
        return torch._grouped_mm(x.t(), grad, offs=offsets)
    out = x.new_zeros(offsets.shape[0], x.shape[-1], grad.shape[-1])
    for e, (a, b) in enumerate(itertools.pairwise((0, *offsets.tolist()))):
        if b > a:
            torch.mm(x[a:b].t(), grad[a:b], out=out[e])
    return out


@grouped_outer.register_fake
def _(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0], x.shape[-1], grad.shape[-1])


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    to_x = grouped_mm(grad, weight.transpose(-2, -1), offsets).to(x.dtype) if ctx.needs_input_grad[0] else None
    to_weight = grouped_outer(x, grad, offsets).to(weight.dtype) if ctx.needs_input_grad[1] else None
    return to_x, to_weight, None


grouped_mm.register_autograd(_backward, setup_context=_setup)


def product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """:func:`grouped_mm` for rows that all belong to a group, as those do that a router sorted: what running modules call. Torch's kernel is called,
    and gives the gradients, with nothing of ours around it where it takes the operands."""
    if _kernel_takes(x, weight) and weight.dtype is x.dtype:
        return torch._grouped_mm(x, weight, offs=offsets)
    made: Tensor = torch.ops.surgery.grouped_mm(x, weight, offsets)
    return made


def _kernel_takes(x: Tensor, other: Tensor) -> bool:
    """Whether torch's kernel runs on these operands: a recent accelerator, bfloat16, every row a multiple of 16 bytes."""
    if not x.is_cuda or x.dtype is not torch.bfloat16 or not _recent(x.device.index):
        return False
    return not (x.shape[-1] % 8 or other.shape[-1] % 8) and x.is_contiguous()


@torch.compiler.assume_constant_result
def _recent(device: int | None) -> bool:
    return bool(torch.cuda.get_device_capability(device) >= (9, 0))
