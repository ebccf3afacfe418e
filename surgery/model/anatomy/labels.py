"""Which rows of which projection reach a value: labels carried through shape operations.

Each output feature of a projection is labelled ``projection * 2**32 + row`` (row of the stored parameter) and the labels are
moved through views, permutations, slices, concatenations exactly as the values would be, with one token in place of
each symbolic size. Elementwise operations keep the labels of their first labelled operand of full size (rotary
embeddings, scales, masks); everything else ends the trail.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from surgery.model.anatomy import ops
from surgery.model.anatomy.graphview import GraphView, Projection
from surgery.model.flat import substitute

Array = np.ndarray[Any, np.dtype[np.int64]]
SHIFT = 32


def distinct(values: Array) -> Array:
    """Sorted distinct values. (``numpy.unique`` hashes, which is far slower on numbers that are almost sorted.)"""
    flat = np.ascontiguousarray(values).reshape(-1)
    if len(flat) > 1 and not (flat[1:] > flat[:-1]).all():
        flat = np.sort(flat)
        flat = flat[np.concatenate(([True], flat[1:] != flat[:-1]))]
    return flat


def stand_ins(view: GraphView, traced: Mapping[str, int]) -> dict[Any, int]:
    """A number for every size expression: one token for each open axis, the traced size where one would leave nothing."""
    sizes: dict[Any, None] = {}
    for node in view.nodes:
        spec = node.meta.get("spec")
        for each in spec if isinstance(spec, (tuple, list)) else (spec,):
            sizes |= {s: None for s in getattr(each, "shape", ()) if hasattr(s, "free_symbols")}
    empty: set[Any] = set()
    for size in sizes:
        if int(size.subs(dict.fromkeys(size.free_symbols, 1))) < 1:
            empty |= size.free_symbols
    values = {s: traced.get(str(s), 1) if s in empty else 1 for size in sizes for s in size.free_symbols}
    return {size: max(0, int(size.subs(values))) for size in sizes}


class Labels:
    """Memoised labels of the values of one graph."""

    def __init__(self, view: GraphView, traced: Mapping[str, int] | None = None) -> None:
        self.view = view
        self._memo: dict[fx.Node, Any] = {}
        self._sources: dict[fx.Node, list[tuple[Projection, Array]]] = {}
        self._sizes = stand_ins(view, traced or {})

    def of(self, node: fx.Node) -> Array | None:
        """Labels of a value, -1 where none; None when no projection reaches it. Iterative, each node once."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in self._memo:
                stack.pop()
                continue
            needs = self._inputs(top)
            missing = [n for n in needs if n not in self._memo]
            if missing:
                stack += missing
                continue
            self._memo[top] = self._compute(top, needs)
            stack.pop()
        found = self._memo[node]
        return None if isinstance(found, list) else found

    def sources(self, node: fx.Node) -> list[tuple[Projection, Array]]:
        """The projections that reach a value with the sorted rows of each, largest share first."""
        known = self._sources.get(node)
        if known is None:
            known = self._sources[node] = self._find_sources(node)
        return known

    def _find_sources(self, node: fx.Node) -> list[tuple[Projection, Array]]:
        labels = self.of(node)
        if labels is None:
            return []
        ids = distinct(labels)
        ids = ids[np.searchsorted(ids, 0) :]
        owners = ids >> SHIFT
        found = [(self.view.projections[int(p)], ids[owners == p] & ((1 << SHIFT) - 1)) for p in distinct(owners)]
        return sorted(found, key=lambda f: (-len(f[1]), f[0].order))

    def visited(self, node: fx.Node) -> list[fx.Node]:
        """The values between the projections and ``node``, nearest to ``node`` first."""
        self.of(node)
        seen: dict[fx.Node, None] = {}
        stack = [node]
        while stack:
            top = stack.pop()
            if top in seen or self._memo.get(top) is None:
                continue
            seen[top] = None
            if top not in self.view.by_node:
                stack += [n for n in self._inputs(top) if self._memo.get(n) is not None]
        return list(seen)

    # ---------------------------------------------------------------- steps

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        if node in self.view.by_node or node.op in ("placeholder", "get_attr", "output"):
            return []
        name = ops.name_of(node)
        if name in ops.SHAPE or name in ops.PARTS or name in ops.NORMS or name in ("roll", "pad", "constant_pad_nd"):
            return node.all_input_nodes[:1]
        if node.op == "call_module":
            return node.all_input_nodes[:1]
        if name in ("cat", "stack", "concat", "copy", "slice_scatter"):
            return ops.tensors(node)
        if ops.is_pointwise(node):
            return self.view.activations(node)
        return []

    def _shape(self, node: fx.Node) -> tuple[int, ...] | None:
        shape = ops.shape_of(node)
        return None if shape is None else tuple(substitute(s, 1, self._sizes) for s in shape)

    def _compute(self, node: fx.Node, needs: list[fx.Node]) -> Any:
        projection = self.view.by_node.get(node)
        if projection is not None:
            return self._start(node, projection)
        if not needs:
            return None
        name = ops.name_of(node)
        try:
            if name in ("cat", "stack", "concat"):
                return self._join(node, name)
            source = self._memo[needs[0]]
            if name == "getitem":
                return source[node.args[1]] if isinstance(source, list) else None
            if name in ops.PARTS:
                return None if not isinstance(source, np.ndarray) else self._part(node, name, source)
            if name in ops.SHAPE:
                return None if not isinstance(source, np.ndarray) else self._move(node, name, source)
            if name == "roll" or name in ("pad", "constant_pad_nd"):
                return self._same(node, source)
            shape = self._shape(node)
            labelled = [self._memo[n] for n in needs if isinstance(self._memo[n], np.ndarray)]
            return next((lab for lab in labelled if lab.shape == shape), None)
        except (ValueError, IndexError, TypeError):
            # the stand-in sizes do not fit this view (a size taken from data): the trail ends here
            return None

    def _same(self, node: fx.Node, source: Any) -> Any:
        if not isinstance(source, np.ndarray):
            return None
        shape = self._shape(node)
        if source.shape == shape:
            return source
        # windows and padding change token axes only: one token stands for all of them
        if shape is None or not shape or source.shape[-1] != shape[-1] or len(shape) != source.ndim:
            return None
        return np.broadcast_to(source.reshape(-1, source.shape[-1])[0], shape)

    def _start(self, node: fx.Node, projection: Projection) -> Any:
        shape = self._shape(node)
        if shape is None or 0 in shape:
            return None
        rows = projection.rows + (projection.order << SHIFT)
        axis = projection.feature_axis % len(shape)
        if shape[axis] != len(rows):
            return None
        return np.broadcast_to(rows.reshape((-1,) + (1,) * (len(shape) - axis - 1)), shape)

    def _join(self, node: fx.Node, name: str) -> Any:
        parts = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        arrays: list[Any] = []
        if not isinstance(parts, (list, tuple)):
            return None
        for part in parts:
            value = self._memo.get(part) if isinstance(part, fx.Node) else None
            if not isinstance(value, np.ndarray):
                shape = self._shape(part) if isinstance(part, fx.Node) else None
                if shape is None:
                    return None
                value = np.full(shape, -1, np.int64)
            arrays.append(value)
        if all((a < 0).all() for a in arrays):
            return None
        return np.stack(arrays, dim) if name == "stack" else np.concatenate(arrays, dim)  # type: ignore[arg-type]

    def _part(self, node: fx.Node, name: str, source: Array) -> Any:
        args = node.args
        shape = self._shape(node)

        def arg(at: int, key: str, default: Any) -> Any:
            return args[at] if len(args) > at else node.kwargs.get(key, default)

        if name == "slice":
            dim = arg(1, "dim", 0)
            start, stop, step = arg(2, "start", None), arg(3, "end", None), arg(4, "step", 1)
            if isinstance(start, fx.Node) or isinstance(stop, fx.Node) or shape is None:
                return self._same(node, source)
            stop = None if stop is None or stop > (1 << 62) else stop
            taken = source[(slice(None),) * (dim % source.ndim) + (slice(start, stop, step),)]
            return taken if shape == taken.shape else self._same(node, source)
        if name == "select":
            index = arg(2, "index", 0)
            axis = arg(1, "dim", 0) % source.ndim
            return np.take(source, 0 if isinstance(index, fx.Node) or source.shape[axis] == 1 else index, axis)
        specs = node.meta["spec"]
        dim = {"unbind": 1}.get(name, 2)
        axis = arg(dim, "dim", 0)
        if name == "unbind":
            return [np.take(source, i, axis) for i in range(source.shape[axis])]
        sizes = [substitute(s.shape[axis], 1, self._sizes) for s in specs]
        return np.split(source, np.cumsum(sizes)[:-1].tolist(), axis)

    def _move(self, node: fx.Node, name: str, source: Array) -> Any:
        args = node.args
        if name == "permute":
            return np.transpose(source, args[1])  # type: ignore[arg-type]
        if name in ("transpose", "swapaxes", "swapdims"):
            return np.swapaxes(source, args[1], args[2])  # type: ignore[arg-type]
        if name in ("t", "mT", "mH", "adjoint", "numpy_T", "matrix_H"):
            return np.swapaxes(source, -1, -2) if source.ndim == 2 or name.startswith("m") or name == "adjoint" else source.T
        if name == "movedim":
            return np.moveaxis(source, args[1], args[2])  # type: ignore[arg-type]
        shape = self._shape(node)
        if shape is None:
            return None
        if source.shape == shape:
            return source
        if name in ("expand", "expand_as", "broadcast_to"):
            return np.broadcast_to(source, shape)
        return source.reshape(shape)
