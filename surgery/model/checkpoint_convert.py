"""Stored layouts that differ from the module's: transformers' load-time conversions, recorded as expressions.

transformers 5 renames keys and rearranges tensors when it loads some families (per-expert matrices become one fused tensor,
interleaved rotary weights are permuted ...). Those tables are run here as they are, on stand-ins: a :class:`Lazy` is a tensor
without data that records which aten operations are applied to it, so the conversion comes out as an expression over stored tensors.
What an operation does is thereby taken from transformers itself; one that has no expression is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.source import Span
from surgery.model.checkpoint_headers import TensorHeader
from surgery.model.weights import Cast, Concat, Expr, Reshape, Scale, Stack, select


class Unsupported(Exception):
    """An aten operation that no expression stands for."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Lazy(torch.Tensor):
    """A tensor of known shape and dtype without data, that carries the expression of its value."""

    expr: Expr
    __slots__ = ("expr",)

    @staticmethod
    def __new__(cls, expr: Expr, like: torch.Tensor | None = None) -> Lazy:
        like = torch.empty(expr.shape, dtype=getattr(torch, expr.dtype), device="meta") if like is None else like
        made: Lazy = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device="cpu", requires_grad=False
        )
        made.expr = expr
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Lazy({self.expr.dtype}{list(self.expr.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        rule = _RULES.get(name)
        if rule is None:
            raise Unsupported(f"aten.{name}")
        shapes = torch.utils._pytree.tree_map_only(Lazy, _meta, (args, kwargs))
        if shapes[1].get("device") is not None:
            shapes[1]["device"] = torch.device("meta")
        result = func(*shapes[0], **shapes[1])
        results = list(result) if isinstance(result, list | tuple) else [result]
        exprs = rule(args, kwargs, results)
        made = [Lazy(expr, like) for expr, like in zip(exprs, results, strict=True)]
        return made if isinstance(result, list | tuple) else made[0]


def _meta(lazy: Lazy) -> torch.Tensor:
    return torch.empty_strided(lazy.shape, lazy.stride(), dtype=lazy.dtype, device="meta")


def _shape(t: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(n) for n in t.shape)


def _viewed(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    source: Expr = args[0].expr
    return [source if _shape(out[0]) == source.shape else Reshape(_shape(out[0]), source.dtype, source)]


def _same(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    return [args[0].expr]


def _permuted(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    source: Expr = args[0].expr
    rank = len(source.shape)
    order = [int(d) % rank for d in args[1]]
    return [Reshape(_shape(out[0]), source.dtype, source, tuple(order))]


def _transposed(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    source: Expr = args[0].expr
    rank = len(source.shape)
    if rank < 2:
        return [source]
    first, second = (int(args[1]) % rank, int(args[2]) % rank) if len(args) == 3 else (0, 1)
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    return [Reshape(_shape(out[0]), source.dtype, source, tuple(order))]


def _axis(args: Any, kwargs: Any, place: int) -> int:
    return int(args[place] if len(args) > place else kwargs.get("dim", 0))


def _concatenated(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    parts = tuple(t.expr for t in args[0])
    return [Concat(_shape(out[0]), dtype_name(out[0].dtype), parts, _axis(args, kwargs, 1) % out[0].ndim)]


def _stacked(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    parts = tuple(t.expr for t in args[0])
    return [Stack(_shape(out[0]), dtype_name(out[0].dtype), parts, _axis(args, kwargs, 1) % out[0].ndim)]


def _split(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    source: Expr = args[0].expr
    axis, at, exprs = _axis(args, kwargs, 2) % len(source.shape), 0, []
    for piece in out:
        exprs.append(select(source, axis, ((at, at + int(piece.shape[axis])),)))
        at += int(piece.shape[axis])
    return exprs


def _sliced(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    source: Expr = args[0].expr
    axis = _axis(args, kwargs, 1) % len(source.shape)
    start, stop, step = slice(
        *(args[2] if len(args) > 2 else None, args[3] if len(args) > 3 else None, args[4] if len(args) > 4 else 1)
    ).indices(source.shape[axis])
    if step != 1:
        return [select(source, axis, tuple((i, i + 1) for i in range(start, stop, step)))]
    return [select(source, axis, ((start, max(start, stop)),))]


def _selected(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    source: Expr = args[0].expr
    axis = int(args[1]) % len(source.shape)
    index = int(args[2]) % source.shape[axis]
    return [Reshape(_shape(out[0]), source.dtype, select(source, axis, ((index, index + 1),)))]


def _unbound(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    source: Expr = args[0].expr
    axis = _axis(args, kwargs, 1) % len(source.shape)
    return [Reshape(_shape(piece), source.dtype, select(source, axis, ((i, i + 1),))) for i, piece in enumerate(out)]


def _converted(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    source: Expr = args[0].expr
    dtype = dtype_name(out[0].dtype)
    return [source if source.dtype == dtype else Cast(source.shape, dtype, source)]


def _scaled(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    if not isinstance(args[0], Lazy) or isinstance(args[1], torch.Tensor):
        raise Unsupported("aten.mul of two tensors")
    return [Scale(_shape(out[0]), dtype_name(out[0].dtype), args[0].expr, float(args[1]))]


def _negated(args: Any, kwargs: Any, out: list[torch.Tensor]) -> list[Expr]:
    return [Scale(_shape(out[0]), dtype_name(out[0].dtype), args[0].expr, -1.0)]


_RULES: dict[str, Any] = {
    "view": _viewed, "_unsafe_view": _viewed, "reshape": _viewed, "squeeze": _viewed, "unsqueeze": _viewed, "_reshape_alias": _viewed,
    "clone": _same, "detach": _same, "alias": _same, "contiguous": _same, "lift_fresh": _same,
    "permute": _permuted, "transpose": _transposed, "t": _transposed, "cat": _concatenated, "stack": _stacked,
    "split": _split, "split_with_sizes": _split, "chunk": _split, "slice": _sliced, "select": _selected, "unbind": _unbound,
    "_to_copy": _converted, "mul": _scaled, "neg": _negated,
}  # fmt: skip


@dataclass
class Converted:
    """Result of the tables: expressions by module name, which stored keys made each, and stored keys that no name takes."""

    exprs: dict[str, Expr] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)
    unexpected: dict[str, str] = field(default_factory=dict)


def convert(model: Any, tensors: Mapping[str, TensorHeader], names: Iterable[str], span: Span | None = None) -> Converted:
    """Map stored tensors to module names with transformers' own tables for ``model`` (on meta).

    ``names`` are the state-dict names that exist. Raises S0719 where a conversion cannot be expressed.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    table = get_model_conversion_mapping(model)
    renamings = [t for t in table if isinstance(t, WeightRenaming)]
    converters = [t for t in table if isinstance(t, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    known = dict.fromkeys(names, True)
    prefix = model.base_model_prefix
    out = Converted()
    pending: dict[str, Any] = {}
    for key in sorted(tensors, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            # The table would rename a key that is right as it is; only the model's prefix may still be due.
            name, pattern = rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)
        if name not in known:
            out.unexpected[key] = name
        elif pattern is None:
            out.exprs.setdefault(name, tensors[key].load())
            out.sources.setdefault(name, []).append(key)
        else:
            converter = pending.get(name) or pending.setdefault(name, deepcopy(by_pattern[pattern]))
            converter.add_tensor(name, key, pattern, Lazy(tensors[key].load()))
            out.sources.setdefault(name, []).append(key)
    for name, converter in pending.items():
        for target, expr in _run(converter, name, model, out.sources[name], span).items():
            out.exprs[target] = expr
            out.sources[target] = out.sources[name]
    return out


def _run(converter: Any, name: str, model: Any, sources: list[str], span: Span | None) -> dict[str, Expr]:
    steps = " then ".join(type(op).__name__ for op in converter.operations)

    shown = ", ".join(f"`{s}`" for s in sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")
    notes = (f"transformers converts it by {steps}", f"from {shown}")

    def refuse(why: str) -> SurgeryError:
        return fail(
            "S0719", f"the stored layout of `{name}` cannot be converted: {steps} {why}", span, notes=notes,
            help="load the model with transformers, save it with `save_pretrained(dir, save_original_format=False)`, and name that folder",
        )  # fmt: skip

    try:
        made = converter.convert(name, model=model, config=model.config)
    except Unsupported as exc:
        raise refuse(f"uses {exc}, which has no expression") from None
    except Exception as exc:
        raise fail(
            "S0719", f"the stored tensors of `{name}` do not fit together: {' '.join(str(exc).split())[:200]}", span, notes=notes,
            help="check that all shards are there and that config and weights belong together",
        ) from exc  # fmt: skip
    out = {}
    for target, value in made.items():
        value = value[0] if isinstance(value, list) else value
        if not isinstance(value, Lazy):
            raise refuse(f"gave {type(value).__name__}")
        out[target] = value.expr
    return out
