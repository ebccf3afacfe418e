"""Gradients of parameters, streamed backwards through the parts of a program.

The forward pass keeps the values between the parts; then each part, last first, gets its weights, runs again on its inputs and is
differentiated, sample by sample. Beside the values between parts, memory holds one part's weights, its activations for one batch,
and gradients of its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from surgery.model.data import Batch
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.model.study_loss import Objective
from surgery.model.study_run import Part, Runner, check_finite, fit, in_order, lanes, needed, root_graph, spared, writes

Leaf = tuple[fx.Node, int]
"""One tensor of a root value: the value's node and which of its tensors."""


class Backward:
    """One streamed gradient. ``names`` are first names of the parameters wanted."""

    def __init__(
        self, program: Program, tensors: Tensors, batches: list[Batch], names: list[str], dtype: torch.dtype, objective: Objective
    ) -> None:
        self.program, self.tensors, self.batches, self.dtype, self.objective = program, tensors, batches, dtype, objective
        self.graph, _ = root_graph(program, dtype)
        _functional(self.graph)
        self.output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        live = needed(self.graph, [self.output])
        self.order = [n for n in self.graph.nodes if n in live]
        self.wanted = set(names)
        self.reads = {n: [p for p in names_in(program, n) if p in self.wanted] for n in self.order}
        self.active = self._active()
        self.first_use: dict[str, fx.Node] = {}
        for node in reversed(self.order):
            for name in self.reads[node]:
                self.first_use[name] = node
        self.values: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self.grads: list[dict[Leaf, Tensor]] = [{} for _ in batches]
        self.memo: dict[str, Any] = {}
        self.lanes = lanes()

    def _active(self) -> set[fx.Node]:
        """What depends on a wanted parameter."""
        out: set[fx.Node] = set()
        for node in self.order:
            if self.reads[node] or any(n in out for n in node.all_input_nodes):
                out.add(node)
        return out

    # ------------------------------------------------------------ forwards

    def forward(self, progress: Any) -> None:
        """All values that a part on the way of a gradient takes; the rest is dropped after its last use."""
        kept = {i for n in self.order if n in self.active for i in n.all_input_nodes}
        last: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self.order):
            gone = [n for n in dict.fromkeys([*node.all_input_nodes, node]) if n not in seen]
            seen.update(gone)
            last[node] = [n for n in gone if n not in kept]
        places = {n: i for i, n in enumerate(n for n in self.graph.nodes if n.op == "placeholder")}
        for node in self.order:
            if node.op == "output":
                break
            part = self._part(node, trained=False)
            spare = node.op == "call_module" and node in self.active and part.writes  # it runs again on the way back

            def work(i: int, node: fx.Node = node, part: Any = part, spare: bool = spare) -> Any:
                if node.op == "placeholder":
                    return self.batches[i].inputs[places[node]]
                with torch.no_grad():
                    args, kwargs = _given(node, self.values[i].__getitem__)
                    if spare:
                        args, kwargs = spared(args), spared(kwargs)
                    return self._call(node, part, args, kwargs, self.batches[i])

            for row, value in zip(self.values, in_order(work, len(self.batches), self._lanes(node)), strict=True):
                row[node] = value
                for gone in last[node]:
                    row.pop(gone, None)
            if node.op == "call_module":
                part.release()
                progress()

    def _lanes(self, node: fx.Node) -> int:
        return self.lanes if node.op == "call_module" else 1

    def _part(self, node: fx.Node, *, trained: bool) -> Any:
        if node.op == "call_module":
            return Part(self.program, self.tensors, str(node.target), self.dtype, self.reads[node] if trained else ())
        if node.op == "get_attr":
            return self._parameter(str(node.target))
        return None

    def _parameter(self, target: str) -> Tensor:
        name = self.program.aliases.get(target, target)
        holder, _, leaf = target.rpartition(".")
        owner = self.program.graph.get_submodule(holder)
        recorded = getattr(owner, leaf)
        value = fit(self.tensors.fresh(self.program, name, self.memo), recorded.dtype, self.dtype)
        if leaf in owner._parameters:
            check_finite(name, value)
        return value

    def _call(self, node: fx.Node, part: Any, args: Any, kwargs: Mapping[str, Any], batch: Batch) -> Any:
        if node.op == "get_attr":
            return part
        if node.op == "call_module":
            return Runner().part(part.module, str(node.target), args, kwargs, batch)
        if writes(node):
            args = (args[0].clone(), *args[1:])  # what was there before is needed when the part before runs again
        return node.target(*args, **kwargs)  # type: ignore[operator]

    # ------------------------------------------------------------ backwards

    def backward(self, progress: Any, scale: float, *, per_sample: bool) -> Iterator[tuple[str, Tensor, int]]:
        """Gradients of ``scale`` times the sum of the samples' losses, each parameter when its first use is behind:
        (name, float64 gradient, -1), or with ``per_sample`` (then a batch is one sample) for each sample (name, gradient, its number)."""
        totals: dict[tuple[str, int], Tensor] = {}
        for node in reversed(self.order):
            if node not in self.active:
                continue
            if node is self.output:
                self._start(scale)
                continue
            part = self._part(node, trained=True)

            def work(i: int, node: fx.Node = node, part: Any = part) -> list[tuple[str, Tensor]]:
                return list(self._one(node, part, i, self.batches[i]))

            for i, found in enumerate(in_order(work, len(self.batches), self._lanes(node))):
                batch = self.batches[i]
                for name, gradient in found:
                    key = (name, batch.first if per_sample else -1)
                    wide = gradient if per_sample else gradient.double()
                    totals[key] = totals[key].add_(wide) if key in totals else (wide.clone() if wide is gradient else wide)
                self.values[i].pop(node, None)
                if per_sample:
                    yield from self._ready(node, totals, batch.first)
            if node.op == "call_module":
                part.release()
                progress()
            if not per_sample:
                yield from self._ready(node, totals, -1)

    def _ready(self, node: fx.Node, totals: dict[tuple[str, int], Tensor], sample: int) -> Iterator[tuple[str, Tensor, int]]:
        for name in self.reads[node]:
            if self.first_use[name] is node:
                total = totals.pop((name, sample), None)
                yield name, torch.zeros(self.program.weights[name].shape, dtype=torch.float64) if total is None else total, sample

    def _start(self, scale: float) -> None:
        """Gradients of the losses with respect to the flat outputs."""
        for row, grads, batch in zip(self.values, self.grads, self.batches, strict=True):
            with torch.enable_grad():
                leaves, inputs = _leaves(self.output, row, self.active)
                out = fx.node.map_arg(self.output.args[0], leaves.__getitem__)
                losses = self.objective.losses(out if isinstance(out, list | tuple) else (out,), batch)  # type: ignore[arg-type]
                losses = [loss for loss in losses if loss.requires_grad]
                if not losses or not inputs:
                    continue
                total = torch.stack([loss.double() for loss in losses]).sum() * scale
                found = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
            _add(grads, inputs, found)

    def _one(self, node: fx.Node, part: Any, i: int, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Backwards through one node for one batch: adds to the gradients of its inputs, gives those of its parameters."""
        grads, row = self.grads[i], self.values[i]
        mine = {k[1]: grads.pop(k) for k in [k for k in grads if k[0] is node]}
        if not mine:
            return
        if node.op == "get_attr":
            name = self.program.aliases.get(str(node.target), str(node.target))
            if name in self.wanted:
                yield name, mine[0]
            return
        with torch.enable_grad():
            leaves, inputs = _leaves(node, row, self.active, copy=node.op == "call_module")
            args, kwargs = _given(node, leaves.__getitem__)
            result = _tensors(self._call(node, part, args, kwargs, batch))
            pairs = [(result[k], g) for k, g in mine.items() if k in result and result[k].requires_grad]
            parameters = {n: part.parameters[n] for n in self.reads[node]} if node.op == "call_module" else {}
            parameters = {n: p for n, p in parameters.items() if p.requires_grad}
            wrt = [*inputs.values(), *parameters.values()]
            if not pairs or not wrt:
                return
            found = torch.autograd.grad([p[0] for p in pairs], wrt, [p[1] for p in pairs], allow_unused=True)
        _add(grads, inputs, found[: len(inputs)])
        for name, gradient in zip(parameters, found[len(inputs) :], strict=True):
            if gradient is not None:
                yield name, gradient


def names_in(program: Program, node: fx.Node) -> tuple[str, ...]:
    """First names of the parameters that a root node reads."""
    path = str(node.target)
    if node.op == "get_attr":
        return (program.aliases.get(path, path),)
    if node.op != "call_module":
        return ()
    names = (f"{path}.{name}" for name, _ in program.graph.get_submodule(path).named_parameters(remove_duplicate=False))
    return tuple(dict.fromkeys(program.aliases.get(n, n) for n in names))


def _functional(graph: fx.Graph) -> None:
    """What reads a value behind an operation that changes it in place reads that operation's result instead."""
    place = {n: i for i, n in enumerate(graph.nodes)}
    for node in graph.nodes:
        if writes(node) and node.args and isinstance(node.args[0], fx.Node):
            at = place[node]
            node.args[0].replace_all_uses_with(node, delete_user_cb=lambda user, at=at: place[user] > at)


def _given(node: fx.Node, value: Any) -> tuple[Any, dict[str, Any]]:
    return fx.node.map_arg(node.args, value), fx.node.map_arg(node.kwargs, value)  # type: ignore[return-value]


def _tensors(value: Any) -> dict[int, Tensor]:
    """The tensors of a root value by their number: a tensor is number 0, those of a tuple count through it."""
    if isinstance(value, Tensor):
        return {0: value}
    if isinstance(value, tuple | list):
        return {i: v for i, v in enumerate(value) if isinstance(v, Tensor)}
    return {}


def _leaves(
    node: fx.Node, row: Mapping[fx.Node, Any], active: set[fx.Node], *, copy: bool = False
) -> tuple[dict[fx.Node, Any], dict[Leaf, Tensor]]:
    """The arguments of a node with floating tensors that gradients flow into as fresh leaves, and those leaves.

    ``copy``: the node gets copies of them, since a layer may change what it is given."""
    values: dict[fx.Node, Any] = {}
    inputs: dict[Leaf, Tensor] = {}
    for source in dict.fromkeys(node.all_input_nodes):
        value = row[source]
        if source not in active:
            values[source] = value
            continue
        fresh: dict[int, Tensor] = {}
        for k, tensor in _tensors(value).items():
            if tensor.is_floating_point():
                inputs[source, k] = tensor.detach().requires_grad_()
                fresh[k] = inputs[source, k].clone() if copy else inputs[source, k]
        if isinstance(value, Tensor):
            values[source] = fresh.get(0, value)
        elif isinstance(value, tuple | list):
            values[source] = type(value)(fresh.get(k, v) for k, v in enumerate(value))
        else:
            values[source] = value
    return values, inputs


def _add(grads: dict[Leaf, Tensor], inputs: Mapping[Leaf, Tensor], found: Any) -> None:
    for leaf, gradient in zip(inputs, found, strict=True):
        if gradient is not None:
            grads[leaf] = grads[leaf] + gradient if leaf in grads else gradient
