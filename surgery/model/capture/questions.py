"""Questions that a model's code asks about its masks: ``if mask.any().item()``.

A trace has no values to answer them with. What the question is computed from is kept, from the integer inputs on; asked, it is computed for
masks and ids of several kinds and sizes. Where all give one answer, as where code looks for a kind of mask that these inputs cannot say, that
answer stands and is noted; else the question depends on values, and the capture fails as it would.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from surgery.model.capture.errors import _describe, _innermost

_ASKS = (Tensor.item, Tensor.__bool__)
_FACTORIES = (torch.arange, torch.zeros, torch.ones, torch.full, torch.tensor, torch.scalar_tensor)
_KINDS = 8


@dataclass(frozen=True)
class Step:
    """How a tensor was computed, from steps in the place of tensors; ``func`` is the name of an input in the first of a chain."""

    func: Any
    args: tuple[Any, ...] = ()
    kwargs: Any = None


def name_input(tensor: Tensor, name: str) -> None:
    """From here on what is computed from this integer input, and nothing else, is followed."""
    if not tensor.dtype.is_floating_point:
        tensor.step = Step(name, (tuple(tensor.shape), tensor.dtype))  # type: ignore[attr-defined]


class Questions:
    """``answers`` are sentences, one for each question that was answered."""

    def __init__(self) -> None:
        self.answers: dict[str, None] = {}
        self._sharing: dict[int, list[Tensor]] = {}  # what is followed, by where it lies in memory

    def answer(self, func: Callable[..., Any], args: tuple[Any, ...]) -> bool | None:
        """What a question about masks alone always gives; None where this is none, or has several answers."""
        if func not in _ASKS or not isinstance(getattr(args[0], "step", None), Step) or args[0].dtype is not torch.bool:
            return None
        found: set[bool] = set()
        try:
            with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
                for kind in range(_KINDS):
                    found.add(bool(_compute(args[0].step, kind, {})))
        except Exception:  # what could not be computed has no answer
            return None
        if len(found) != 1:
            return None
        frame = _innermost(traceback.extract_stack())
        value = found.pop()
        if frame is not None:
            self.answers.setdefault(
                f"{_describe(frame)} asks about the mask; for every mask that these inputs can say the answer is {'yes' if value else 'no'}"
            )
        return value

    def keep(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Notes how ``out`` was computed where it follows from integer inputs alone."""
        if args and isinstance(args[0], Tensor) and getattr(args[0], "step", None) is None:
            return  # nearly every call of a model: what it computes with follows from weights
        name = str(getattr(func, "__name__", ""))
        given = [t for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__":
            self._written(func, args, kwargs, given)
            return
        if isinstance(out, Tensor) and not hasattr(out, "step") and all(getattr(t, "step", None) is not None for t in given):
            if given or func in _FACTORIES:
                out.step = Step(func, *_steps((args, kwargs)))  # type: ignore[attr-defined]
                self._sharing.setdefault(out.untyped_storage()._cdata, []).append(out)

    def _written(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], given: list[Tensor]) -> None:
        """A tensor is written to: it is followed on where what is written is; whatever shares its memory is not."""
        if not given or getattr(given[0], "step", None) is None:
            return
        known = given[0] is args[0] and all(getattr(t, "step", None) is not None for t in given)
        after = Step(_after, (func, *_steps((args, kwargs)))) if known else None
        for other in self._sharing.get(given[0].untyped_storage()._cdata, ()):
            other.step = None  # type: ignore[attr-defined]
        given[0].step = after  # type: ignore[attr-defined]


def _steps(value: Any) -> Any:
    return _pytree.tree_map(lambda v: v.step if isinstance(v, Tensor) else v, value)


def _after(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a write in place leaves in its first argument."""
    own: Tensor = args[0].clone()
    func(own, *args[1:], **kwargs)
    return own


def _compute(step: Step, kind: int, made: dict[int, Any]) -> Any:
    """The value of a chain of steps for one kind of inputs."""
    if id(step) in made:
        return made[id(step)]
    if isinstance(step.func, str):
        shape, dtype = step.args
        value = _input(step.func, shape, dtype, kind)
    else:
        args, kwargs = _pytree.tree_map(lambda v: _concrete(v, kind, made), (step.args, step.kwargs or {}))
        value = step.func(*args, **kwargs)
    made[id(step)] = value
    return value


def _concrete(value: Any, kind: int, made: dict[int, Any]) -> Any:
    if isinstance(value, Step):
        return _compute(value, kind, made)
    if isinstance(value, torch.SymInt):
        expr = value.node.shape_env.simplify(value.node.expr)
        env = value.node.shape_env
        return int(expr.subs({s: int(env.backed_var_to_val[s]) + kind // 4 for s in expr.free_symbols}))
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _input(name: str, shape: tuple[Any, ...], dtype: torch.dtype, kind: int) -> Tensor:
    """Masks: all ones, the end or the start of the last row empty, the last row empty; else numbers from zero up, all zeros, all ones, all two."""
    sizes = [_concrete(n, kind, {}) for n in shape]
    if "mask" not in name:
        count = torch.arange(int(torch.tensor(sizes).prod())).reshape(sizes) % 50
        return (count, count * 0, count * 0 + 1, count * 0 + 2)[kind % 4].to(dtype)
    mask = torch.ones(sizes, dtype=dtype)
    last = mask[-1] if mask.ndim > 1 else mask
    half = last.shape[-1] // 2
    if kind % 4:
        last[(slice(half, None), slice(None, half), slice(None))[kind % 4 - 1]] = 0
    return mask
