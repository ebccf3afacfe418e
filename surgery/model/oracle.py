"""What a cut must equal: the model before with the removed units masked away, computed without the machinery of the cut.

Two oracles. *Masked execution* runs the original graph and sets the removed units of every value to zero, where normalisers and means
count only units that stay and softmax and selections see minus infinity. *Literal zeroing* runs it with the removed slices of every
stored tensor set to zero; it says the same wherever no normaliser, softmax or selection sees the units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.core.site import NodeRef
from surgery.core.source import NOWHERE, Span
from surgery.model.claims import Claim
from surgery.model.dims import Dims, Group, Keep, Member
from surgery.model.dims.algebra import factors
from surgery.model.dims.context import name_of
from surgery.model.flat import flatten
from surgery.model.live import Tensors
from surgery.model.oracle_ops import RUNNERS
from surgery.model.program import Program
from surgery.model.retarget import retarget_graph
from surgery.model.running import is_small, outputs_of

Masks = list[tuple[int, Tensor]]
_SYMBOLIC = 10007
"""Sizes from here on stand for symbols in the analysis."""


class FlatRun:
    """Runs a flat graph node by node. ``read(name)`` gives parameters and buffers; a value is dropped after its last use.

    ``seen(node, value)`` may replace every value; ``special(node, args, kwargs)`` may compute one instead of the operator (None: it does not).
    """

    def __init__(self, graph: fx.Graph, read: Callable[[str], Tensor], modules: Callable[[fx.Node], nn.Module] | None = None) -> None:
        self.graph = graph
        self.read = read
        self.modules = modules
        self.last: dict[fx.Node, list[fx.Node]] = {}
        done: set[fx.Node] = set()
        for node in reversed(graph.nodes):
            gone = [a for a in node.all_input_nodes if a not in done]
            done.update(gone)
            self.last[node] = gone

    def seen(self, node: fx.Node, value: Any) -> Any:
        return value

    def special(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return None

    def __call__(self, inputs: Sequence[Tensor]) -> Any:
        env: dict[fx.Node, Any] = {}
        given = iter(inputs)
        with torch.no_grad():
            for node in self.graph.nodes:
                args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
                if node.op == "output":
                    return args[0]
                if node.op == "placeholder":
                    value: Any = next(given)
                elif node.op == "get_attr":
                    value = self.read(str(node.target))
                elif node.op == "call_module":
                    assert self.modules is not None
                    # what is attached reads stored tensors as they are: a length of a weight must not change with what enters it
                    args = tuple(
                        self.read(str(n.target)) if isinstance(n, fx.Node) and n.op == "get_attr" else a
                        for n, a in zip(node.args, args, strict=True)
                    )
                    value = self.modules(node)(*args, **kwargs)
                else:
                    value = self.special(node, args, dict(kwargs))
                    if value is None:
                        value = node.target(*args, **kwargs)  # type: ignore[operator]
                env[node] = self.seen(node, value)
                for gone in self.last[node]:
                    env.pop(gone, None)
        raise AssertionError("a graph has an output")


class MaskedRun(FlatRun):
    """Masked execution: ``axes(node)`` are the axes of a node's value in the analysis ``dims`` that made ``keep``."""

    def __init__(
        self, graph: fx.Graph, read: Callable[[str], Tensor], dims: Dims, keep: Keep, axes: Callable[[fx.Node], Any],
        modules: Callable[[fx.Node], nn.Module] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(graph, read, modules)
        self.dims, self.keep, self.axes = dims, keep, axes

    def masks(self, node: Any, value: Any) -> Masks:
        """(axis number, which positions stay) of the axes of a value that lose units."""
        if not isinstance(node, fx.Node) or not isinstance(value, Tensor):
            return []
        axes = self.axes(node)
        return masks_of(self.dims, self.keep, axes, value.shape) if type(axes) is tuple else []

    def seen(self, node: fx.Node, value: Any) -> Any:
        axes = self.axes(node)
        if isinstance(axes, list) and isinstance(value, (tuple, list)):
            return [self._masked(a, v) for a, v in zip(axes, value, strict=True)]
        return self._masked(axes, value, node.op == "call_function" and self._written(node))

    def _written(self, node: fx.Node) -> bool:
        """Something is written to the value later, or to a part or view of it."""
        users = [user for user in node.users if user.args[:1] == (node,)]
        return any(_writes(user) or (name_of(user.target)[1] in _VIEWS and self._written(user)) for user in users)

    def _masked(self, axes: Any, value: Any, written: bool = False) -> Any:
        """``written``: the value is a place to write to, and what it is a part of is to see it."""
        if type(axes) is not tuple or not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        for i, mask in masks_of(self.dims, self.keep, axes, value.shape):
            shape = [1] * value.dim()
            shape[i] = -1
            if written:
                value.masked_fill_(~mask.view(shape), 0)
            else:
                value = torch.where(mask.view(shape), value, torch.zeros((), dtype=value.dtype))
        return value

    def special(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = RUNNERS.get(name_of(node.target)[1])
        if run is None:
            return None
        sources = [*node.args]
        masks = [dict(self.masks(s, a)) for s, a in zip(sources, args, strict=True)]
        return run(node.target, args, kwargs, masks) if any(masks) else None


_VIEWS = frozenset(f"aten.{name}" for name in "slice select transpose permute unsqueeze squeeze narrow view expand".split())


def _writes(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def masks_of(dims: Dims, keep: Keep, axes: Iterable[Any], shape: Sequence[int]) -> Masks:
    """(axis number, which positions stay) for the axes of a value of this shape that lose units."""
    out: Masks = []
    for i, axis in enumerate(axes):
        if shape[i] <= 1:
            continue
        if dims.size(axis) == shape[i]:
            mask = keep.mask(axis)
            if mask is not None:
                out.append((i, torch.from_numpy(mask)))
        else:
            out += [(i, m) for m in _symbolic(keep, axis, shape[i])]
    return out


def _symbolic(keep: Keep, axis: Any, size: int) -> list[Tensor]:
    """A product of one run-time size and stored factors before or behind it."""
    parts = factors(axis)
    known = 1
    for part in parts:
        known *= part.size if part.size < _SYMBOLIC else 1
    mask, free = torch.ones(1, dtype=torch.bool), True
    for part in parts:
        if part.size >= _SYMBOLIC:
            mine = torch.ones(size // known if free else 1, dtype=torch.bool)
            free = False
        else:
            got = keep.mask(part)
            mine = torch.ones(part.size, dtype=torch.bool) if got is None else torch.from_numpy(got)
        mask = (mask[:, None] & mine[None, :]).reshape(-1)
    return [] if bool(mask.all()) or mask.numel() != size else [mask]


# ---------------------------------------------------------------- programs


class _Flat:
    """A program's flat graph in ``dtype`` with what is attached to it as modules, and the axes of every node in an analysis."""

    def __init__(self, program: Program, dims: Dims, tensors: Tensors, dtype: torch.dtype) -> None:
        self.program, self.tensors, self.dtype = program, tensors, dtype
        self.graph = flatten(program.graph, program.aliases)
        retarget_graph(self.graph, dtype=dtype, device=torch.device("cpu"))
        by_ref: dict[NodeRef, Any] = {}
        named: dict[str, Any] = {}
        for node in dims.graph.nodes:
            if node.op != "output" and node in dims.values:
                by_ref.update(dict.fromkeys(node.meta["refs"], dims.values[node]))
                if node.op == "get_attr":
                    named[program.aliases.get(str(node.target), str(node.target))] = dims.values[node]
        self._axes: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                self._axes[node] = named.get(str(node.target))
            elif node.op == "call_module" and isinstance(getattr(node.meta["module"], "edits", None), int):
                self._axes[node] = self._axes.get(node.args[node.meta["module"].edits])  # type: ignore[arg-type]
            elif node.op != "output":
                self._axes[node] = next((by_ref[r] for r in node.meta["refs"] if r in by_ref), None)
        self._modules: dict[str, nn.Module] = {}

    def axes(self, node: fx.Node) -> Any:
        return self._axes[node]

    def read(self, name: str) -> Tensor:
        keep = is_small(self.program)
        value = self.tensors.of(self.program, name) if keep else self.tensors.fresh(self.program, name, {})
        return value.to(self.dtype) if value.is_floating_point() else value

    def module(self, node: fx.Node, read: Callable[[str], Tensor] | None = None) -> nn.Module:
        """The module that an opaque node calls, with the tensors that ``read`` gives (None: the program's)."""
        read = read or self.read
        path = str(node.target)
        if path not in self._modules:
            made = deepcopy(node.meta["module"]).eval()
            for inner, module in made.named_modules():
                prefix = ".".join(p for p in (path, inner) if p)
                for leaf, old in module._parameters.items():
                    if old is not None:
                        module._parameters[leaf] = nn.Parameter(read(f"{prefix}.{leaf}"), requires_grad=False)
                for leaf, old in module._buffers.items():
                    if old is not None:
                        module._buffers[leaf] = read(f"{prefix}.{leaf}")
            self._modules[path] = made
        return self._modules[path]


def floats(out: Any) -> list[Tensor]:
    """The floating tensors of a (nested) result, in order."""
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    return [t for item in out for t in floats(item)] if isinstance(out, (tuple, list)) else []


def masked(before: Program, group: Group, tensors: Tensors, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Floating outputs of the program before the cut under masked execution in ``dtype``, without the removed units."""
    flat = _Flat(before, group.dims, tensors, dtype)
    run = MaskedRun(flat.graph, flat.read, group.dims, group.keep, flat.axes, flat.module)
    return _selected(flat, group, run(inputs))


def zeroed(
    before: Program, group: Group, members: Iterable[Member], tensors: Tensors, inputs: Sequence[Tensor], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """Floating outputs of the program before the cut with the removed slices of all ``members`` zero, without the removed units."""
    flat = _Flat(before, group.dims, tensors, dtype)
    read = without(members, flat.read, before.aliases)
    return _selected(flat, group, FlatRun(flat.graph, read, lambda node: flat.module(node, read))(inputs))


def without(members: Iterable[Member], read: Callable[[str], Tensor], aliases: Mapping[str, str] | None = None) -> Callable[[str], Tensor]:
    """``read`` with the removed slices of ``members`` zero; ``aliases`` maps further names of tensors to their first."""
    gone: dict[str, list[Member]] = {}
    for member in members:
        gone.setdefault(member.parameter, []).append(member)

    def zeroing(name: str) -> Tensor:
        value = read(name)
        mine = gone.get((aliases or {}).get(name, name), ())
        if mine and value.is_floating_point():
            value = value.detach().clone()
            for m in mine:
                for a, b in m.removed:
                    value.narrow(m.axis, a, b - a).zero_()
        return value

    return zeroing


def _selected(flat: _Flat, group: Group, out: Any) -> list[Tensor]:
    values = flat.graph.output_node().args[0]
    nodes = list(values) if isinstance(values, (tuple, list)) else [values]
    results = list(out) if isinstance(out, (tuple, list)) else [out]
    kept = []
    for node, tensor in zip(nodes, results, strict=True):
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            kept.append(selected(group, flat.axes(node), tensor) if isinstance(node, fx.Node) else tensor)
    return kept


def selected(group: Group, axes: Any, tensor: Tensor) -> Tensor:
    """A value of the program before without the units that the group removes."""
    for i, mask in masks_of(group.dims, group.keep, axes or (), tensor.shape):
        tensor = tensor.index_select(i, mask.nonzero().flatten())
    return tensor


def cut_inputs(group: Group, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Flat inputs of the program before as the program after takes them: caches lose their removed heads."""
    places = [n for n in group.dims.graph.nodes if n.op == "placeholder"]
    return [selected(group, group.dims.axes(n), t) for n, t in zip(places, inputs, strict=True)]


def masked_claim(before: Program, group: Group, after: Program, span: Span = NOWHERE) -> Claim:
    """The claim that the cut equals the original with the removed units masked.

    ``before`` is a copy of the program that was cut (``program.copy()`` in front of the cut), ``group`` what was cut of it; ``after`` is read
    when the claim is measured and must not change any more.
    """
    run = outputs_of(after)
    return Claim(
        "removed = masked", before, lambda tensors, inputs: masked(before, group, tensors, inputs),
        lambda tensors, inputs: run(tensors, cut_inputs(group, inputs)), span=span,
    )  # fmt: skip
