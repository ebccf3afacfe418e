"""Operators that see several units at once, run on the units that stay: what masked execution does with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Masks = dict[int, Tensor]
Runner = Callable[[Any, tuple[Any, ...], dict[str, Any], list[Masks]], Any]
RUNNERS: dict[str, Runner] = {}


def runner(*names: str) -> Callable[[Runner], Runner]:
    def add(function: Runner) -> Runner:
        RUNNERS.update({f"aten.{name}": function for name in names})
        return function

    return add


def take(x: Tensor, masks: Masks) -> Tensor:
    """The kept positions of every masked axis."""
    for dim, mask in masks.items():
        x = x.index_select(dim, mask.nonzero().flatten())
    return x


def spread(x: Tensor, masks: Masks) -> Tensor:
    """The inverse of :func:`take`, zero elsewhere."""
    for dim, mask in masks.items():
        shape = list(x.shape)
        shape[dim] = mask.numel()
        x = x.new_zeros(shape).index_copy(dim, mask.nonzero().flatten(), x)
    return x


def hidden(x: Tensor, dim: int, masks: Masks) -> Tensor:
    """``x`` with minus infinity, of integers the smallest one, at the removed positions of one axis."""
    mask = masks.get(dim % x.dim())
    if mask is None:
        return x
    shape = [1] * x.dim()
    shape[dim] = -1
    return x.masked_fill(~mask.view(shape), -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min)


@runner("layer_norm", "rms_norm")
def trailing_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], masks: list[Masks]) -> Any:
    x, lead = args[0], args[0].dim() - len(args[1])
    mine = {d: m for d, m in masks[0].items() if d >= lead}
    if not mine:
        return None
    inner = {d - lead: m for d, m in mine.items()}
    rest = [take(p, inner) if isinstance(p, Tensor) else p for p in args[2:]]
    some = take(x, mine)
    return spread(target(some, list(some.shape[lead:]), *rest, **kwargs), mine)


@runner("group_norm")
def group_norm(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], masks: list[Masks]) -> Any:
    keep = masks[0].get(1)
    if keep is None:
        return None
    groups = int(keep.view(args[1], -1).any(1).sum())
    rest = [take(p, {0: keep}) if isinstance(p, Tensor) else p for p in args[2:]]
    return spread(target(take(args[0], {1: keep}), groups, *rest, **kwargs), {1: keep})


@runner("mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "prod", "logsumexp", "linalg_vector_norm")
def reduction(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], masks: list[Masks]) -> Any:
    at = 2 if "vector_norm" in str(target) else 1
    dims = kwargs.get("dim", args[at] if len(args) > at else None)
    rank = args[0].dim()
    chosen = range(rank) if dims is None or dims == [] else [d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    mine = {d: m for d, m in masks[0].items() if d in chosen}
    return target(take(args[0], mine), *args[1:], **kwargs) if mine else None


@runner("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], masks: list[Masks]) -> Any:
    return target(hidden(args[0], args[1] if len(args) > 1 else kwargs["dim"], masks[0]), *args[1:], **kwargs)


@runner("topk")
def topk(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], masks: list[Masks]) -> Any:
    return target(hidden(args[0], args[2] if len(args) > 2 else kwargs.get("dim", -1), masks[0]), *args[1:], **kwargs)


@runner("max", "argmax")
def largest(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], masks: list[Masks]) -> Any:
    if len(args) < 2 or not isinstance(args[1], int):
        return None
    return target(hidden(args[0], args[1], masks[0]), *args[1:], **kwargs)


@runner("scaled_dot_product_attention")
def attention(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], masks: list[Masks]) -> Any:
    """Only where stored key positions go: other axes of queries, keys and values are zero already."""
    rank = args[1].dim()
    keep = masks[1].get(rank - 2)
    if keep is None:
        return None
    key, value = (take(a, {a.dim() - 2: keep}) for a in args[1:3])
    mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if isinstance(mask, Tensor) and mask.shape[-1] > 1:
        mask = take(mask, {mask.dim() - 1: keep})
    kwargs.pop("attn_mask", None)
    return target(args[0], key, value, mask, *args[4:], **kwargs)
