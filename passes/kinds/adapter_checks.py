"""What is looked at in the values of an adapter when weights may be read."""

from __future__ import annotations

from typing import Any

import torch

from surgery.core.diagnostics import fail
from surgery.core.source import Span
from surgery.model.adapter import Adapter
from surgery.model.realise import realise
from surgery.model.stored import read
from surgery.model.threads import one_thread
from surgery.model.weights import Expr, Load
from surgery.passes.kinds.merge_finite import is_finite


def check_finite(adapter: Adapter, study: Any, span: Span) -> None:
    """Raises S0787 for the first tensor of an adapter with elements that are NaN or infinite. Does nothing while planning."""
    if study is None:
        return
    tensors: list[Load] = adapter.stored()
    for load in [*tensors, *adapter.whole.values()]:
        value = read(load) if isinstance(load, Load) else realise(load)
        with one_thread():  # a block is less work than waking a thread
            fine = not value.is_floating_point() or is_finite(value)
        if not fine:
            count = int((~torch.isfinite(value)).sum())
            raise fail(
                "S0787", f"{adapter.name} is not finite", span, "merged here",
                notes=(f"{count} of {value.numel():,} elements of `{load.key}` are NaN or infinite",),
                help="nothing was written; its training diverged or the file is damaged: take an earlier checkpoint of it",
            )  # fmt: skip


def is_copy(study: Any, expr: Expr, old: Expr) -> bool:
    """Whether a tensor that was saved along holds what the base holds. While planning it is taken to."""
    if study is None:
        return True
    a, b = realise(expr), realise(old, functions=study.tensors.functions)
    return a.shape == b.shape and bool(torch.equal(a.float(), b.float()))
