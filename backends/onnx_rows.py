"""Sizes and tables that depend on the length of a sequence, where a graph is called with the last steps of it alone.

A graph that was captured for whole sequences counts positions, masks and biases from one length. With a cache there are two lengths: of
the new steps and of all of them. Tables are made for all steps, and where they meet values of the new steps, their last rows are taken;
that is done as far back as the operations allow (at best where the rows are counted), so that a step does not make a whole table for
one of its rows.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from surgery.backends.onnx_cut import NotCut, is_size
from surgery.model.program import ValueSpec

aten = torch.ops.aten

POINTWISE = frozenset({
    "add", "sub", "mul", "div", "rsub", "where", "eq", "ne", "lt", "le", "gt", "ge", "minimum", "maximum", "bitwise_and", "bitwise_or", "bitwise_not",
    "bitwise_xor", "logical_and", "logical_or", "logical_not", "__and__", "__or__", "masked_fill", "to", "_to_copy", "clone", "contiguous", "abs", "neg",
    "log", "exp", "clamp", "clamp_min", "clamp_max", "pow", "sin", "cos", "floor", "ceil", "sqrt", "rsqrt", "alias", "detach", "type_as", "lift_fresh_copy",
    "remainder", "fmod", "sign", "zeros_like", "ones_like", "full_like", "relu", "sigmoid", "tanh",
})  # fmt: skip
"""Operations that compute every element of their result from the elements at its place."""


ALL, NEW, BOTH = "all", "new", "both"
"""What an axis of a table is to have: all steps, the new ones, or, of an axis with two parts, all steps and behind them the new ones."""

Rule = Callable[[fx.Node, int, str], "fx.Node | None"]


def base(node: fx.Node) -> str:
    """The name of an operation without its overload."""
    if node.op != "call_function":
        return ""
    name = str(getattr(node.target, "__name__", node.target))
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__) if packet is not None else name


def edited(gm: fx.GraphModule | None, node: fx.Node) -> int | None:
    """Which argument of a module that surgery added passes through it when it is taken out; None for any other node."""
    if node.op != "call_module" or gm is None:
        return None
    at = getattr(gm.get_submodule(str(node.target)), "edits", None)
    return at if isinstance(at, int) and at < len(node.args) and isinstance(node.args[at], fx.Node) else None


def shape_of(node: Any) -> tuple[Any, ...]:
    spec = node.meta.get("spec") if isinstance(node, fx.Node) else None
    return spec.shape if isinstance(spec, ValueSpec) and spec.kind == "tensor" else ()


def is_number(node: fx.Node) -> bool:
    """Whether a node is a size, or computed from sizes alone."""
    spec = node.meta.get("spec")
    return is_size(node) or (isinstance(spec, ValueSpec) and spec.kind in ("int", "float", "bool"))


def holds(size: Any, symbol: Any) -> bool:
    return symbol in getattr(size, "free_symbols", ())


class Lengths:
    """The two lengths in one graph: ``new`` steps, ``past`` steps and ``total``, as nodes; ``steps`` is the symbol that the capture had for both."""

    def __init__(self, graph: fx.Graph, steps: Any, new: fx.Node, past: fx.Node, total: fx.Node) -> None:
        self.graph, self.steps = graph, steps
        self.new, self.past, self.total = new, past, total
        self._numbers: dict[tuple[fx.Node, bool], fx.Node] = {}
        self._rows: dict[tuple[fx.Node, int, str], fx.Node] = {}

    def number(self, node: fx.Node, *, all_steps: bool) -> fx.Node:
        """A number of the graph for one of the lengths. Raises NotCut for one that is read from values."""
        spec = node.meta.get("spec")
        size = spec.shape[0] if isinstance(spec, ValueSpec) and spec.shape else None
        if not holds(size, self.steps) or node in (self.new, self.past, self.total):
            return node
        key = (node, all_steps)
        if key not in self._numbers:
            self._numbers[key] = self._number(node, size, all_steps)
        return self._numbers[key]

    def _number(self, node: fx.Node, size: Any, all_steps: bool) -> fx.Node:
        if size == self.steps:
            return self.total if all_steps else self.new
        if is_size(node):
            return node  # of a value that is longer by steps of its own: it has the right size by itself
        with self.graph.inserting_after(node):
            made = self.graph.create_node(
                node.op, node.target, self.numbers(node.args, all_steps), self.numbers(node.kwargs, all_steps)
            )  # fmt: skip
        made.meta.update(node.meta)
        return made

    def numbers(self, args: Any, all_steps: bool) -> Any:
        """Arguments with every number for one of the lengths."""
        return fx.node.map_arg(args, lambda n: self.number(n, all_steps=all_steps) if is_number(n) else n)

    # ---------------------------------------------------------------- the last rows

    def rows(self, node: fx.Node, axis: int, what: str) -> fx.Node:
        """The rows of the new steps on one axis of a table for all steps, or all and the new ones; see :data:`BOTH`. Raises NotCut."""
        axis %= len(shape_of(node))
        size = shape_of(node)[axis]
        if not holds(size, self.steps):
            raise NotCut(f"its graph counts other steps than the decoder's in {node.name}")
        key = (node, axis, what)
        if key not in self._rows:
            make = self._rule(node)
            found = make(node, axis, what) if make is not None else None
            if found is None and (what != NEW or size != self.steps):
                raise NotCut(f"its graph counts other steps than the decoder's in {node.name}")
            self._rows[key] = found if found is not None else self._sliced(node, axis)
        return self._rows[key]

    def fit(self, node: Any, rank: int, axis: int, what: str) -> Any:
        """An operand of a pointwise operation whose result has ``rank`` axes, with the rows wanted where the result has them on ``axis``."""
        shape = shape_of(node)
        own = axis - (rank - len(shape))
        return self.rows(node, own, what) if shape and own >= 0 and holds(shape[own], self.steps) else node

    def _rule(self, node: fx.Node) -> Rule | None:
        name = base(node)
        if name in POINTWISE:
            return self._pointwise
        return {
            "arange": self._arange, "unsqueeze": self._unsqueeze, "expand": self._expand, "permute": self._permute, "transpose": self._transpose,
            "index": self._index, "zeros": self._filled, "ones": self._filled, "full": self._filled, "embedding": self._embedding, "cat": self._joined,
            "slice": self._cropped, "repeat": self._repeated, "reshape": self._reshaped, "view": self._reshaped, "_unsafe_view": self._reshaped,
        }.get(name, self._looked_up if node.op == "call_module" else None)  # fmt: skip

    def _again(self, node: fx.Node, args: Any, kwargs: Any = None) -> fx.Node:
        with self.graph.inserting_after(node):
            made = self.graph.create_node(node.op, node.target, args, node.kwargs if kwargs is None else kwargs)
        made.meta.update(node.meta)
        return made

    def _sliced(self, node: fx.Node, axis: int) -> fx.Node:
        with self.graph.inserting_after(self.total if node.op == "placeholder" else node):  # behind the lengths, which read inputs
            made = self.graph.call_function(aten.slice.Tensor, (node, axis, self.past, self.total))
        made.meta.update(node.meta)
        return made

    def _pointwise(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        rank = len(shape_of(node))
        fit = lambda a: self.fit(a, rank, axis, what) if not is_number(a) else a  # noqa: E731
        return self._again(node, fx.node.map_arg(node.args, fit), fx.node.map_arg(node.kwargs, fit))

    def _arange(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        if what != NEW or shape_of(node)[axis] != self.steps:
            return None
        if node.target is aten.arange.default:
            start: Any = 0
        elif node.target is aten.arange.start:
            start = node.args[0]
        else:
            return None
        if not isinstance(start, int):
            return None
        with self.graph.inserting_after(node):
            stop: Any = self.total
            begin: Any = self.past
            if start:
                begin = self.graph.call_function(operator.add, (self.past, start))
            made = self.graph.call_function(aten.arange.start, (begin, stop if not start else self._sum(stop, start)), dict(node.kwargs))
        made.meta.update(node.meta)
        return made

    def _sum(self, node: fx.Node, more: Any) -> fx.Node:
        return self.graph.call_function(operator.add, (node, more))

    def _size(self, axis_size: Any, what: str) -> Any:
        """A number for what an axis is to have, behind the lengths. None for a size that is no whole multiple of the steps."""
        share = axis_size / self.steps
        if not getattr(share, "is_Integer", False):
            return None
        if what == NEW and share == 1:
            return self.new
        with self.graph.inserting_after(self.total):
            start = self.new if what == NEW else self._sum(self.total, self.new)
            many = int(share) if what == NEW else int(share) // 2
            return start if many == 1 else self.graph.call_function(operator.mul, (start, many))

    def _unsqueeze(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        at = int(node.args[1]) % len(shape_of(node))  # type: ignore[arg-type]
        return self._again(node, (self.rows(node.args[0], axis - (axis > at), what), at))  # type: ignore[arg-type]

    def _expand(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        sizes = list(node.args[1])  # type: ignore[arg-type]
        if sizes[axis] != -1:
            sizes[axis] = self._size(shape_of(node)[axis], what)
            if sizes[axis] is None:
                return None
        return self._again(node, (self.fit(node.args[0], len(sizes), axis, what), sizes, *node.args[2:]))

    def _permute(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        order = [int(i) % len(shape_of(node)) for i in node.args[1]]  # type: ignore[union-attr, arg-type]
        return self._again(node, (self.rows(node.args[0], order[axis], what), order))  # type: ignore[arg-type]

    def _transpose(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        rank = len(shape_of(node))
        a, b = (int(i) % rank for i in node.args[1:3])  # type: ignore[arg-type]
        return self._again(node, (self.rows(node.args[0], {a: b, b: a}.get(axis, axis), what), a, b))  # type: ignore[arg-type]

    def _index(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        places = node.args[1]
        if not isinstance(places, (list, tuple)) or len(places) != len(shape_of(node.args[0])) or any(p is None for p in places):
            return None
        rank = len(shape_of(node))
        return self._again(node, (node.args[0], [self.fit(p, rank, axis, what) for p in places]))

    def _filled(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        sizes = list(node.args[0])  # type: ignore[arg-type]
        sizes[axis] = self._size(shape_of(node)[axis], what)
        return None if sizes[axis] is None else self._again(node, (sizes, *node.args[1:]))

    def _embedding(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        if axis >= len(shape_of(node.args[1])):
            return None
        return self._again(node, (node.args[0], self.rows(node.args[1], axis, what), *node.args[2:]))  # type: ignore[arg-type]

    def _joined(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
        at = int(node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)) % len(shape_of(node))  # type: ignore[arg-type, call-overload]
        if axis != at:
            return self._again(node, ([self.rows(p, axis, what) for p in parts], at), {})
        if what == BOTH and [shape_of(p)[at] for p in parts] == [self.steps, self.steps]:
            return self._again(node, ([parts[0], self.rows(parts[1], axis, NEW)], at), {})
        return None

    def _cropped(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        at = int(node.args[1] if len(node.args) > 1 else 0) % len(shape_of(node))  # type: ignore[arg-type]
        return None if axis == at else self._again(node, (self.rows(node.args[0], axis, what), *node.args[1:]))  # type: ignore[arg-type]

    def _repeated(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        own = axis - (len(shape_of(node)) - len(shape_of(node.args[0])))
        if own < 0 or not holds(shape_of(node.args[0])[own], self.steps):
            return None
        return self._again(node, (self.rows(node.args[0], own, what), node.args[1]))  # type: ignore[arg-type]

    def _reshaped(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        """Axes with steps keep their order where as many come out as went in."""
        before, after = ([i for i, n in enumerate(shape_of(a)) if holds(n, self.steps)] for a in (node.args[0], node))
        if len(before) != len(after):
            return None
        sizes = list(node.args[1])  # type: ignore[arg-type]
        if sizes[axis] != -1:
            sizes[axis] = -1 if -1 not in sizes else self._size(shape_of(node)[axis], what)
            if sizes[axis] is None:
                return None
        return self._again(node, (self.rows(node.args[0], before[after.index(axis)], what), sizes))  # type: ignore[arg-type]

    def _looked_up(self, node: fx.Node, axis: int, what: str) -> fx.Node | None:
        owner = self.graph.owning_module
        at = edited(owner, node)
        if at is not None:  # columns that are put in front of a mask
            if axis != len(shape_of(node)) - 2 or len(shape_of(node.args[at])) != len(shape_of(node)):
                return None
            return self._again(node, tuple(self.rows(a, axis, what) if i == at else a for i, a in enumerate(node.args)))  # type: ignore[arg-type]
        module = owner.get_submodule(str(node.target)) if owner is not None else None
        if not isinstance(module, nn.Embedding) or axis >= len(shape_of(node.args[0])):
            return None
        return self._again(node, (self.rows(node.args[0], axis, what),))  # type: ignore[arg-type]
