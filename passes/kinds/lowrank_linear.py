"""A frozen linear map and its low-rank change as one step of autograd: ``y = x W^T + b + s (d A^T) B^T``.

``d`` is ``x``, or ``x`` with inputs dropped out. Against two steps: the change is added into the base product where it lies, and in
backward ``g W`` and ``s (g B) A`` meet in one tensor, so no value of full size is written only to be added to another. Of a
dropout one byte an element is kept beside ``x``, which the adapters of one input share; ``d`` is made again in backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> bool:
    """Whether the step may be used: plain tensors of one dtype, a frozen base, no autocast, no transform of functions."""
    given = [t for t in (x, weight, bias, a, b) if t is not None]
    return (
        not weight.requires_grad
        and (a.requires_grad or not b.requires_grad)  # with A frozen the two steps keep less: only the thin value
        and (bias is None or not bias.requires_grad)
        and x.dim() > 1
        and x.numel() > 0
        and all(t.dtype == x.dtype and type(t) in (Tensor, torch.nn.Parameter) for t in given)
        and not torch.is_autocast_enabled(x.device.type)
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
    )


class LowRankLinear(torch.autograd.Function):
    """``apply(x, W, b, A, B, s, p)``: ``x`` [..., in], ``W`` [out, in], ``b`` [out] or None, ``A`` [r, in], ``B`` [out, r], ``p`` the
    probability with which the change does not see an input; gives [..., out]. ``W`` and ``b`` get no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float) -> Tensor:
        # drawn as F.dropout draws; what is left is divided by 1 - p in the thin value
        keep = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - p) if p else None
        scale = scale / (1 - p)
        thin = F.linear(_kept(x, keep), a).reshape(-1, a.shape[0])
        out = F.linear(x, weight, bias)
        if not out.is_contiguous():
            out = out.contiguous()
        out.view(-1, out.shape[-1]).addmm_(thin, b.t(), alpha=scale)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, keep, thin if ctx.needs_input_grad[4] else None, weight, a, b)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, keep, thin, weight, a, b = ctx.saved_tensors
        for_x, _, _, for_a, for_b, _, _ = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        again = torch.is_grad_enabled()  # someone takes gradients of these gradients: nothing may be changed in place
        if again and for_b:
            thin = F.linear(_kept(x, keep), a).reshape(-1, a.shape[0])  # the kept one has no history
        change = (flat @ b) * ctx.scale
        grad_x = grad_a = grad_b = None
        if for_x:
            grad_x = flat @ weight
            if keep is None:
                grad_x = torch.addmm(grad_x, change, a) if again else grad_x.addmm_(change, a)
            else:
                more = _kept(change @ a, keep.reshape(grad_x.shape))
                grad_x = grad_x + more if again else grad_x.add_(more)
            grad_x = grad_x.view(*grad.shape[:-1], weight.shape[1])
        if for_a:
            grad_a = change.t() @ _kept(x, keep).reshape(-1, a.shape[1])
        if for_b:
            grad_b = flat.t() @ thin * ctx.scale
        return grad_x, None, None, grad_a, grad_b, None, None


def _kept(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x, x.new_zeros(()))
