"""One walk over a flat graph that gives every tensor axis its expression."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from surgery.core.diagnostics import fail
from surgery.model.dims import (  # noqa: F401  (importing the rules registers them)
    rules_attention,
    rules_conv,
    rules_create,
    rules_elementwise,
    rules_expand,
    rules_index,
    rules_linear,
    rules_norm,
    rules_reduce,
    rules_shape,
)
from surgery.model.dims.algebra import Axis
from surgery.model.dims.context import RULES, Axes, Context, Rule, name_of
from surgery.model.dims.domains import lose_domain
from surgery.model.dims.result import Dims
from surgery.model.dims.stamp import Stamper
from surgery.model.twins import runs


def analyse(graph: fx.Graph | fx.GraphModule, *, aliases: Mapping[str, str] | None = None, strict: bool = False) -> Dims:
    """Dimension classes of a flat functional graph, in time linear in its nodes; a layer that stands many times is walked until its walk
    tells nothing new of what comes in, and stamped from then on (see :mod:`surgery.model.dims.stamp`).

    ``graph`` holds placeholders, ``get_attr`` nodes named after full parameter names, operators and one output; each node's
    ``meta["spec"]`` is a :class:`~surgery.model.program.ValueSpec` or a tuple of them. ``aliases`` maps further names of tied
    tensors to their first names. An operator without a rule freezes every axis that enters it and every axis it makes; a rule
    whose result contradicts the traced sizes does the same, or with ``strict`` raises.

    Raises: S0950 (strict only) when a rule's axes do not have the traced sizes.
    """
    if isinstance(graph, fx.GraphModule):
        graph = graph.graph
    cx = Context()
    parameters: dict[str, tuple[Axis, ...]] = {}
    unknown: list[tuple[fx.Node, str]] = []
    aliases = aliases or {}
    carried = _carried(graph)
    stamper = Stamper(cx, parameters, aliases, unknown)
    parts = runs(graph)
    for run in parts:
        if not run.key:
            _walk(cx, run.nodes, parameters, aliases, unknown, carried, strict)
        elif not stamper.stamp(run):
            walk = stamper.start(run)
            _walk(cx, run.nodes, parameters, aliases, unknown, carried, strict)
            stamper.end(walk)
    return Dims(cx, parameters, unknown, graph, parts)


def _walk(
    cx: Context, nodes: list[fx.Node], parameters: dict[str, Axes], aliases: Mapping[str, str],
    unknown: list[tuple[fx.Node, str]], carried: set[fx.Node], strict: bool,
) -> None:  # fmt: skip
    """Axes for every node of a run, one after the other."""
    for node in nodes:
        cx.node = cx.algebra.node = node
        if node.op == "output":
            for value in _nodes_in(node.args):
                flag = "state" if value in carried else "output"
                _each(cx, value, lambda axis, flag=flag: cx.mark(axis, flag))
                lose_domain(cx, value, "positions on it are a result of the model")
            continue
        spec = node.meta.get("spec")
        if spec is None or (not isinstance(spec, tuple) and spec.kind != "tensor"):
            cx.values[node] = None
            if node.op == "call_function":
                if spec is not None and not isinstance(spec, tuple) and spec.kind == "int":
                    cx.integers.append(node)
                for value in _nodes_in((node.args, node.kwargs)):
                    if "sym_" not in str(node.target):  # a size says nothing of the values
                        lose_domain(cx, value, "positions on it are read as numbers")
                    if spec is None:
                        _each(cx, value, lambda axis: cx.freeze(axis, "it goes into an operation without a known result"))
            continue
        of = cx.sizes.of
        if isinstance(spec, tuple):
            shapes: Any = [tuple(of(s) for s in one.shape) if one.kind == "tensor" else () for one in spec]
        else:
            shapes = tuple([s if type(s) is int else of(s) for s in spec.shape])
        cx.specs[node] = shapes
        if node.op == "placeholder":
            axes = cx.fresh()
            for axis, size in zip(axes, spec.shape, strict=True):
                cx.mark(axis, "state" if node in carried else "input")
                if type(size) is not int:
                    cx.freeze(axis, "a dynamic input size")
                elif node not in carried:
                    cx.freeze(axis, "an input's size")
            cx.values[node] = axes
        elif node.op == "get_attr":
            name = aliases.get(str(node.target), str(node.target))
            if name not in parameters:
                parameters[name] = cx.fresh()
            cx.values[node] = parameters[name]
        else:
            target = node.target
            run, called, _ = _FOUND.get(id(target)) or _rule_for(target)
            if run is None:
                unknown.append((node, called))
                cx.values[node] = _opaque(cx, node, f"{called} has no dimension rule")
            else:
                cx.values[node] = _checked(cx, node, run, called, shapes, strict)


def _carried(graph: fx.Graph) -> set[fx.Node]:
    """Placeholders that the model extends and returns (key and value caches), with the nodes that it returns for them.

    Whoever calls the model gets such a tensor from the model itself, so its fixed sizes follow the model's: they are flagged
    ``state`` and not frozen as an ordinary input's.
    """
    returned = {n for node in graph.find_nodes(op="output") for n in _nodes_in(node.args)}
    found: set[fx.Node] = set()
    for node in graph.find_nodes(op="placeholder"):
        for user in node.users:
            if user in returned and name_of(user.target)[1] == "aten.cat":
                found |= {node, user}
    return found


_FOUND: dict[int, tuple[Rule | None, str, Any]] = {}
"""Rules and names by the identity of the operation, which stays because it is kept here: torch's are hashed in Python."""


