"""Where a model in torch gives values that are no numbers: a weight that is stored so, or the first operation that makes one of finite values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from surgery.core.diagnostics import fail

MAKERS = frozenset(
    "empty empty_like empty_strided new_empty new_empty_strided full full_like new_full scalar_tensor masked_fill masked_fill_ where fill fill_".split()
)
"""Operations whose infinities are meant, as those of masks are, and those whose values mean nothing yet."""


def refuse_lost(root: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor], case: str) -> None:
    """Raises S0874 (in half precision) or S0888 where outputs are not finite and no mask made them so; ``case`` names the inputs in the message."""
    if all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point()):
        return
    stored = [(n, p) for n, p in root.named_parameters() if p.is_floating_point() and not bool(torch.isfinite(p).all())]
    if stored:
        name, value = stored[0]
        lost = ~torch.isfinite(value)
        if value.dtype == torch.float16 and not bool(torch.isnan(value).any()):
            raise _overflow(
                f"on {case} input; the largest number is 65504, and {int(lost.sum())} of `{name}` {'is' if int(lost.sum()) == 1 else 'are'} beyond it"
            )
        raise fail(
            "S0888", f"`{name}` of this model is not finite", notes=[f"{int(lost.sum())} of {value.numel():,} elements are NaN or infinite, and so are the outputs"],
            help="nothing was written; mend the model",
        )  # fmt: skip
    watch = _Watch({p.untyped_storage().data_ptr(): n for n, p in root.named_parameters()})
    with watch, torch.no_grad():
        root(*inputs)
    where = watch.found or watch.low
    if where and any(t.dtype == torch.float16 for t in outputs):
        raise _overflow(f"on {case} input the first value that is not finite is {where}")
    if where or any(bool(torch.isnan(t).any()) for t in outputs if t.is_floating_point()):
        raise fail(
            "S0888", "this model computes values that are not finite", notes=[f"on {case} input" + (f" the first is {where}" if where else "")],
            help="nothing was written; look at the model's weights",
        )  # fmt: skip


def _overflow(note: str) -> Exception:
    return fail(
        "S0874", "this model overflows in fp16: its outputs are not finite", notes=[note],
        help="nothing was written; write `precision = bf16`, which has the range of fp32, or `fp32`",
    )  # fmt: skip


class _Watch(TorchDispatchMode):
    """Notes the first operation of finite values whose result is not; ``low`` is the first whose result is minus infinity and no worse, as masks are
    that are added. ``names`` says which storage is which parameter."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names
        self.found = self.low = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if self.found or name in MAKERS:
            return out
        made = _floats(out)
        if all(bool(torch.isfinite(t).all()) for t in made):
            return out
        read = _floats((args, kwargs))
        if not all(bool(torch.isfinite(t).all()) for t in read):
            return out
        told = f"the result of {name}"
        weights = [self.names[at] for t in read if (at := t.untyped_storage().data_ptr()) in self.names]
        if weights:
            told += f" with `{weights[0]}`"
        if read:
            told += f", from values of at most {max(float(t.abs().max()) for t in read if t.numel()):.4g}"
        if all(bool((torch.isfinite(t) | (t == -torch.inf)).all()) for t in made):
            self.low = self.low or told
        else:
            self.found = told
        return out


def _floats(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor) and t.is_floating_point()]
