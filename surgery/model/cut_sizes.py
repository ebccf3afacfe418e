"""New sizes of values when units of dimension classes go: specs of tensors, and integers that are computed from sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import sympy
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod

from surgery.model.dims import Dims, Keep
from surgery.model.dims.context import name_of
from surgery.model.program import ValueSpec

Shape = tuple[Any, ...]
SAME = Fraction(1)
"""The factor of every size that stays: most do, and fractions are compared in Python."""
_ARITHMETIC: dict[Any, Callable[..., Any]] = {
    operator.add: operator.add, operator.sub: operator.sub, operator.mul: operator.mul, operator.neg: operator.neg,
    operator.floordiv: FloorDiv, operator.mod: Mod, operator.truediv: operator.truediv,
}  # fmt: skip


class NewSizes:
    """What the values of a flat graph measure after a cut.

    ``lost`` are integer nodes that depend on a size that changes in a way that is not understood here.
    """

    def __init__(self, dims: Dims, keep: Keep) -> None:
        self.dims = dims
        self.keep = keep
        self.lost: set[fx.Node] = set()
        self._factors: dict[int, Any] = {}
        self._moved: dict[int, bool] = {}
        self._moves: dict[Any, bool] = {}
        self._factor: dict[Any, Fraction] = {}
        self._integers: dict[fx.Node, Any] = {}
        for node in dims.integers:
            self._integer(node, node.meta["spec"])

    def factors(self, node: fx.Node) -> Any:
        """New over old size for each axis of a value; a list of such tuples for several values, None for no tensor."""
        axes = self.dims.axes(node) if node.op != "output" else None
        if axes is None:
            return None
        known = self._factors.get(id(axes))  # values of one shape have one tuple of axes, which the analysis holds
        if known is None:
            factor = self.factor
            known = [tuple([factor(a) for a in one]) for one in axes] if isinstance(axes, list) else tuple([factor(a) for a in axes])
            self._factors[id(axes)] = known
        return known

    def moved(self, node: fx.Node) -> bool:
        """Whether any size of a value changes."""
        axes = self.dims.axes(node) if node.op != "output" else None
        known = self._moved.get(id(axes))
        if known is None:
            flat = () if axes is None else [a for one in axes for a in one] if isinstance(axes, list) else axes
            moves, known = self._moves, False
            for axis in flat:
                moving = moves.get(axis)
                if moving is None:
                    moving = moves[axis] = self.factor(axis) != 1
                if moving:
                    known = True
                    break
            self._moved[id(axes)] = known
        return known

    def factor(self, axis: Any) -> Fraction:
        known = self._factor.get(axis)
        if known is None:
            root = self.dims.root(axis)
            left = self.keep.size(root)
            known = self._factor[axis] = SAME if left == root.size else Fraction(left, root.size)
        return known

    def integer(self, node: fx.Node) -> Any:
        """The value (an integer or an expression over symbols) that an integer node has by itself after the cut."""
        return self._integers.get(node, node.meta["spec"].shape[0])

    def _integer(self, node: fx.Node, spec: ValueSpec) -> None:
        short = name_of(node.target)[1]
        source = node.args[0] if node.args else None
        if short in ("aten.sym_size", "aten.sym_numel") and isinstance(source, fx.Node):
            factors = self.factors(source)
            if type(factors) is not tuple:
                return
            if short == "aten.sym_size":
                dim = node.args[1]
                factor = factors[dim]  # type: ignore[index]
            else:
                factor = SAME
                for f in factors:
                    factor *= f
            if factor != 1:
                self._integers[node] = scaled(spec.shape[0], factor)
            return
        if not any(n in self._integers or n in self.lost for n in node.all_input_nodes):
            return
        function = _ARITHMETIC.get(node.target)
        if function is None or any(n in self.lost for n in node.all_input_nodes):
            self.lost.add(node)
            return
        args = [self.integer(a) if isinstance(a, fx.Node) else a for a in node.args]
        self._integers[node] = sympy.sympify(function(*(sympy.sympify(a) for a in args)))

    def changed_integers(self) -> Iterator[tuple[fx.Node, Any]]:
        yield from self._integers.items()


def scaled(size: Any, factor: Fraction) -> Any:
    """``size * factor`` for an integer or an expression over symbols; a plain int where it is one."""
    if factor is SAME or factor == 1:
        return size
    if type(size) is int:
        return size * factor.numerator // factor.denominator
    value = sympy.sympify(size) * sympy.Rational(factor.numerator, factor.denominator)
    return int(value) if value.is_Integer else value


def resized(spec: Any, factors: Any) -> Any:
    """A spec with its sizes multiplied; ``factors`` as :meth:`NewSizes.factors` gives them."""
    if isinstance(spec, tuple):
        return tuple(resized(s, f) for s, f in zip(spec, factors, strict=True))
    if spec is None or spec.kind != "tensor" or not factors:
        return spec
    return ValueSpec(spec.kind, spec.dtype, tuple(scaled(s, f) for s, f in zip(spec.shape, factors, strict=True)))
