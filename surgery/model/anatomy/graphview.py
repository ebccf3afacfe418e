"""A flat graph with what every part of the anatomy asks for: projections, norms, parameters, order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import fx

from surgery.core.site import NodeRef
from surgery.model.anatomy import ops
from surgery.model.anatomy.copying import copied
from surgery.model.anatomy.products import IntArray, Norm, Projection
from surgery.model.dims import Axis, Dims
from surgery.model.dims.slices import survivors
from surgery.model.twins import Copies


class GraphView:
    """Indexes of one flat graph, built in one pass."""

    def __init__(self, dims: Dims, aliases: Mapping[str, str] | None = None) -> None:
        """``aliases`` maps further names of tied tensors to their first names, which the flat graph has."""
        self.dims = dims
        self.tied: dict[str, list[str]] = {}
        for name, first in (aliases or {}).items():
            self.tied.setdefault(first, []).append(name)
        self.nodes: list[fx.Node] = list(dims.graph.nodes)
        self.position: dict[fx.Node, int] = {n: i for i, n in enumerate(self.nodes)}
        self.constant: dict[fx.Node, bool] = {}
        self.projections: list[Projection] = []
        self.by_node: dict[fx.Node, Projection] = {}
        self.embeddings: list[fx.Node] = []
        self.norms: list[Norm] = []
        self.norm_of: dict[fx.Node, Norm] = {}
        self.norm_inner: dict[fx.Node, Norm] = {}
        self._biases: set[fx.Node] = set()
        self._inputs: dict[fx.Node, list[fx.Node]] = {}
        self._users: dict[fx.Node, list[fx.Node]] = {}
        self.copies = Copies(dims.runs)
        self.copied: dict[Projection, tuple[int, Projection]] = {}
        """Projections of layers that are copies: the number of the run, and the projection that stands there in the first one."""
        self._indexed(self._index)
        self._indexed(self._composed)

    def _indexed(self, index: Callable[[fx.Node], None]) -> None:
        """Asks ``index`` about every node, but notes what it found in a layer for the copies of the layer, too."""
        found: dict[int, tuple[slice, slice, slice]] = {}
        lists: list[list[Any]] = [self.projections, self.norms, self.embeddings]
        for i, run in enumerate(self.copies.runs):
            at = self.copies.of.get(i)
            if at is None or not copied(self, i, *found[at]):
                before = [len(x) for x in lists]
                for node in run.nodes:
                    index(node)
                projections, norms, embeddings = (slice(a, len(x)) for a, x in zip(before, lists, strict=True))
                found[i] = projections, norms, embeddings

    def _composed(self, node: fx.Node) -> None:
        if ops.name_of(node) in ("rsqrt", "sqrt") or (ops.name_of(node) == "pow" and node.args[1:] == (-0.5,)):
            self._decomposed_norm(node)

    # ---------------------------------------------------------------- construction

    def _index(self, node: fx.Node) -> None:
        if node in self._biases:
            return
        if node.op == "get_attr":
            self.constant[node] = True
            return
        if node.op != "call_function":
            self.constant[node] = False
            return
        inputs = self.inputs(node)
        self.constant[node] = bool(inputs) and all(self.constant[n] for n in inputs)
        name = ops.name_of(node)
        if name == "embedding":
            self.embeddings.append(node)
        elif name == "linear":
            self._project(node, node.args[0], node.args[1], self._argument(node, 2), "linear", transposed=False)
        elif name == "addmm":
            self._project(node, node.args[1], node.args[2], node.args[0], "conv1d", transposed=True)
        elif name in ops.MATMUL:
            self._matmul(node, name)
        elif name in ops.CONV:
            self._conv(node, name)
        elif name in ops.NORMS:
            self._norm(node, name)

    def inputs(self, node: fx.Node) -> list[fx.Node]:
        """The tensor-valued inputs, in order (integers left out), asked for once a node. The list is not to be changed."""
        found = self._inputs.get(node)
        if found is None:
            found = self._inputs[node] = ops.tensors(node)
        return found

    @staticmethod
    def _argument(node: fx.Node, at: int, key: str = "bias") -> Any:
        return node.args[at] if len(node.args) > at else node.kwargs.get(key)

    def _matmul(self, node: fx.Node, name: str) -> None:
        if name == "baddbmm":
            x, weight = node.args[1], node.args[2]
        elif name == "einsum":
            operands = node.args[1]
            if not isinstance(operands, (list, tuple)) or len(operands) != 2:
                return
            x, weight = operands
        else:
            x, weight = node.args[0], node.args[1]
        if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)):
            return
        if name == "einsum":
            self._einsum(node, x, weight)
        elif self.constant[weight] and not self.constant[x] and self.parameter(weight) is not None:
            self._project(node, x, weight, None, "matmul", transposed=True)

    def _einsum(self, node: fx.Node, x: fx.Node, weight: fx.Node) -> None:
        """A contraction with a whole parameter whose last kept letters become the features."""
        equation = str(node.args[0]).replace(" ", "")
        if "->" not in equation or "." in equation:
            return
        left, out = equation.split("->")
        first, second = left.split(",")
        if self.constant[x] and not self.constant[weight]:
            x, weight, first, second = weight, x, second, first
        source = self.parameter(weight)
        if source is None or not self.constant[weight] or source is not weight:
            return
        kept = [c for c in second if c in out and c not in first]
        summed = [c for c in second if c in first and c not in out]
        stored = ops.shape_of(source)
        if len(kept) != 1 or len(summed) != 1 or stored is None or len(stored) != 2:
            return
        out_axis = second.index(kept[0])
        rows = np.arange(stored[out_axis])
        kind = "linear" if out_axis == 0 else "conv1d"
        self.add(Projection(0, node, x, kind, str(source.target), "", out_axis, 1 - out_axis, rows, stored, out.index(kept[0]) - len(out)))

    def _project(self, node: fx.Node, x: Any, weight: Any, bias: Any, kind: str, *, transposed: bool) -> None:
        if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)) or self.constant[x]:
            return
        source = self.parameter(weight)
        if source is None or not self.constant[weight]:
            return
        stored = ops.shape_of(source)
        if stored is None or len(stored) not in (2, 3):
            return
        if weight is source:
            in_axis, out_axis = (len(stored) - 2, len(stored) - 1) if transposed else (len(stored) - 1, len(stored) - 2)
            rows = np.arange(stored[out_axis])
        else:
            traced = self._view_of(source, weight, transposed)
            if traced is None:
                return
            out_axis, in_axis, rows = traced
        if len(stored) == 3:
            kind = "experts"
            bias = self._row_bias(node, (stored[0], len(rows))) if bias is None else bias
        elif kind in ("conv1d", "matmul"):
            kind = "conv1d" if out_axis == 1 else "linear"
        self.add(Projection(0, node, x, kind, str(source.target), self.parameter_name(bias), out_axis, in_axis, rows, stored))

    def _row_bias(self, node: fx.Node, shape: tuple[int, ...]) -> fx.Node | None:
        """The table ``[experts, features]`` of which each routed row is given its expert's line. The lines count as constants, as any
        bias does: what they are added to is the value."""
        for user in node.users:
            lines = next((n for n in user.all_input_nodes if n is not node), None)
            if ops.name_of(user) != "add" or lines is None or ops.name_of(lines) != "index":
                continue
            table = self.parameter(lines.args[0])
            if table is not None and ops.shape_of(table) == shape:
                self._biases.add(lines)
                self.constant[lines] = True
                return table
        return None

    def _view_of(self, source: fx.Node, weight: fx.Node, transposed: bool) -> tuple[int, int, IntArray] | None:
        """Out axis, in axis and rows of a weight that is a turned or sliced view of a stored parameter."""
        cuts, turns, node = [], 0, weight
        while node is not source:
            cut = self.dims.cut_of(node)
            cuts += [cut] if cut is not None else []
            turns += ops.name_of(node) in ops.TURNS
            node = self.inputs(node)[0]
        name, axes = str(source.target), self.dims.axes(weight)
        if not isinstance(axes, tuple) or len(axes) not in (2, 3):
            return None
        ends = (axes[-1], axes[-2]) if transposed else (axes[-2], axes[-1])
        rank = len(self.dims.parameter(name))
        square = [rank - 1, rank - 2] if transposed != bool(turns % 2) else [rank - 2, rank - 1]
        out_axis, in_axis = (_stored_axis(self.dims, name, axis, at) for axis, at in zip(ends, square, strict=True))
        if out_axis is None or in_axis is None or out_axis == in_axis:
            return None
        stored = self.dims.parameter(name)[out_axis]
        rows = np.concatenate([np.arange(a, b) for a, b in survivors(self.dims, stored, cuts)])
        return (out_axis, in_axis, rows) if len(rows) == self.dims.size(ends[0]) else None

    def _conv(self, node: fx.Node, name: str) -> None:
        x, weight = node.args[0], node.args[1]
        if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)) or self.constant[x]:
            return
        source = self.parameter(weight)
        stored = None if source is None else ops.shape_of(source)
        if source is None or stored is None:
            return
        transposed = "transpose" in name or (name == "convolution" and bool(node.args[6]))
        out_axis = 1 if transposed else 0
        bias = self.parameter_name(self._argument(node, 2))
        feature = -(len(stored) - 1)
        rows = np.arange(stored[out_axis])
        self.add(Projection(0, node, x, "conv", str(source.target), bias, out_axis, 1 - out_axis, rows, stored, feature))

    def add(self, projection: Projection) -> None:
        """Notes a projection, in order of execution."""
        projection.order = len(self.projections)
        self.projections.append(projection)
        self.by_node[projection.node] = projection

    def _norm(self, node: fx.Node, name: str) -> None:
        if not isinstance(node.args[0], fx.Node):
            return
        kind = ops.NORMS[name]
        at = {"layer": 2, "rms": 2, "batch": 1, "group": 2, "instance": 1}[kind]
        weight = self.parameter_name(self._argument(node, at, "weight"))
        bias = "" if kind == "rms" else self.parameter_name(self._argument(node, at + 1))
        norm = Norm(node.args[0], node, kind, weight, bias)
        self.norms.append(norm)
        self.norm_of[node] = norm

    def _decomposed_norm(self, rsqrt: fx.Node) -> None:
        """``x * rsqrt(mean(x * x) + eps)`` and its centred form, up to the scale (``w``, ``1 + w``) and shift behind it. The root may be
        written as a power of -1/2, or divided by."""
        mean = self._statistic(rsqrt)
        if mean is None:
            return
        how = "div" if ops.name_of(rsqrt) == "sqrt" else "mul"
        product = next((u for u in rsqrt.users if ops.name_of(u) == how and len(self.inputs(u)) == 2), None)
        if product is None or (how == "div" and self.inputs(product)[0] is rsqrt):
            return
        x = next(n for n in self.inputs(product) if n is not rsqrt)
        kind = "rms"
        if ops.name_of(x) == "sub":
            centre = [n for n in self.inputs(x) if ops.name_of(n) == "mean"]
            if centre:
                kind, x = "layer", self.inputs(x)[0]
        norm = Norm(x, product, kind, inner=[rsqrt, product])
        node = product
        while True:
            after = [u for u in node.users if ops.name_of(u) not in ops.SIZES]
            if len(after) != 1:
                break
            node = after[0]
            name = ops.name_of(node)
            if name in ("to", "_to_copy", "type_as"):
                continue
            other = [n for n in self.inputs(node) if self.constant[n]]
            if name == "mul" and len(other) == 1 and not norm.weight:
                norm.weight, norm.out = self.parameter_name(other[0]), node
            elif name == "add" and len(other) == 1 and norm.weight:
                norm.bias, norm.out = self.parameter_name(other[0]), node
            else:
                break
            norm.inner.append(node)
        self.norms.append(norm)
        self.norm_of[norm.out] = norm
        for inner in norm.inner:
            self.norm_inner[inner] = norm

    @staticmethod
    def _statistic(rsqrt: fx.Node) -> fx.Node | None:
        node = rsqrt
        for _ in range(4):
            inputs = ops.tensors(node)
            if not inputs:
                return None
            node = inputs[0]
            if ops.name_of(node) in ("mean", "var"):
                return node
        return None

    # ---------------------------------------------------------------- questions

    def parameter(self, node: Any) -> fx.Node | None:
        """The one parameter (or buffer) behind a constant value, through shape ops, parts, casts, ``1 + w``; else None."""
        while isinstance(node, fx.Node):
            if node.op == "get_attr":
                return node
            if not self.constant.get(node, False):
                return None
            inputs = self.inputs(node)
            if len(inputs) != 1:
                return None
            node = inputs[0]
        return None

    def parameter_name(self, node: Any) -> str:
        found = self.parameter(node)
        return "" if found is None else str(found.target)

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Users that take the value itself, in graph order (sizes left out), asked for once a node. The list is not to be changed."""
        found = self._users.get(node)
        if found is None:
            found = [u for u in node.users if ops.name_of(u) not in ops.SIZES]
            if len(found) > 1:
                found.sort(key=self.position.__getitem__)
            self._users[node] = found
        return found

    def path(self, node: fx.Node, weight: str = "") -> str:
        """Path of the module that a node was, else of the module that holds its parameter."""
        found = node.meta.get("path")
        return str(found) if found is not None else self.own_name(node, weight).rpartition(".")[0]

    def own_name(self, node: fx.Node, weight: str) -> str:
        """The name under which a call has its weight: of a tied one the name inside the graph that the call stands in."""
        graph = node.meta["origin"].graph if node.meta.get("origin") else ""
        if not graph or weight.startswith(graph + "."):
            return weight
        return next((n for n in self.tied.get(weight, ()) if n.startswith(graph + ".")), weight)

    def strip(self, node: fx.Node, *, gather: bool = False, dropout: bool = True) -> fx.Node:
        """Back through ops that only move values; with ``gather`` through ops that take some of them too."""
        while True:
            name = ops.name_of(node)
            if name in ops.DROPOUT and not dropout:
                return node
            if name in ops.SHAPE or (gather and (name in ops.GATHER or name in ops.PARTS)):
                node = node.all_input_nodes[0]
            else:
                return node

    def activations(self, node: fx.Node, known: fx.Node | None = None) -> list[fx.Node]:
        """The inputs that carry data of the batch, without what attached modules contribute (``known`` stays)."""
        found = [n for n in self.inputs(node) if not self.constant[n] and ops.is_activation(n)]
        if len(found) < 2:
            return found
        own = [n for n in found if n is known or not self.attached(n)]
        return own or found

    def attached(self, node: fx.Node) -> bool:
        """The value comes from an opaque module (something that surgery added), up to scales and views."""
        while True:
            if node.op == "call_module":
                return True
            if node.op != "call_function" or node in self.by_node:
                return False
            inputs = [n for n in self.inputs(node) if not self.constant[n]]
            if len(inputs) != 1 or not (ops.name_of(node) in ops.SHAPE or ops.is_pointwise(node)):
                return False
            node = inputs[0]

    def after_activation(self, node: fx.Node, wanted: bool) -> fx.Node:
        """The activation that alone reads a value, else the value itself."""
        users = self.users(node)
        return users[0] if wanted and len(users) == 1 and ops.name_of(users[0]) in ops.ACTIVATIONS else node

    def backward(self, start: fx.Node, stop: Callable[[fx.Node], bool] | None = None) -> Iterator[fx.Node]:
        """Every value that ``start`` depends on, itself first, each once; not beyond those where ``stop`` holds.

        A value that only gives its size is not depended on.
        """
        seen = {start}
        stack = [start]
        while stack:
            node = stack.pop()
            yield node
            if stop is not None and stop(node):
                continue
            for n in self.inputs(node):
                if n not in seen:
                    seen.add(n)
                    stack.append(n)


def ref_in(node: fx.Node, graph: str, *, last: bool = False) -> NodeRef | None:
    """The name of a value inside one GraphModule: its first there, or its last (what a repeated call receives)."""
    found = [r for r in node.meta.get("refs", ()) if r.graph == graph]
    return (found[-1] if last else found[0]) if found else None


def _stored_axis(dims: Dims, name: str, axis: Axis, turned: int) -> int | None:
    """The stored axis that an axis of a view of a parameter is or is a part of; ``turned`` when both would do (a square class)."""
    stored = dims.parameter(name)
    same = [i for i, s in enumerate(stored) if s is axis]
    leaves = set(dims.leaves(axis))
    found = same if len(same) == 1 else [i for i, s in enumerate(stored) if leaves and leaves <= set(dims.leaves(s))]
    return found[0] if len(found) == 1 else turned if turned in found else None
