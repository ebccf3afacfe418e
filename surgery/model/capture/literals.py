"""What a model's code says in Python while it is traced on meta tensors, kept with its values.

A list in an index and the list that ``torch.tensor`` is given become tensors on the device of what they meet. On meta they would have
no values; here they are made on the CPU, and the graph moves them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from surgery.model import grouped  # noqa: F401  (registers surgery.grouped_mm)
from surgery.model.capture import questions, routing, sizes, windows

MADE = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
PRODUCTS = tuple(f for f in (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None)) if f is not None)


FOURIER = tuple(getattr(torch.fft, name) for name in ("fft", "fft2", "fftn"))
JOINS = (torch.cat, torch.concat, torch.concatenate)
FILLS = (Tensor.masked_fill, Tensor.masked_fill_, torch.masked_fill)
PARTS_OF_COMPLEX = (Tensor.real, Tensor.imag)


class Literals(TorchFunctionMode):
    """Lists in indices and literal tensors keep their values. A literal in bfloat16, which stands for the model's own dtype, is held in
    double precision and cast in the graph, so that it is not rounded in a model of another dtype. Products of sorted rows become ours
    where torch's would refuse the sizes or the dtype, whatever they are. What becomes of sizes in tensors and of experts that run one by one
    is told in ``sizes`` and ``routing``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.sizes, self.routing, self.questions = sizes.Sizes(), routing.Routing(model), questions.Questions()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if (answer := self.questions.answer(func, args)) is not None:
            return answer
        out = self._call(func, args, kwargs)
        self.questions.keep(func, args, kwargs, out)
        return out

    def _call(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found: Any = self.sizes.follow(func, args, kwargs)
        if isinstance(found, sizes.Plain):
            args, kwargs = found.args, found.kwargs
        elif found is not sizes.NO:
            return found
        if (found := self.routing.follow(func, args, kwargs)) is not routing.NO:
            return found
        if (found := windows.windows(func, args, kwargs)) is not windows.NO:
            return found
        if func is Tensor.__getitem__ and (part := _one_position(args[1])) is not None:
            return func(args[0], part).clone()
        if func is Tensor.__getitem__ or func is Tensor.__setitem__:
            return func(args[0], _index(args[1], True), *args[2:], **kwargs)
        if func in FOURIER:
            return _transform(func, args, kwargs)
        if getattr(func, "__self__", None) in PARTS_OF_COMPLEX and getattr(args[0], "was_half", False):
            return func(*args, **kwargs).to(torch.bfloat16)
        if func in MADE:
            return _made(func, args, kwargs)
        if func in JOINS and (joined := _without_nothing(func, args, kwargs)) is not None:
            return joined
        if func in PRODUCTS:
            return _product(func, args, kwargs)
        if func in FILLS and len(args) > 2 and hasattr(args[2], "one_number"):  # a number of its own device would meet another
            return func(*args[:2], args[2].one_number, **kwargs)
        return func(*args, **kwargs)


def _index(index: Any, top: bool) -> Any:
    """An index whose lists of numbers are tensors. A list of lists at the top may mean a tuple and is left to torch."""
    if isinstance(index, tuple):
        return tuple(_index(i, False) for i in index)
    if isinstance(index, list) and index and all(type(i) in ((int, bool) if top else (int, bool, list)) for i in index):
        flat = _pytree.tree_leaves(index)
        if all(type(i) is int for i in flat) or all(type(i) is bool for i in flat):
            return torch.tensor(index, device="cpu")
    return index


def _transform(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Fourier transforms know no bfloat16, which stands for the model's own dtype here: they run in single precision, in any model."""
    half = isinstance(args[0], Tensor) and args[0].dtype is torch.bfloat16
    result = func(args[0].float() if half else args[0], *args[1:], **kwargs)
    result.was_half = half
    return result


def _one_position(index: Any) -> tuple[Any, ...] | None:
    """``x[..., [-2]]`` takes a part, which a slice says better than a list of one number: analyses see which one. None for anything else."""
    if not isinstance(index, tuple) or any(not (i is None or i is ... or isinstance(i, (slice, list))) for i in index):
        return None
    lists = [i for i in index if isinstance(i, list)]
    if len(lists) != 1 or len(lists[0]) != 1 or type(lists[0][0]) is not int:
        return None
    at = lists[0][0]
    return tuple(slice(at, at + 1 if at != -1 else None) if isinstance(i, list) else i for i in index)


def _made(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    own = args[0] if func is Tensor.new_tensor and args else None
    data = args[0 if own is None else 1] if len(args) > (own is not None) else kwargs.get("data", kwargs.get("obj"))
    leaves = _pytree.tree_leaves(data)
    if func is torch.tensor and isinstance(data, (list, tuple)) and not data:
        return torch.empty(0, **{k: v for k, v in kwargs.items() if k in ("dtype", "device")})  # no values to keep
    if not leaves or not all(type(v) in (int, float, bool) for v in leaves):
        return func(*args, **kwargs)
    rest = args[2 if own is not None else 1 :]  # torch.as_tensor takes dtype and device by position
    dtype = kwargs.get("dtype", rest[0] if rest else None)
    device = kwargs.get("device", rest[1] if len(rest) > 1 else None)
    if own is not None:
        dtype, device = dtype or own.dtype, device or own.device
    elif device is None:
        device = torch.empty(0).device
    if torch.device(device).type != "meta" and dtype is not torch.bfloat16:
        made = func(*args, **kwargs)
        if type(data) in (int, float) and isinstance(made, Tensor):
            made.one_number = data
        return made
    value = torch.tensor(data, dtype=torch.float64 if dtype is torch.bfloat16 else dtype, device="cpu")
    return value.to(device=device, dtype=dtype or value.dtype)


def _without_nothing(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A concatenation without the empty vectors in it, which torch passes over: a cache begins with one. None for any other call."""
    parts = args[0] if args else kwargs.get("tensors")
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, Tensor) for p in parts):
        return None
    some = [p for p in parts if p.ndim != 1 or type(p.shape[0]) is not int or p.shape[0]]
    if not some or len(some) == len(parts) or some[0].ndim == 1:
        return None
    if len(some) == 1:
        return some[0].clone()
    return func(some, *args[1:], **{k: v for k, v in kwargs.items() if k != "tensors"})


def _product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Ours for rows that are sorted by group; torch's for batches, for groups along another axis and for what adds a bias."""
    offsets = kwargs.get("offs", args[2] if len(args) > 2 else None)
    plain = len(args) in (2, 3) and all(v is None for k, v in kwargs.items() if k != "offs")
    if not plain or offsets is None or args[0].ndim != 2 or args[1].ndim != 3:
        return func(*args, **kwargs)
    if args[0].dtype is torch.bfloat16 and not any(n % 8 for n in (args[0].shape[1], *args[1].shape[1:])):
        return func(*args, **kwargs)
    return torch.ops.surgery.grouped_mm(args[0], args[1], offsets)
