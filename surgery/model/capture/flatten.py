"""From an exported program to a flat list of typed nodes: submodules inlined, guards gone, every node with its spec."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from surgery.model.capture.markers import DROP_PATH, ENTER, EXIT, STUB
from surgery.model.program import ValueSpec

_CHECKS = {
    "aten._assert_scalar.default", "aten._assert_tensor_metadata.default", "aten._assert_async.msg", "aten._assert_async.default",
    "aten.sym_constrain_range.default", "aten.sym_constrain_range_for_size.default", "aten._functional_assert_async.msg",
}  # fmt: skip
_REGION_WRAPPERS = {"wrap_with_set_grad_enabled", "wrap_with_autocast"}
_MARKERS = {ENTER, EXIT, STUB, DROP_PATH}


class Symbols:
    """Renames the tracer's size symbols to s0, s1, ... in the order of the inputs' axes."""

    def __init__(self) -> None:
        self.names: dict[sympy.Symbol, sympy.Symbol] = {}
        self.origins: dict[str, tuple[str, int, int]] = {}
        self._known: dict[Any, Any] = {}

    def declare(self, placeholder: str, value: Tensor) -> None:
        for axis, n in enumerate(value.shape):
            if isinstance(n, torch.SymInt):
                expr = n.node.shape_env.simplify(n.node.expr)
                if isinstance(expr, sympy.Symbol) and expr not in self.names:
                    new = sympy.Symbol(f"s{len(self.names)}", integer=True, positive=True)
                    self.names[expr] = new
                    hint = n.node.shape_env.backed_var_to_val.get(expr) if hasattr(n.node.shape_env, "backed_var_to_val") else None
                    self.origins[str(new)] = (placeholder, axis, int(hint if hint is not None else n.node.hint))

    def size(self, n: Any) -> Any:
        """An int, or a sympy expression over s0, s1, ..."""
        if isinstance(n, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            node = n.node
            raw = node.expr
            found = self._known.get(raw)
            if found is None:
                found = node.shape_env.simplify(raw)
                found = found.xreplace(self.names) if self.names else found
                found = int(found) if isinstance(n, torch.SymInt) and found.is_Integer else found
                self._known[raw] = found
            return found
        return n

    def spec(self, value: Any) -> Any:
        """The :class:`ValueSpec` of a traced value, a tuple of them for several."""
        if isinstance(value, Tensor):
            return ValueSpec("tensor", str(value.dtype).removeprefix("torch."), tuple(self.size(n) for n in value.shape))
        if isinstance(value, (list, tuple)):
            return tuple(self.spec(v) for v in value)
        if isinstance(value, (bool, torch.SymBool)):
            return ValueSpec("bool", "", (self.size(value),))
        if isinstance(value, (int, torch.SymInt)):
            return ValueSpec("int", "", (self.size(value),))
        if isinstance(value, (float, torch.SymFloat)):
            return ValueSpec("float", "", (self.size(value),))
        return ValueSpec("other")


def inline_wrappers(gm: fx.GraphModule, carries_gradient: set[str]) -> None:
    """Replaces wrapped grad-mode and autocast regions by their nodes.

    A region without gradient whose inputs could carry one keeps its meaning: its results are detached.
    """
    graph = gm.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or getattr(node.target, "__name__", str(node.target)) not in _REGION_WRAPPERS:
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        handle: Any = node.args[at]
        body = getattr(gm, str(handle.target))
        inline_wrappers(body, carries_gradient)
        blocked = "set_grad" in node.target.__name__ and node.args[0] is False  # type: ignore[union-attr]
        inputs = node.args[at + 1 :]
        blocked = blocked and any(isinstance(a, fx.Node) and _may_carry(a, carries_gradient) for a in inputs)
        mapping = dict(zip([n for n in body.graph.nodes if n.op == "placeholder"], inputs, strict=True))
        with graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op in ("placeholder", "output"):
                    continue
                mapping[inner] = graph.node_copy(inner, lambda n, m=mapping: m[n])
            outputs = fx.map_arg(body.graph.output_node().args[0], lambda n, m=mapping: m[n])
            outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
            if blocked:
                outputs = [_detached(graph, o) if isinstance(o, fx.Node) else o for o in outputs]
        for user in list(node.users):
            if getattr(user.target, "__name__", "") == "getitem":
                user.replace_all_uses_with(outputs[user.args[1]])
                graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(outputs[0])
        graph.erase_node(node)
        if not handle.users:
            graph.erase_node(handle)


def _may_carry(node: fx.Node, carries_gradient: set[str]) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return False
    return node.op != "placeholder" or node.name in carries_gradient


def _detached(graph: fx.Graph, node: fx.Node) -> fx.Node:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return node
    new = graph.call_function(torch.ops.aten.detach.default, (node,))
    new.meta = dict(node.meta)
    return new


def drop_checks(graph: fx.Graph) -> None:
    """Erases assertions and constraints on sizes and layouts."""
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and str(node.target) in _CHECKS:
            graph.erase_node(node)


def drop_dead(graph: fx.Graph) -> None:
    """Erases nodes without users that change nothing; random draws count as effects only while something reads them."""
    for node in reversed(list(graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node.op == "call_function":
            if node.target in _MARKERS:
                continue
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                continue
        graph.erase_node(node)


def attach_specs(nodes: Iterable[fx.Node], symbols: Symbols) -> None:
    for node in nodes:
        if "val" in node.meta:
            node.meta["spec"] = symbols.spec(node.meta["val"])
