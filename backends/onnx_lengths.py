"""Two lengths in the place of one: what a graph for whole targets computes when the last tokens come in behind a past.

Every value of the decoder's stream gets the axes that it then has: ``n`` new steps where its rows are those of the new tokens, ``t = past + n`` where it runs over keys. Nodes are
called one after the other on meta tensors of two lengths that no other size of the model equals. Where a node reads a number that stands for the old length, or a table made for it,
the choice is the one with which it can be called and gives every other axis as before; a table is then read in its last rows. What mixes the rows of different tokens other than
through keys and values is told so.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from surgery.backends.onnx_counts import add_past, is_count
from surgery.backends.onnx_cut import NotCut
from surgery.backends.onnx_parts import VIEWS, Parts
from surgery.backends.onnx_rows import ALL, BOTH, NEW, Lengths, base, holds, is_number, shape_of
from surgery.model.program import Program, ValueSpec

_NEW, _PAST = 1009, 1030
"""Steps of the trial; 1009 and their sum 2039 are primes."""

_OTHERS = (17, 523, 541, 547, 557, 563)
"""Sizes of the other symbols in the trial, primes as well."""

_LIMIT = 256
"""Choices that are tried for one node."""

_ALONG = (
    "conv",
    "cumprod",
    "roll",
    "flip",
    "max_pool",
    "avg_pool",
    "lstm",
    "gru",
    "fft",
    "unfold",
    "group_norm",
    "groupnorm",
    "instance_norm",
    "instancenorm",
)
"""Operations that read the neighbours of a row, or all rows."""

_BY_AXIS = {
    "softmax": 1, "_softmax": 1, "log_softmax": 1, "_log_softmax": 1, "cumsum": 1, "logcumsumexp": 1, "sort": 1, "argsort": 1, "topk": 2, "gather": 1,
    "scatter": 1, "max": 1, "min": 1, "median": 1, "mode": 1, "kthvalue": 2, "cummax": 1, "cummin": 1,
}  # fmt: skip
"""Operations that do so along one axis, with the place of its number."""

_OVER_ALL = frozenset({"max", "min", "median", "argmax", "argmin"})
"""Those among them that read every axis where none is named; such a value has no rows."""


_FOLDS = frozenset({"reshape", "view", "_unsafe_view"})
"""Views that fold axes into one, and take them apart."""


@dataclass(frozen=True)
class _Choice:
    """One way to call a node: its arguments in the graph, and on meta tensors."""

    args: Any
    kwargs: Any


class TwoLengths:
    """Sets the arguments of all nodes of a decoder's graph in which the past stands in front of keys and values. Raises :class:`NotCut`."""

    def __init__(self, program: Program, parts: Parts, lengths: Lengths, past: sympy.Symbol) -> None:
        self.program, self.parts, self.lengths = program, parts, lengths
        self.graph: fx.Graph = program.graph.graph
        self.past = past
        self.steps = parts.steps
        symbols = [s for n in self.graph.nodes for size in shape_of(n) for s in getattr(size, "free_symbols", ())]
        others = sorted({str(s): s for s in symbols if s not in (self.steps, past)}.items())
        self.sizes = {s: _OTHERS[i % len(_OTHERS)] for i, (_, s) in enumerate(others)}
        self._known: dict[Any, Any] = {}
        self.mixed: set[Any] = set()
        """Sizes, as they were, of values that have all keys and behind them those of the new tokens once more."""
        self.inner: dict[fx.Node, int] = {}
        """How many elements of an axis lie between one token and the next, where that is not one: an axis may hold heads beside the tokens."""
        self.now: dict[fx.Node, Any] = {parts.ids: self._meta(parts.ids, _NEW)}

    def settle(self, joined: set[fx.Node]) -> None:
        """``joined``: the values with the past in front of them, which say the sizes that they had without it."""
        for node in list(self.graph.nodes):
            if node.op in ("placeholder", "get_attr", "output") or is_number(node):
                continue
            if node in joined:
                self._take(node, self._meta(node, _NEW + _PAST))
            elif node not in self.parts.stream:
                node.args, node.kwargs = self.lengths.numbers(node.args, True), self.lengths.numbers(node.kwargs, True)
            elif is_count(node, self.parts.ids):
                add_past(self.graph, node, self.lengths)
                self.now[node] = self._meta(node, _NEW)
            else:
                self._settle(node)

    # ---------------------------------------------------------------- one node

    def _settle(self, node: fx.Node) -> None:
        if node in self.parts.attentions:
            self._attention(node)
        self._refuse_along(node)
        found: list[tuple[_Choice, Any]] = []
        why: Exception | None = None
        several = False
        for i, choice in enumerate(self._choices(node)):
            several = several or i > 0
            if i == _LIMIT:
                break
            try:
                made = self._call(node, choice)
            except Exception as exc:
                why = exc
                continue
            if self._fits(node, made):
                found.append((choice, made))
                if base(node) not in VIEWS:
                    break
        if not found and not several and why is not None and self._rows_only(node):
            found = [(_Choice(node.args, node.kwargs), self._meta(node, _NEW))]  # what cannot be called without values
        if not found:
            raise NotCut(self._reason(node))
        before = self._order(a for a in node.all_input_nodes if a in self.now)
        choice, made = next((f for f in found if self._kinds(node, f[1]) == before), found[0])
        self._places(node, made)
        node.args, node.kwargs = self._final(node, choice)
        self._take(node, made)

    def _attention(self, node: fx.Node) -> None:
        """What an attention that is one operation is told of the order of tokens."""
        names = ("q", "k", "v", "mask") if node.op == "call_module" else ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        module: Any = self.program.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if given.get("is_causal") or getattr(module, "is_causal", False):
            raise NotCut(f"an attention counts its own causal mask ({node.name})")
        mask = given.get("attn_mask" if module is None else "mask")
        if isinstance(mask, fx.Node) and mask in self.parts.stream:
            raise NotCut(f"a mask is computed from the tokens ({mask.name})")

    def _refuse_along(self, node: fx.Node) -> None:
        name = base(node) or type(self.program.graph.get_submodule(str(node.target))).__name__.lower()
        moving = [a for a in node.all_input_nodes if a in self.now and isinstance(self.now[a], Tensor)]
        if any(word in name for word in _ALONG) and any(0 in self._kinds(a, self.now[a]) for a in moving):
            raise NotCut(f"it computes along the target ({node.name})")
        at = _BY_AXIS.get(name)
        if at is None or not moving or node.args[0] not in self.now:
            return
        axis = node.args[at] if len(node.args) > at else node.kwargs.get("dim", None if name in _OVER_ALL else -1)
        value = self.now[node.args[0]]  # type: ignore[index]
        if isinstance(axis, int) and self._kind(self._shape(node.args[0])[axis], value.shape[axis]) == 0:  # type: ignore[arg-type]
            raise NotCut(f"it computes along the target ({node.name})")

    def _reason(self, node: fx.Node) -> str:
        tables = [a for a in node.all_input_nodes if self._is_table(a)]
        if tables:
            return f"it reads `{tables[0].name}` in {node.name}"
        moving = [self._kinds(a, self.now[a]) for a in node.all_input_nodes if isinstance(self.now.get(a), Tensor)]
        if sum(0 in kinds for kinds in moving) > 1:
            return f"an attention is written out in a form that is not known ({node.name})"
        return f"it computes along the target ({node.name})"

    def _places(self, node: fx.Node, made: Any) -> None:
        """Follows the tokens through axes that hold more than them. Raises NotCut where a view puts the values of one token in the places of others: then a row
        is made of several tokens, of later ones as well."""
        sources = [a for a in node.all_input_nodes if isinstance(self.now.get(a), Tensor) and 0 in self._kinds(a, self.now[a])]
        if not isinstance(made, Tensor) or not sources:
            return
        rows = [i for i, (n, have) in enumerate(zip(shape_of(node), made.shape, strict=True)) if self._kind(n, have) == 0]
        if not rows:
            return
        inner = {self.inner.get(a, 1) for a in sources}
        found = inner.pop()
        if base(node) in _FOLDS:
            value = self.now[sources[0]]
            at = next(i for i, n in enumerate(self._shape(sources[0])) if self._kind(n, value.shape[i]) == 0)
            found, left = divmod(found * math.prod(value.shape[at + 1 :]), math.prod(made.shape[rows[0] + 1 :]))
            beside = made.shape[rows[0]] // _NEW
            if left or found == 0 or beside % found:
                raise NotCut(f"it puts the values of one token in the places of others ({node.name})")
        elif inner:
            raise NotCut(f"it puts the values of one token beside those of others ({node.name})")
        if found != 1:
            self.inner[node] = found

    def _rows_only(self, node: fx.Node) -> bool:
        """Whether a value and all that it is made from have one axis of steps, that of the new ones."""
        kinds = [self._kinds(a, self.now[a]) for a in node.all_input_nodes if isinstance(self.now.get(a), Tensor)]
        return (
            all(k == [0] for k in kinds)
            and isinstance(node.meta.get("spec"), ValueSpec)
            and sum(holds(n, self.steps) for n in shape_of(node)) == 1
        )

    # ---------------------------------------------------------------- choices

    def _is_table(self, node: Any) -> bool:
        return (
            isinstance(node, fx.Node) and node not in self.now and not is_number(node) and any(holds(n, self.steps) for n in shape_of(node))
        )

    def _choices(self, node: fx.Node) -> Iterator[_Choice]:
        """Every way to read the numbers and tables of a node: numbers of the new steps and whole tables first. Arguments that are chosen are
        pairs of the old one and what it is to be."""
        given: list[tuple[Any, ...]] = []

        def count(a: fx.Node) -> fx.Node:
            if self._is_length(a):
                given.append((NEW, ALL))
            elif self._is_table(a):
                given.append(tuple(itertools.product(*(self._ways(n) for n in shape_of(a)))))
            return a

        _mapped((node.args, node.kwargs), count)
        for picked in itertools.product(*given):
            taken = iter(picked)

            def take(a: fx.Node, taken: Iterator[Any] = taken) -> Any:
                return _Picked(a, next(taken)) if self._is_length(a) or self._is_table(a) else a

            args, kwargs = _mapped((node.args, node.kwargs), take)
            yield _Choice(args, kwargs)

    def _is_length(self, node: fx.Node) -> bool:
        return is_number(node) and holds(_number(node), self.steps)

    def _ways(self, size: Any) -> tuple[Any, ...]:
        if not holds(size, self.steps):
            return (ALL,)
        share = sympy.Poly(size, self.steps).coeff_monomial(self.steps) if size.is_polynomial(self.steps) else 1
        if size in self.mixed:
            return BOTH, ALL, NEW  # there are keys of this kind
        return (ALL, NEW, BOTH) if share % 2 == 0 else (ALL, NEW)

    def _call(self, node: fx.Node, choice: _Choice) -> Any:
        args, kwargs = _mapped(choice.args, self._value), _mapped(choice.kwargs, self._value)
        with torch.no_grad():
            if node.op == "call_module":
                return self.program.graph.get_submodule(str(node.target))(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _value(self, a: Any) -> Any:
        if isinstance(a, _Picked):
            if is_number(a.node):
                return self._at(_number(a.node), _NEW if a.what == NEW else _NEW + _PAST)
            lengths = {ALL: _NEW + _PAST, NEW: _NEW}
            shape = tuple(
                (self._at(n, _NEW) + self._at(n, _NEW + _PAST)) // 2 if w == BOTH else self._at(n, lengths[w])
                for n, w in zip(shape_of(a.node), a.what, strict=True)
            )
            return torch.empty(shape, dtype=getattr(torch, a.node.meta["spec"].dtype), device="meta")
        if a in self.now:
            return self.now[a]
        if is_number(a):
            return self._at(_number(a), _NEW)
        return self._meta(a, _NEW + _PAST)

    def _final(self, node: fx.Node, choice: _Choice) -> tuple[Any, Any]:
        def final(a: Any) -> Any:
            if not isinstance(a, _Picked):
                return a
            if is_number(a.node):
                return self.lengths.number(a.node, all_steps=a.what == ALL)
            table = a.node
            for axis, what in enumerate(a.what):
                if what != ALL:
                    table = self.lengths.rows(table, axis, what)
            return table

        return _mapped(choice.args, final), _mapped(choice.kwargs, final)

    # ---------------------------------------------------------------- sizes

    def _at(self, size: Any, steps: int) -> int:
        if not hasattr(size, "subs"):
            return int(size)
        if (size, steps) not in self._known:
            self._known[size, steps] = int(size.subs({self.steps: steps, self.past: _PAST, **self.sizes}))
        return int(self._known[size, steps])

    def _meta(self, node: fx.Node, steps: int) -> Any:
        spec = node.meta["spec"]
        if isinstance(spec, tuple):
            raise NotCut(f"it computes along the target ({node.name})")
        return torch.empty(tuple(self._at(n, steps) for n in spec.shape), dtype=getattr(torch, spec.dtype), device="meta")

    def _kind(self, size: Any, now: int) -> Fraction | None:
        """How much of the past an axis has grown by, as a share of what it would be with every step: 0 for new steps, 1 for all, 1/2 for both.

        None for a size that no choice explains; -1 for one without steps.
        """
        if (key := ("kind", size, now)) not in self._known:
            self._known[key] = self._share(size, now)
        found: Fraction | None = self._known[key]
        return found

    def _share(self, size: Any, now: int) -> Fraction | None:
        old = self._at(size, _NEW)
        if not holds(size, self.steps):
            return Fraction(-1) if old == now else None
        whole = self._at(size, _NEW + _PAST)
        share = Fraction(now - old, whole - old) if whole != old else Fraction(int(now == old) - 1)
        return share if share in (0, Fraction(1, 2), 1) else None

    def _kinds(self, node: fx.Node, value: Any) -> list[Fraction | None]:
        """The kinds of the axes of a tensor that have steps, in order."""
        if not isinstance(value, Tensor):
            return []
        found = [self._kind(n, have) for n, have in zip(self._shape(node), value.shape, strict=True)]
        return [k for k in found if k != -1]

    def _order(self, nodes: Iterator[fx.Node]) -> list[Fraction | None]:
        return next((self._kinds(n, self.now[n]) for n in nodes), [])

    def _shape(self, node: fx.Node) -> tuple[Any, ...]:
        """Sizes of a value as they were for one length."""
        return node.meta.get("was", shape_of(node))

    def _fits(self, node: fx.Node, made: Any) -> bool:
        """Whether a result has the axes that it had, each for one of the lengths, and still every row of the new tokens once."""
        specs = node.meta.get("spec")
        if not isinstance(made, Tensor):
            parts = zip(specs, made, strict=False) if isinstance(specs, tuple) and isinstance(made, (tuple, list)) else ()
            return all(len(s.shape) == t.ndim for s, t in parts if isinstance(t, Tensor))
        shape = shape_of(node)
        if len(shape) != made.ndim:
            return False
        kinds = [self._kind(n, have) for n, have in zip(shape, made.shape, strict=True)]
        if None in kinds or kinds.count(Fraction(0)) > 1:
            return False
        rows = any(0 in self._kinds(a, self.now[a]) for a in node.all_input_nodes if a in self.now)
        return not rows or Fraction(0) in kinds or Fraction(1, 2) in kinds or not shape

    def _take(self, node: fx.Node, made: Any) -> None:
        """Keeps what a node gives, and writes its new sizes down."""
        self.now[node] = made
        spec = node.meta.get("spec")
        if not isinstance(made, Tensor) or not isinstance(spec, ValueSpec):
            return
        node.meta["was"] = spec.shape
        self.mixed |= {n for n, have in zip(spec.shape, made.shape, strict=True) if self._kind(n, have) == Fraction(1, 2)}
        node.meta["spec"] = replace(spec, shape=tuple(self._new(n, have) for n, have in zip(spec.shape, made.shape, strict=True)))

    def _new(self, size: Any, now: int) -> Any:
        share = self._kind(size, now)
        if share is None or share <= 0:
            return size
        if (key := ("new", size, share)) not in self._known:
            self._known[key] = self._grown(size, share)
        return self._known[key]

    def _grown(self, size: Any, share: Fraction) -> Any:
        whole = size.subs({self.steps: self.past + self.steps})
        return whole if share == 1 else sympy.expand((whole + size) * sympy.Rational(1, 2))


@dataclass(frozen=True)
class _Picked:
    """An argument that is chosen: a number for ``what`` steps, or a table with ``what`` on each axis."""

    node: fx.Node
    what: Any


def _number(node: fx.Node) -> Any:
    """The number that a node computes, as it was for one length. Raises NotCut for one that is read from values."""
    spec = node.meta.get("spec")
    if not isinstance(spec, ValueSpec) or not spec.shape:
        raise NotCut(f"it reads a number from values ({node.name})")
    return spec.shape[0]


def _mapped(args: Any, call: Any) -> Any:
    """Arguments with every node and choice replaced."""
    if isinstance(args, (fx.Node, _Picked)):
        return call(args)
    if isinstance(args, tuple):
        return tuple(_mapped(a, call) for a in args)
    if isinstance(args, list):
        return [_mapped(a, call) for a in args]
    if isinstance(args, dict):
        return {k: _mapped(a, call) for k, a in args.items()}
    if isinstance(args, slice):
        return slice(*(_mapped(a, call) for a in (args.start, args.stop, args.step)))
    return args
