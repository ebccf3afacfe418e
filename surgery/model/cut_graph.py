"""The graph tree after a cut: constants in the nodes' arguments, and the specs of all values that changed size."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx

from surgery.core.diagnostics import fail
from surgery.core.site import NodeRef
from surgery.core.source import Span
from surgery.model.cut_sizes import NewSizes, resized, scaled
from surgery.model.dims import Change
from surgery.model.lazygraph import LazyGraphModule
from surgery.model.program import Program, ValueSpec
from surgery.model.walk import edits, inside

aten = torch.ops.aten
_VIEWS = {id(op): aten.reshape.default for op in (aten.view.default, aten._unsafe_view.default, aten.view_copy.default)}
_SQUEEZES = {id(getattr(aten.squeeze, overload)) for overload in aten.squeeze.overloads()}
"""By identity: torch's operations are hashed in Python. They live as long as torch does."""


def recompile_later(gm: fx.GraphModule) -> None:
    """The module's code is made anew when it is first called: most programs are planned and copied, and never run themselves."""

    if isinstance(gm, LazyGraphModule):
        gm.recompile()
        return

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        self.recompile()  # puts the new code in the place of this function
        return type(self).forward(self, *args, **kwargs)

    type(gm).forward = forward  # type: ignore[method-assign]  # every GraphModule has a class of its own


class GraphCut:
    """Everything that a group changes in the graphs, found first and then written; nothing is written when something is refused."""

    def __init__(self, program: Program, sizes: NewSizes, changes: Iterable[Change], span: Span) -> None:
        self.program = program
        self.sizes = sizes
        self.span = span
        self.constants: dict[NodeRef, list[Change]] = {}
        self.leaves: dict[str, list[Change]] = {}
        self.specs: dict[NodeRef, Any] = {}
        """Factors of the axes of a node's value."""
        self._nodes: dict[str, dict[str, fx.Node]] = {}
        self._collect(changes)
        self._collect_specs()

    def node(self, ref: NodeRef) -> fx.Node:
        table = self._nodes.get(ref.graph)
        if table is None:
            table = self._nodes[ref.graph] = {n.name: n for n in self.program.module(ref.graph).graph.nodes}
        return table[ref.node]

    # ---------------------------------------------------------------- finding

    def _collect(self, changes: Iterable[Change]) -> None:
        found: dict[tuple[Any, ...], list[Change]] = {}
        for change in changes:
            meta = change.node.meta
            key = ("leaf", meta["path"]) if "path" in meta else ("node", meta["origin"])
            found.setdefault((*key, change.path), []).append(change)
        wanted = {(what, where) for what, where, _ in found}
        copies: dict[tuple[Any, ...], int] = {}
        for node in self.sizes.dims.graph.nodes:
            if node.op == "call_function":
                key = ("leaf", node.meta["path"]) if "path" in node.meta else ("node", node.meta["origin"])
                if key in wanted:
                    copies[*key, node.target] = copies.get((*key, node.target), 0) + 1
        for (what, where, _), same in found.items():
            first = same[0]
            everywhere = len(same) == copies[what, where, first.node.target]
            if not everywhere or any((c.value, c.ratio) != (first.value, first.ratio) for c in same):
                raise self._shared(where if what == "leaf" else where.graph)
            if what == "leaf":
                self.leaves.setdefault(where, []).append(first)
            else:
                self.constants.setdefault(where, []).append(first)
        for change in (c for same in self.constants.values() for c in same):
            entry = _entry(change.node, change.path)
            if isinstance(entry, fx.Node) and entry in self.sizes.lost:
                why = f"{change.node.name} has a size that is computed in a way that cannot be followed ({entry.name})"
                raise fail("S0430", f"these units cannot be removed: {why}", self.span, "removed here")

    def _shared(self, where: str) -> Exception:
        return fail(
            "S0432", f"`{where or 'the model'}` runs at several places and only some of them would lose these units", self.span, "cut here",
            help="cut the units at all of these places in one statement",
        )  # fmt: skip

    def _collect_specs(self) -> None:
        values, same = self.sizes.dims.values, []
        for node in self.sizes.dims.graph.nodes:
            if node.op == "output" or node not in values:
                continue
            if id(node.target) in _SQUEEZES:
                self._still_squeezes(node)
            if not self.sizes.moved(node):
                same.append(node)
                continue
            factors = self.sizes.factors(node)
            for ref in node.meta["refs"]:
                if self.specs.setdefault(ref, factors) != factors:
                    raise self._shared(ref.graph)
        for node in same:
            for ref in node.meta["refs"]:
                if ref in self.specs:
                    raise self._shared(ref.graph)

    def _still_squeezes(self, node: fx.Node) -> None:
        """An axis of which one unit is left would be taken for one that has always been single."""
        source: Any = node.args[0]
        for axis, factor in zip(self.sizes.dims.axes(source), self.sizes.factors(source), strict=True):
            if factor != 1 and axis.size * factor == 1:
                why = f"{node.name} drops axes of size one, and only one unit would be left"
                raise fail("S0430", f"these units cannot be removed: {why}", self.span, "removed here")

    # ---------------------------------------------------------------- writing

    def write(self, every: Sequence[fx.GraphModule], attached: bool) -> list[NodeRef]:
        """Rewrite the nodes; returns those whose arguments changed. ``every`` GraphModule of the program, outer ones first; ``attached``: modules that
        methods added stand in them."""
        changed = set()
        for ref, changes in self.constants.items():
            node = self.node(ref)
            changed.add(ref.graph)
            for change in changes:
                patch(node, change, self.sizes)
        for ref, factors in self.specs.items():
            node = self.node(ref)
            changed.add(ref.graph)
            node.meta["spec"] = resized(node.meta["spec"], factors)
        for flat, value in self.sizes.changed_integers():
            for ref in flat.meta["refs"]:
                self.node(ref).meta["spec"] = ValueSpec("int", "int64", (value,))
        for path in changed:
            gm = self.program.module(path)
            for node in gm.graph.nodes:
                if (reshape := _VIEWS.get(id(node.target))) is not None:
                    node.target = reshape  # the cut may change strides
            recompile_later(gm)
        for gm in every:
            self._respec_attached(gm, attached)
        respec_calls(every)
        return list(self.constants)

    @staticmethod
    def _respec_attached(gm: fx.GraphModule, attached: bool) -> None:
        """Nodes that surgery added after the analysis was made: attached modules pass on what they edit, tensors are read as they are."""
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                tensor = reduce(getattr, str(node.target).split("."), gm)
                node.meta["spec"] = replace(node.meta["spec"], shape=tuple(tensor.shape))  # type: ignore[arg-type]
            elif attached and node.op == "call_module":
                at = edits(inside(gm, str(node.target)))
                if at is not None:
                    node.meta["spec"] = _passed(node.meta.get("spec"), node.args[at].meta["spec"])


