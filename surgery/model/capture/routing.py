"""Experts that a model's code runs one after the other, as products of rows that are sorted by expert.

Such code asks how many tokens chose an expert, which no trace can answer. Two forms are known by what they compute:

* a loop over the experts that were chosen at all (``for e in (mask.sum((-1, -2)) > 0).nonzero()``), each of which takes its own tokens;
* rows sorted by expert that are split by the number of each expert's tokens (``rows.split(counts.tolist())``).

The body of the loop runs once, on the rows of all experts: what it does to each row alone is traced as it is, and a product with one
expert's matrix becomes the product with every row's own (``surgery.grouped_mm``). Nothing is computed for experts that a token did not choose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.model import grouped  # noqa: F401  (registers surgery.grouped_mm)

NO = object()
"""What :class:`Routing` gives for a call that is none of its own."""
_GREATER = (torch.greater, torch.gt, Tensor.gt, Tensor.__gt__, Tensor.greater)
_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape)
_TURNS = (Tensor.permute, torch.permute)
_PRODUCTS = (Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul)
_EARLY = frozenset((F.one_hot, Tensor.__getitem__, Tensor.split, F.linear, torch.cat))
_KEEPS = (Tensor.to, Tensor.bool, Tensor.long, Tensor.int, Tensor.float, Tensor.contiguous, Tensor.detach)


@dataclass(frozen=True)
class Axis:
    """Which axis of a mask counts the experts, and whether choices were taken out of it since it was made."""

    at: int
    limited: bool = False


class _Handled:
    """Something that torch's functions accept in the place of a tensor, so that they ask the mode above what it means. Replays compare
    what it was made from: ``same_as``."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        raise RuntimeError(f"data-dependent: {getattr(func, '__name__', func)} of the rows of one expert")


class Loop:
    """One loop over experts, made from the mask ``[experts, choices, tokens]`` of which expert a token's choice is.

    ``ids`` is the expert of each row, sorted; ``ends`` where the rows of each expert end; ``tokens`` and ``choices`` where a row comes from;
    ``taken`` whether it was sent to an expert at all (behind a limit of capacity some are not). ``named`` says that the body takes a module by the
    number of the expert: the first one stands for all, so whatever reads its parameters has to be known.
    """

    named = False

    def __init__(self, mask: Any) -> None:
        self.mask, self.experts = mask, int(mask.shape[0])
        chosen = mask.permute(2, 1, 0)
        number = int(chosen.shape[1])
        self.ids, order = torch.sort(chosen.argmax(-1).reshape(-1))
        self.ends = _ends(torch.histc(self.ids.float(), bins=self.experts, min=0, max=self.experts - 1))
        self.tokens = order if number == 1 else torch.div(order, number, rounding_mode="floor")
        self.choices = torch.zeros_like(order) if number == 1 else torch.remainder(order, number)
        self.taken = chosen.sum(-1).reshape(-1)[order] > 0 if mask.experts_on.limited else None


class Hits:
    """The experts that a loop goes over: one pass of its body stands for all."""

    def __init__(self, routing: Routing, mask: Tensor) -> None:
        self.routing, self.mask = routing, mask

    def __iter__(self) -> Iterator[Hit]:
        yield Hit(Loop(self.mask))
        self.routing.loop = None

    def same_as(self) -> Any:
        return self.mask


