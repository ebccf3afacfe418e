"""What a rule sees: axes of inputs, sizes of outputs, the algebra, and the register of constants and cuts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Any

import sympy
from torch import fx

from surgery.model.dims.algebra import ONE, Algebra, Axis, find
from surgery.model.dims.constants import Constant, Cut

Axes = tuple[Axis, ...]
Rule = Callable[["Context", fx.Node], Any]
"""Gives the axes of the node's value: a tuple of axes for a tensor, a list of such tuples for several values, None for no tensor."""

RULES: dict[str, Rule] = {}
END = 9223372036854775807


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under operator names without overload (``aten.view``) or with it (``aten.where.self``)."""

    def add(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"two dimension rules for {name}")
            RULES[name] = function
        return function

    return add


def primes() -> Iterable[int]:
    """Primes from 10007 on: stand-ins for symbolic sizes that no model size contains by accident."""
    for n in count(10007, 2):
        if all(n % d for d in range(3, int(n**0.5) + 1, 2)):
            yield n


class Sizes:
    """Evaluates sizes to integers, each expression once; every symbol stands for its own prime."""

    def __init__(self) -> None:
        self.symbols: dict[Any, sympy.Integer] = {}
        self.cache: dict[Any, int] = {}
        self._primes = iter(primes())

    def of(self, size: Any) -> int:
        """The size as an integer."""
        if type(size) is int:
            return size
        if size in self.cache:
            return self.cache[size]
        expr = getattr(getattr(size, "node", None), "expr", size)
        try:
            expr = sympy.sympify(expr)
            for symbol in sorted(expr.free_symbols, key=str):
                if symbol not in self.symbols:
                    self.symbols[symbol] = sympy.Integer(next(self._primes))
            value = int(expr.xreplace(self.symbols))
        except (TypeError, ValueError, AttributeError, sympy.SympifyError):
            value = int(next(self._primes))  # no integer: a size of its own
        self.cache[size] = value
        return value


class Context:
    """State of one run over a graph. Rules call its methods; :func:`surgery.model.dims.analyse` drives it."""

    def __init__(self) -> None:
        self.algebra = Algebra()
        self.sizes = Sizes()
        self.node: Any = None
        self.values: dict[fx.Node, Any] = {}
        self.specs: dict[fx.Node, Any] = {}
        self.constants: list[Constant] = []
        self.cuts: dict[fx.Node, Cut] = {}
        self.integers: list[fx.Node] = []
        """Nodes that compute a size, in graph order."""
        self.domains: dict[fx.Node, Axis] = {}
        self.item_domains: dict[tuple[fx.Node, int], Axis] = {}
        self.handled: set[fx.Node] = set()
        """Inputs of the current node whose value domains its rule took care of; the driver gives up those of all others."""
        self.limits: list[tuple[Axis, int, fx.Node]] = []
        """Axes of which a node picks so many: no fewer may be left."""
        self.windows: dict[tuple[fx.Node, int, int], int] = {}
        """Where the first slice of a length was taken of an axis of a value: (the value, its axis, the length) to the start."""
        self.inner: list[Axis] = []
        """Axes contracted by the score product of attention; only names of leaves depend on them."""

    # -- reading --------------------------------------------------------------------------------------------------

    def axes(self, arg: Any) -> Axes:
        """The axes of an argument; a number or a non-tensor has none."""
        if isinstance(arg, fx.Node):
            value = self.values.get(arg)
            if type(value) is tuple:
                return value
        return ()

    def is_tensor(self, arg: Any) -> bool:
        return isinstance(arg, fx.Node) and type(self.values.get(arg)) is tuple

    def shape(self, node: fx.Node | None = None, index: int | None = None) -> tuple[int, ...]:
        """The traced sizes of a node's value as integers (``index``: of one of several values)."""
        specs = self.specs[node or self.node]
        return specs if index is None else specs[index]

    def integer(self, arg: Any) -> int | None:
        """An integer argument, symbolic ones evaluated; None when unknown."""
        if isinstance(arg, bool):
            return int(arg)
        if isinstance(arg, int):
            return arg
        if isinstance(arg, fx.Node):
            spec = arg.meta.get("spec")
            if spec is not None and not isinstance(spec, tuple) and spec.kind == "int" and spec.shape:
                return self.sizes.of(spec.shape[0])
        return None

    def symbolic(self, arg: Any) -> bool:
        """Whether an integer argument depends on a size symbol."""
        spec = arg.meta.get("spec") if isinstance(arg, fx.Node) else None
        return (
            spec is not None
            and not isinstance(spec, tuple)
            and any(type(s) is not int and sympy.sympify(s).free_symbols for s in spec.shape)
        )

    def open(self, node: fx.Node, axis: int) -> bool:
        """Whether an axis of a node's value has no fixed size."""
        spec = node.meta.get("spec")
        shape = getattr(spec, "shape", ())
        return axis < len(shape) and type(shape[axis]) is not int and bool(sympy.sympify(shape[axis]).free_symbols)

    # -- algebra, shortened ---------------------------------------------------------------------------------------

    def leaf(self, size: int) -> Axis:
        return self.algebra.leaf(size)

    def unify(self, a: Axis, b: Axis) -> bool:
        return self.algebra.unify(a, b)

    def same(self, xs: Sequence[Axis], ys: Sequence[Axis]) -> None:
        for x, y in zip(xs, ys, strict=True):
            if x is not y:
                self.algebra.unify(x, y)

    def freeze(self, axes: Axis | Iterable[Axis], why: str) -> None:
        for axis in (axes,) if isinstance(axes, Axis) else axes:
            self.algebra.freeze(axis, why)

    def mark(self, axes: Axis | Iterable[Axis], flag: str) -> None:
        for axis in (axes,) if isinstance(axes, Axis) else axes:
            self.algebra.mark(axis, flag)

    def frozen(self, size: int, why: str) -> Axis:
        return self.algebra.frozen(size, why)

    def fresh(self, why: str | None = None, index: int | None = None) -> Axes:
        """Fresh axes of the node's output shape, frozen when ``why`` is given."""
        sizes = self.shape(index=index)
        return tuple(self.leaf(s) if why is None else self.frozen(s, why) for s in sizes)

    def broadcast(self, arrays: Sequence[Axes], shape: Sequence[int] | None = None) -> Axes:
        """Unify arrays aligned at the right; size-1 axes join nothing."""
        arrays = [a for a in arrays if a]
        if len(arrays) == 1 and (shape is None or len(shape) == len(arrays[0])):
            return arrays[0]
        rank = max((len(a) for a in arrays), default=0)
        out: list[Axis] = []
        unify = self.algebra.unify
        for i in range(-rank, 0):
            got: Axis = ONE
            for a in arrays:
                if len(a) >= -i:
                    axis = a[i]
                    if got is ONE:
                        got = find(axis)
                    elif axis is not got and axis is not ONE:
                        if axis.size != got.size and 1 in (axis.size, got.size):
                            got = axis if got.size == 1 else got
                        else:
                            unify(got, axis)
            out.append(got)
        return tuple(out)

    # -- registers ------------------------------------------------------------------------------------------------

    def constant(self, path: tuple[Any, ...], kind: str, *axes: Axis, data: Any = None) -> None:
        """Register a place in the node's arguments that depends on sizes of ``axes`` (see :class:`Constant`)."""
        if any(a is not ONE for a in axes):
            self.constants.append(Constant(self.node, path, kind, axes, data))

    def size_list(self, where: tuple[Any, ...], sizes: Sequence[Any], axes: Sequence[Axis]) -> None:
        """Register a list of sizes, one an axis, at ``where`` (``-1`` entries follow by themselves)."""
        node = self.node
        for i, (size, axis) in enumerate(zip(sizes, axes, strict=True)):
            if axis is ONE or size == -1:
                continue
            self.constants.append(Constant(node, (*where, i), "size", (axis,), None))

    def cut(self, source: Axis, start: int, stop: int, step: int = 1) -> None:
        self.cuts[self.node] = Cut(source, start, stop, step)


def name_of(target: Any) -> tuple[str, str]:
    """``(aten.view.default, aten.view)`` for an operator overload, ``(getitem, getitem)`` for a Python function."""
    text = getattr(target, "_qualified_op_name", None) or getattr(target, "_qualname", None)
    schema = getattr(target, "_schema", None)
    if schema is not None:
        full = schema.name.replace("::", ".")
        return f"{full}.{target._overloadname}", full
    return (str(text), str(text)) if text else (getattr(target, "__name__", str(target)),) * 2


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def where(node: fx.Node, position: int, name: str) -> tuple[Any, ...]:
    """The path of an argument as :class:`Constant` spells it."""
    return ("args", position) if len(node.args) > position else ("kwargs", name)


def dim_of(dim: int, rank: int) -> int:
    return dim + rank if dim < 0 else dim
