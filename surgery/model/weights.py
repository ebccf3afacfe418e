"""Weights as lazy expressions over stored tensors.

An expression is immutable and knows its shape and dtype; nothing is read until it is realised. Expressions print, hash
and are what ``show --blame`` and the lock file speak of. This file imports no torch: ``surgery.model.realise`` computes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

from surgery.core.diagnostics import Diagnostic

DTYPE_BYTES: dict[str, int] = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e8m0fnu": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "bool": 1, "complex64": 8,
}  # fmt: skip
"""Bytes of one element, by the short name of the torch dtype."""


def is_float(dtype: str) -> bool:
    """Whether a dtype's short name is a real floating-point type."""
    return dtype.startswith(("float", "bfloat"))


@dataclass(frozen=True)
class Expr:
    """Base: ``shape`` and ``dtype`` (a torch dtype's short name: ``float32``, ``bfloat16``, ``int64`` ...) of the result."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @cached_property
    def digest(self) -> str:
        """Stable sha256 (hex) of the tree. A stored tensor enters as its file's header hash and its key, never as a path, so the
        digest is the same on every machine; it says nothing about weight bytes (see ``Checkpoint.content_hash``)."""
        return _fingerprint(self, "digest", _portable_leaf)

    @cached_property
    def identity(self) -> str:
        """Like :attr:`digest`, but stored tensors enter with path and byte range: equal identities mean equal values within a run.
        (Two checkpoints of one shape have equal digests and different values; caches must use this.)"""
        return _fingerprint(self, "identity", _local_leaf)


@dataclass(frozen=True)
class Load(Expr):
    """A stored tensor: ``key`` in safetensors file ``file`` (a path) at byte range ``span`` of the file."""

    file: str
    key: str
    span: tuple[int, int]


@dataclass(frozen=True)
class Held(Expr):
    """A tensor held in memory (a module given from Python); ``digest`` is its content hash."""

    digest: str
    tensor: Any = field(compare=False, repr=False, default=None)


@dataclass(frozen=True)
class Init(Expr):
    """A seeded initial value: ``kind`` is ``zeros``, ``ones``, ``constant``, ``normal``, ``uniform``, ``arange``;
    ``args`` its numbers (constant: value; normal: mean, std; uniform: low, high); ``seed`` a 64-bit integer, unused by constants."""

    kind: str
    args: tuple[float, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Select(Expr):
    """``source`` restricted to half-open index ranges on one axis, in order."""

    source: Expr
    axis: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Concat(Expr):
    parts: tuple[Expr, ...]
    axis: int

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.parts


@dataclass(frozen=True)
class Stack(Expr):
    """Parts of equal shape along a new axis."""

    parts: tuple[Expr, ...]
    axis: int

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.parts


@dataclass(frozen=True)
class Reshape(Expr):
    """``source`` with axes permuted by ``permute`` (empty: as they are) and then the expression's shape."""

    source: Expr
    permute: tuple[int, ...] = ()

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Cast(Expr):
    source: Expr

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Scale(Expr):
    source: Expr
    factor: float

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Add(Expr):
    parts: tuple[Expr, ...]

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.parts


@dataclass(frozen=True)
class MatMul(Expr):
    left: Expr
    right: Expr

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.left, self.right)


@dataclass(frozen=True)
class Update(Expr):
    """``source`` with half-open ``ranges`` on ``axis`` replaced by ``part`` (which has their total length there)."""

    source: Expr
    part: Expr
    axis: int
    ranges: tuple[tuple[int, int], ...]

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.source, self.part)


@dataclass(frozen=True)
class Masked(Expr):
    """``source`` with zero wherever ``keep`` (bool, of the same shape) is false, whatever stood there."""

    source: Expr
    keep: Expr

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return (self.source, self.keep)


@dataclass(frozen=True)
class Apply(Expr):
    """A method's own function of its inputs: ``function`` is ``verb/name:function`` (for example ``adapt/dora:fold``),
    ``params`` JSON-able pairs. A function with several results is applied once and ``output`` picks one of them."""

    function: str
    args: tuple[Expr, ...]
    params: tuple[tuple[str, Any], ...] = ()
    output: int | None = None

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return self.args


class Weights(dict[str, Expr]):
    """Every parameter and buffer of a program by name, in state-dict order.

    ``notes`` are findings of the binding that are no errors (stored tensors that the architecture does not use). ``twins`` are
    pairs of stored tensors that one parameter stands for (tied names that are both in the file): ``realise.check_twins``
    compares them when weights may be read.
    """

    def __init__(self, *args: Any, **more: Expr) -> None:
        super().__init__(*args, **more)
        self.notes: list[Diagnostic] = []
        self.twins: list[tuple[str, Expr, Expr]] = []


def _local_leaf(expr: Expr) -> list[Any] | None:
    return None


def _portable_leaf(expr: Expr) -> list[Any] | None:
    if not isinstance(expr, Load):
        return None
    from surgery.model.checkpoint_headers import header_digest

    return [header_digest(expr.file), expr.key]