def _rule_for(target: Any) -> tuple[Rule | None, str, Any]:
    full, short = name_of(target)
    rule = RULES.get(full) or RULES.get(short)
    if rule is None and torch.Tag.pointwise in getattr(target, "tags", ()):
        rule = rules_elementwise.pointwise
    found = rule, full, target
    if rule is not None:  # one may be registered later
        _FOUND[id(target)] = found
    return found


def _checked(cx: Context, node: fx.Node, run: Rule, name: str, shapes: Any, strict: bool) -> Any:
    """The rule's axes when their sizes are the traced ones; otherwise everything around the node is frozen."""
    problem = ""
    if cx.domains:
        cx.handled.clear()
    try:
        value = run(cx, node)
    except (IndexError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, AssertionError) as exc:
        problem, value = f"its rule failed ({type(exc).__name__}: {exc})", None
    if not problem:
        if isinstance(shapes, list):
            good = isinstance(value, list) and len(value) == len(shapes)
            good = good and all(tuple([a.size for a in axes]) == shape for axes, shape in zip(value, shapes, strict=True))
        else:
            good = type(value) is tuple and tuple([a.size for a in value]) == shapes
        if good:
            if cx.domains:
                for given in _nodes_in((node.args, node.kwargs)):
                    if given in cx.domains and given not in cx.handled:
                        lose_domain(cx, given, f"positions on it go into {name}")
            return value
        got = [tuple(a.size for a in axes) for axes in value] if isinstance(value, list) else tuple(a.size for a in value or ())
        problem = f"its rule gives sizes {got}, traced were {shapes}"
        if node.meta.get("apart") and type(value) is tuple and len(value) == len(shapes):
            for axis, size in zip(value, shapes, strict=True):
                if axis.size != size:
                    cx.freeze(axis, f"{name}: {problem}")
            return value
    if strict:
        raise fail(
            "S0950",
            f"the dimension rule of {name} is wrong at node {node.name}: {problem}",
            exit_code=2,
            help="this is a fault in surgery, not in the model: please report it with the model's config",
        )
    return _opaque(cx, node, f"{name}: {problem}")


def _opaque(cx: Context, node: fx.Node, why: str) -> Any:
    """Freeze all that enters, give frozen results."""
    for value in _nodes_in((node.args, node.kwargs)):
        _each(cx, value, lambda axis: cx.freeze(axis, why))
        lose_domain(cx, value, why)
    shapes = cx.specs[node]
    first = node.all_input_nodes[0] if node.op == "call_module" and node.all_input_nodes else None
    if first is not None and shapes == cx.specs.get(first):  # an unknown module in the line: frozen, but the axes stay in place
        return cx.values[first]
    if isinstance(shapes, list):
        return [cx.fresh(why, index=i) for i in range(len(shapes))]
    return cx.fresh(why)


def _each(cx: Context, node: fx.Node, act: Any) -> None:
    value = cx.values.get(node)
    for axes in value if isinstance(value, list) else [value or ()]:
        for axis in axes:
            act(axis)


def _nodes_in(args: Any) -> Iterator[fx.Node]:
    stack = [args]
    while stack:
        item = stack.pop()
        if isinstance(item, fx.Node):
            yield item
        elif isinstance(item, Mapping):
            stack.extend(reversed(list(item.values())))
        elif isinstance(item, (list, tuple)):
            stack.extend(reversed(item))
        elif isinstance(item, slice):
            stack.extend((item.step, item.stop, item.start))
