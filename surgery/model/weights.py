"""Weights as lazy expressions over stored tensors.

An expression is immutable and knows its shape and dtype; nothing is read until it is realised. Expressions print, hash
and are what ``show --blame`` and the lock file speak of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Expr:
    """Base: ``shape`` and ``dtype`` (a torch dtype's short name: ``float32``, ``bfloat16``, ``int64`` ...) of the result."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def inputs(self) -> tuple[Expr, ...]:
        return ()


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
    """Every parameter and buffer of a program by name, in state-dict order."""