class Hit:
    """The number of "the" expert in a body: an index, and a part of a module's name, for which the first expert stands."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        loop.named = False

    def same_as(self) -> Any:
        return self.loop.mask

    def __getitem__(self, at: int) -> Hit:
        return self

    def __format__(self, spec: str) -> str:
        self.loop.named = True
        return "0"


class Own(_Handled):
    """What the expert of each row has of ``tensor [experts, ...]``; ``turned`` when its two axes are swapped."""

    def __init__(self, loop: Loop, tensor: Tensor, turned: bool = False) -> None:
        self.loop, self.tensor, self.turned = loop, tensor, turned

    def same_as(self) -> Any:
        return self.loop.mask, self.tensor, self.turned

    @property
    def T(self) -> Own:
        return Own(self.loop, self.tensor, not self.turned)

    def t(self) -> Own:
        return self.T

    def squeeze(self, dim: int = 0) -> Own:
        return self

    def matrices(self, transposed: bool) -> Tensor:
        return self.tensor.transpose(-2, -1) if self.turned != transposed else self.tensor


class Counts:
    """The numbers of a one-dimensional tensor whose values a trace does not have. Asked for them all the same, it fails as the tensor would."""

    def __init__(self, tensor: Tensor, ask: Callable[[Tensor], list[int]]) -> None:
        self.tensor, self.ask = tensor, ask

    def same_as(self) -> Any:
        return self.tensor

    def __len__(self) -> int:
        return int(self.tensor.shape[0])

    def __iter__(self) -> Iterator[int]:
        return iter(self.ask(self.tensor))

    def __getitem__(self, at: Any) -> Any:
        return self.ask(self.tensor)[at]


class Part(_Handled):
    """The rows of one group of ``rows``, of which ``counts`` says how many each has, times ``weight`` when there is one."""

    def __init__(self, rows: Tensor, counts: Counts, at: int, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        self.rows, self.counts, self.at, self.weight, self.bias = rows, counts, at, weight, bias

    def same_as(self) -> Any:
        return self.rows, self.counts.tensor, self.at, self.weight, self.bias


@contextmanager
def countable() -> Iterator[None]:
    """While inside, ``tolist`` of a fixed number of integers without values gives :class:`Counts`."""
    from torch._subclasses.fake_tensor import FakeTensor

    def counted(original: Callable[[Tensor], list[int]]) -> Callable[[Tensor], Any]:
        def tolist(self: Tensor) -> Any:
            fixed = self.ndim == 1 and self.device.type == "meta" and isinstance(self.shape[0], int) and not self.dtype.is_floating_point
            return Counts(self, original) if fixed else original(self)

        return tolist

    before = Tensor.tolist, FakeTensor.tolist
    Tensor.tolist, FakeTensor.tolist = counted(before[0]), counted(before[1])  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.tolist, FakeTensor.tolist = before  # type: ignore[method-assign]


class Routing:
    """Follows both forms through the calls of torch that a model makes."""

    def __init__(self, model: nn.Module) -> None:
        lists = [m for m in model.modules() if isinstance(m, (nn.ModuleDict, nn.ModuleList)) and _alike(m)]
        self.families = lists[::-1]  # inner ones first: a list of layers holds the parameters of the experts in them, too
        self.loop: Loop | None = None
        self.hot = False  # until a choice of experts is spread out, few calls can be of interest

    def follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call that belongs to one of the forms; else ``NO``.

        Raises RuntimeError where a body does something with a parameter of one expert that is not known for all of them.
        """
        found = self._follow(func, args, kwargs)
        if (
            found is not NO
            or self.loop is None
            or not self.loop.named
            or not any(isinstance(a, nn.Parameter) for a in (*args, *kwargs.values()))
        ):
            return found
        out = func(*args, **kwargs)
        if isinstance(out, Tensor):
            raise RuntimeError(f"data-dependent: {getattr(func, '__name__', func)} with a parameter of one expert")
        return out

    def _follow(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.hot and func not in _EARLY:
            return NO
        first: Any = args[0] if args else None
        if func is F.one_hot:
            self.hot = True
            out = func(*args, **kwargs)
            return _marked(out, Axis(out.ndim - 1))
        if hasattr(first, "experts_on"):
            found = self._mask(func, first, args, kwargs)
            if found is not NO:
                return found
        if func in _GREATER and hasattr(first, "expert_counts") and args[1] == 0:
            out = func(*args, **kwargs)
            out.expert_hits = first.expert_counts
            return out
        if func in (Tensor.nonzero, torch.nonzero) and hasattr(first, "expert_hits"):
            return Hits(self, first.expert_hits)
        if func is torch.where and isinstance(first, Own) and first.tensor is first.loop.mask:
            self.loop = first.loop
            return self.loop.choices, self.loop.tokens
        if func is Tensor.__getitem__ and isinstance(args[1], Hit):
            if first is not args[1].loop.mask and (first.ndim != 3 or not first.shape[0] <= args[1].loop.experts):
                raise RuntimeError(
                    "data-dependent: a loop over the experts that were chosen indexes something else than masks and matrices"
                )
            return Own(args[1].loop, first)
        if func is Tensor.__getitem__ and type(args[1]) is int and first.ndim == 3:
            row = func(*args)
            row.row_of = first, args[1]
            return row
        if func is Tensor.split and isinstance(args[1], Counts) and (kwargs.get("dim", args[2] if len(args) > 2 else 0)) == 0:
            return [Part(first, args[1], i) for i in range(len(args[1]))]
        if func in (F.linear, Tensor.matmul, torch.matmul):
            return self._product(func, *args, **kwargs)
        if func is torch.cat:
            return _joined(
                args[0] if args else kwargs.get("tensors"), args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
            )
        if func in (Tensor.index_add_, Tensor.index_add) and self.loop is not None and args[2] is self.loop.tokens:
            taken = self.loop.taken
            given = args[3] if taken is None else args[3].masked_fill(~taken.unsqueeze(-1), 0)
            return func(*args[:3], given, **kwargs)
        return NO

    def _mask(self, func: Any, mask: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Which axis of a mask counts the experts, through what models do to it before they loop."""
        on: Axis = mask.experts_on
        if func in _TURNS:
            order = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
            return _marked(func(*args, **kwargs), replace(on, at=[d % mask.ndim for d in order].index(on.at)))
        if func in _VIEWS and on.at == mask.ndim - 1:
            out = func(*args, **kwargs)
            return _marked(out, replace(on, at=out.ndim - 1)) if out.shape[-1] == mask.shape[-1] else out
        if func in _PRODUCTS:
            out = func(*args, **kwargs)
            return _marked(out, Axis(on.at, True)) if out.ndim == mask.ndim else out
        if func in _KEEPS:
            return _marked(func(*args, **kwargs), on)
        if func in (Tensor.sum, torch.sum) and on.at == 0 and mask.ndim == 3:
            out = func(*args, **kwargs)
            if out.ndim == 1:
                out.expert_counts = mask
            return out
        return NO

    def _product(self, func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
        if isinstance(x, Part):
            return Part(x.rows, x.counts, x.at, weight, bias) if func is F.linear and x.weight is None else NO
        if isinstance(weight, Own):
            matrices = weight.matrices(transposed=func is F.linear)
            ends = weight.loop.ends
            if (
                matrices.shape[0] < weight.loop.experts
            ):  # a class more, for tokens that no expert takes: their rows come last and give zeros
                ends = ends[: matrices.shape[0]]
            return torch.ops.surgery.grouped_mm(x, matrices, ends)
        if self.loop is None or func is not F.linear or not isinstance(x, Tensor):
            return NO
        weights = self._siblings(weight)
        if weights is None or len(weights) != self.loop.experts:
            return NO
        out = torch.ops.surgery.grouped_mm(x, torch.stack(weights).transpose(-2, -1), self.loop.ends)
        return out if bias is None else out + torch.stack(self._siblings(bias) or [])[self.loop.ids]

    def _siblings(self, tensor: Tensor) -> list[Tensor] | None:
        """A parameter of the first of some experts with those of its name of the others."""
        for family in self.families:
            members = _members(family)
            for name, own in members[0].named_parameters():
                if own is tensor:
                    return [m.get_parameter(name) for m in members]
        return None


def _members(container: nn.Module) -> list[nn.Module]:
    """The children with parameters: a list of experts may hold a dropout beside them."""
    return [m for m in container.children() if next(m.parameters(), None) is not None]


def _alike(container: nn.Module) -> bool:
    """Two members or more, of one class and one form."""
    members = _members(container)
    forms = {(type(m), tuple((n, tuple(p.shape)) for n, p in m.named_parameters())) for m in members}
    return len(members) > 1 and len(forms) == 1


def _marked(mask: Any, on: Axis) -> Any:
    mask.experts_on = on
    return mask


def _ends(counts: Tensor) -> Tensor:
    return torch.cumsum(counts, 0, dtype=torch.int32)


def _joined(parts: Any, dim: Any) -> Any:
    """The rows of all groups behind their products."""
    if not parts or not all(isinstance(p, Part) for p in parts):
        return NO
    first = parts[0]
    same = all(p.rows is first.rows and p.counts is first.counts and p.at == i for i, p in enumerate(parts))
    if not same or dim != 0 or len(parts) != len(first.counts) or any(p.weight is None or p.bias is not None for p in parts):
        return NO
    rows = [getattr(p.weight, "row_of", (None, -1)) for p in parts]
    whole = rows[0][0]
    if whole is None or whole.shape[0] != len(parts) or any(w is not whole or at != i for i, (w, at) in enumerate(rows)):
        whole = torch.stack([p.weight for p in parts])
    return torch.ops.surgery.grouped_mm(first.rows, whole.transpose(-2, -1), _ends(first.counts.tensor))
