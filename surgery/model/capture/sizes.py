"""Sizes that a model's code holds in tensors: ``torch.tensor(x.size(1))`` and what it computes from them.

A trace follows a size that is a number; once it is in a tensor, using it as a size again depends on values. So the number is kept beside
the tensor, through the arithmetic that models do with it, and stands in wherever a number is asked for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NO = object()
"""What :class:`Sizes` gives for a call that has no such tensor in it."""
_INTEGERS = (torch.int64, torch.int32)
_ARITHMETIC: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.add, Tensor.__add__, Tensor.__radd__, torch.add), operator.add),
    **dict.fromkeys((Tensor.sub, Tensor.__sub__, torch.sub), operator.sub),
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), operator.mul),
    **dict.fromkeys((Tensor.__floordiv__, Tensor.floor_divide, torch.floor_divide), operator.floordiv),
    **dict.fromkeys((Tensor.__rsub__, torch.rsub), lambda a, b: b - a),
    **dict.fromkeys((Tensor.neg, Tensor.__neg__, torch.neg), operator.neg),
}  # fmt: skip
_SAME = (Tensor.to, Tensor.long, Tensor.int, Tensor.detach, Tensor.clone)
_NUMBER = (Tensor.item, Tensor.__int__, Tensor.__index__)
_MADE = (torch.arange, torch.zeros, torch.ones, torch.full, torch.empty)


def _of(value: Any) -> Any:
    """The number that a value is or holds; None for anything else."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    return getattr(value, "the_size", None) if isinstance(value, Tensor) else None


def holding(tensor: Tensor, number: Any) -> Tensor:
    tensor.the_size = number  # type: ignore[attr-defined]
    return tensor


@dataclass(frozen=True)
class Plain:
    """A call with numbers in the place of tensors that hold sizes; it is still to be made."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Sizes:
    """Follows the tensors of one trace that hold sizes; costs next to nothing while there are none."""

    def __init__(self) -> None:
        self.seen = False

    def follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call of torch that puts a size into a tensor or is given one that was, or that call with
        plain numbers; else ``NO``."""
        if func is torch.scalar_tensor and isinstance(args[0], torch.SymInt) and kwargs.get("dtype") in (None, *_INTEGERS):
            self.seen = True
            return holding(func(*args, **kwargs), args[0])
        if func is torch.div and not any(isinstance(a, Tensor) and _of(a) is None for a in args):
            found = _quotient(args, kwargs)
            self.seen |= found is not NO
            return found
        return _among(func, args, kwargs) if self.seen else NO


def _among(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    held = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(hasattr(t, "the_size") for t in held):
        return NO
    if func in _NUMBER:
        return _of(args[0])
    alone = all(hasattr(t, "the_size") for t in held)
    if alone and func in _ARITHMETIC and not kwargs and all(_of(a) is not None for a in args):
        return holding(func(*args), _ARITHMETIC[func](*map(_of, args)))
    if alone and func in _SAME:
        out = func(*args, **kwargs)
        return holding(out, _of(args[0])) if out.dtype in _INTEGERS else out
    if alone and func not in _MADE:
        return NO
    return Plain(tuple(_numbers(a) for a in args), {k: _numbers(v) for k, v in kwargs.items()})


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for v in value for leaf in _leaves(v)]
    if isinstance(value, dict):
        return _leaves(list(value.values()))
    return [value.start, value.stop, value.step] if isinstance(value, slice) else [value]


def _numbers(value: Any) -> Any:
    """The same with sizes as numbers, in slices too."""
    if isinstance(value, (tuple, list)):
        return type(value)(_numbers(v) for v in value) if type(value) in (tuple, list) else value
    if isinstance(value, slice):
        return slice(*(_numbers(v) for v in (value.start, value.stop, value.step)))
    return getattr(value, "the_size", value) if isinstance(value, Tensor) else value


def _quotient(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``torch.div(size, n, rounding_mode=...)``: sizes are not negative, so that both roundings are one."""
    numbers = [_of(a) for a in args[:2]]
    if kwargs.get("rounding_mode") not in ("trunc", "floor") or len(numbers) != 2 or None in numbers:
        return NO
    if not any(isinstance(n, torch.SymInt) for n in numbers):
        return NO
    number = numbers[0] // numbers[1]
    return holding(torch.scalar_tensor(number, dtype=torch.int64), number)