def _fingerprint(root: Expr, slot: str, leaf: Callable[[Expr], list[Any] | None]) -> str:
    """Hash bottom-up without recursion (expressions may be deep), leaving each node's hash in its own cache ``slot``."""
    for expr in nodes(root, without=slot):
        own: list[Any] = [type(expr).__name__, list(expr.shape), expr.dtype]
        special = leaf(expr)
        if special is not None:
            own.append(special)
        else:
            for f in fields(expr):
                if f.compare and f.name not in _STRUCTURE:
                    value = getattr(expr, f.name)
                    own.append([f.name, value if f.name == "ranges" else _plain(value)])  # pairs of numbers, and many of them
        own.append([child.__dict__[slot] for child in expr.inputs])
        text = json.dumps(own, separators=(",", ":"), sort_keys=True, default=str)
        expr.__dict__[slot] = hashlib.sha256(text.encode()).hexdigest()
    return str(root.__dict__[slot])


_STRUCTURE = frozenset({"shape", "dtype", "source", "part", "parts", "left", "right", "keep"})


def _plain(value: Any) -> Any:
    """Field values as JSON; an argument that is an expression is hashed with the inputs, so only its place is kept."""
    if isinstance(value, Expr):
        return "expr"
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return value.hex()
    return value


def nodes(root: Expr, without: str = "") -> Iterator[Expr]:
    """Every distinct node object below ``root``, inputs before their users, ``root`` last; deterministic order.

    ``without`` leaves out nodes that have that cached property already, and all below them."""
    done: set[int] = set()
    stack: list[tuple[Expr, bool]] = [(root, False)]
    while stack:
        expr, ready = stack.pop()
        if id(expr) in done or (without and without in expr.__dict__):
            continue
        if ready:
            done.add(id(expr))
            yield expr
        else:
            stack.append((expr, True))
            stack.extend((child, False) for child in reversed(expr.inputs) if id(child) not in done)


def loads(root: Expr) -> list[Load]:
    """The stored tensors below an expression, each once, in order of first use."""
    seen: dict[str, Load] = {}
    for expr in nodes(root):
        if isinstance(expr, Load):
            seen.setdefault(expr.identity, expr)
    return list(seen.values())


def cast(expr: Expr, dtype: str) -> Expr:
    """``expr`` in ``dtype``; itself where that is its dtype already."""
    return expr if expr.dtype == dtype else Cast(expr.shape, dtype, expr)


def select(expr: Expr, axis: int, ranges: tuple[tuple[int, int], ...]) -> Expr:
    """``expr`` restricted to half-open ``ranges`` on ``axis`` (negative counts from the end); itself where that is everything."""
    axis %= len(expr.shape)
    if ranges == ((0, expr.shape[axis]),):
        return expr
    size = sum(stop - start for start, stop in ranges)
    return Select((*expr.shape[:axis], size, *expr.shape[axis + 1 :]), expr.dtype, expr, axis, ranges)


def describe(expr: Expr, indent: str = "") -> str:
    """The tree as indented text, one node a line: what is done, with what, and the result's dtype and shape.

    A shared subexpression is written once and referred to by number afterwards. Example::

        add float32[4x8]
          load float32[4x8] encoder.q.weight (model.safetensors)
          scale float32[4x8] by 0.5
            matmul float32[4x8]
              init float32[4x2] normal(0, 0.02) seed 7
              init float32[2x8] zeros
    """
    uses: dict[str, int] = {}
    for node in nodes(expr):
        for child in node.inputs:
            uses[child.identity] = uses.get(child.identity, 0) + 1
    lines: list[str] = []
    numbers: dict[str, int] = {}
    pending: list[tuple[Expr, str]] = [(expr, indent)]
    while pending:
        node, lead = pending.pop()
        number = numbers.get(node.identity)
        if number is not None:
            lines.append(f"{lead}see #{number}")
            continue
        mark = ""
        if uses.get(node.identity, 0) > 1 and node.inputs:
            numbers[node.identity] = len(numbers) + 1
            mark = f"#{numbers[node.identity]} "
        size = "x".join(str(n) for n in node.shape)
        lines.append(f"{lead}{mark}{type(node).__name__.lower()} {node.dtype}[{size}]{_detail(node)}")
        pending.extend((child, lead + "  ") for child in reversed(node.inputs))
    return "\n".join(lines)


def _detail(expr: Expr) -> str:
    match expr:
        case Load():
            return f" {expr.key} ({expr.file.rpartition('/')[2]})"
        case Held():
            return f" {expr.digest[:12]}"
        case Init():
            numbers = f"({', '.join(f'{a:g}' for a in expr.args)})" if expr.args else ""
            return f" {expr.kind}{numbers}" + (f" seed {expr.seed}" if expr.kind in ("normal", "uniform") else "")
        case Select() | Update():
            return f" axis {expr.axis} [{_ranges(expr.ranges)}]"
        case Concat() | Stack():
            return f" axis {expr.axis}"
        case Reshape():
            return f" permute {list(expr.permute)}" if expr.permute else ""
        case Scale():
            return f" by {expr.factor:g}"
        case Apply():
            params = ", ".join(f"{k} = {v}" for k, v in expr.params)
            return f" {expr.function}({params})" + (f" output {expr.output}" if expr.output is not None else "")
    return ""


def _ranges(ranges: tuple[tuple[int, int], ...]) -> str:
    shown = ", ".join(f"{a}..{b - 1}" if b - a > 1 else str(a) for a, b in ranges[:6])
    return shown if len(ranges) <= 6 else f"{shown}, ... {len(ranges)} ranges"