def _passed(old: Any, given: Any) -> Any:
    """What an attached module passes on has the fixed sizes of what it edits, and open ones (more tokens, say) of its own."""
    if not (isinstance(old, ValueSpec) and isinstance(given, ValueSpec)) or len(old.shape) != len(given.shape):
        return given
    shape = tuple(
        new if isinstance(new, int) or getattr(new, "is_Integer", False) else was for was, new in zip(old.shape, given.shape, strict=True)
    )
    return replace(given, shape=shape)


def respec_calls(every: Sequence[fx.GraphModule]) -> None:
    """Specs of outputs and of calls of GraphModules follow from what the inner graphs return; ``every`` GraphModule, outer ones first."""
    for gm in reversed(every):
        for node in gm.graph.nodes:
            if node.op == "call_module":
                inner = inside(gm, str(node.target))
                if isinstance(inner, fx.GraphModule):
                    out = inner.graph.output_node()
                    node.meta["spec"] = _returned(out.args[0], out.meta.get("spec"), node.meta.get("spec"))
            elif node.op == "output" and isinstance(node.meta.get("spec"), tuple):
                values = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
                old = node.meta["spec"]
                if len(old) == len(values):
                    node.meta["spec"] = tuple(v.meta["spec"] if isinstance(v, fx.Node) else o for v, o in zip(values, old, strict=True))


def _returned(value: Any, inner: Any, old: Any) -> Any:
    if isinstance(value, fx.Node):
        return value.meta["spec"]
    if isinstance(value, (tuple, list)) and isinstance(old, tuple) and len(old) == len(value):
        return tuple(v.meta["spec"] if isinstance(v, fx.Node) else o for v, o in zip(value, old, strict=True))
    return old


def _entry(node: fx.Node, path: tuple[Any, ...]) -> Any:
    kind, at, *deeper = path
    if kind == "kwargs":
        place = node.kwargs.get(at)
    else:
        place = node.args[at] if len(node.args) > at else None
    return place[deeper[0]] if deeper else place  # type: ignore[index]


def patch(node: fx.Node, change: Change, sizes: NewSizes) -> None:
    """Write one constant of a node of the tree."""
    kind, at, *deeper = change.path
    if change.kind == "split":
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], list(change.value), dim), {}
        return
    new = _new_entry(node, _entry(node, change.path), _entry(change.node, change.path), change, sizes)
    if kind == "kwargs":
        held = node.kwargs.get(at)
        node.kwargs = {**node.kwargs, at: _with(held, deeper[0], new) if deeper else new}
    else:
        place = list(node.args)
        place[at] = _with(place[at], deeper[0], new) if deeper else new
        node.args = tuple(place)


def _with(held: Any, index: int, new: Any) -> list[Any]:
    out = list(held)
    out[index] = new
    return out


def _new_entry(node: fx.Node, old: Any, flat: Any, change: Change, sizes: NewSizes) -> Any:
    if not isinstance(old, fx.Node):
        return change.value
    # a size computed in the graph: it may follow the cut by itself, else it is multiplied
    spec = flat.meta["spec"]
    wanted = scaled(spec.shape[0], Fraction(*change.ratio))
    quotient = sympy.simplify(sympy.sympify(wanted) / sympy.sympify(sizes.integer(flat)))
    if quotient == 1:
        return old
    top, bottom = (int(n) for n in sympy.fraction(quotient))
    graph = node.graph
    value = old
    with graph.inserting_before(node):
        for function, number in ((operator.mul, top), (operator.floordiv, bottom)):
            if number != 1:
                value = graph.call_function(function, (value, number))
    value.meta["spec"] = ValueSpec("int", "int64", (wanted,))
    if top != 1 and bottom != 1:
        value.args[0].meta["spec"] = ValueSpec("int", "int64", (sympy.sympify(sizes.integer(flat)) * top,))  # type: ignore[union-attr]
    return value
