"""Windows along a sequence, said so that a trace holds for any length.

``x.as_strided`` with overlapping windows becomes ``unfold``, which analyses know; a slice that ends a symbolic number of positions before the
end is counted from the front, since a graph that is given zero of them would take nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NO = object()
"""What :func:`windows` gives for any other call."""


def windows(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call of either form, else ``NO``."""
    if func is torch.ops.aten.slice and len(args) > 3 and isinstance(args[3], torch.SymInt) and _hint(args[3]) < 0:
        return func(*args[:3], args[0].shape[args[1]] + args[3], *args[4:], **kwargs)
    if func in (Tensor.as_strided, torch.as_strided):
        return _unfolded(*args, **kwargs)
    return NO


def _unfolded(x: Tensor, size: Any, stride: Any, storage_offset: Any = None) -> Any:
    """Windows of one axis of a contiguous tensor, in the place of that axis and the next."""
    own, wanted, shape = [_hint(s) for s in x.stride()], [_hint(s) for s in stride], [_hint(n) for n in size]
    if storage_offset or len(wanted) != x.ndim + 1 or not x.is_contiguous():
        return NO
    for axis, step in enumerate(own):
        if not step or wanted[axis] % step or wanted[axis + 1 :] != own[axis:] or wanted[:axis] != own[:axis]:
            continue
        every, width = wanted[axis] // step, size[axis + 1]
        rest = [_hint(n) for i, n in enumerate(x.shape) if i != axis]
        if type(width) is not int or [*shape[:axis], *shape[axis + 2 :]] != rest or every < 1:
            continue
        found = x.unfold(axis, width, every)
        if _hint(found.shape[axis]) == shape[axis]:
            return found.movedim(-1, axis + 1)
    return NO


def _hint(n: Any) -> int:
    return int(n.node.hint) if isinstance(n, torch.SymInt) else int(n)
