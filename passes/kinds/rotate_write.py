"""Writing a model in the bases of its stream: norms without gains, shortcuts, and the maps around every place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery.core.site import NodeRef
from surgery.model.cut import cut
from surgery.model.cut_attached import Around, Follow
from surgery.model.modules import register_module
from surgery.model.program import Origin, Program
from surgery.model.weights import Apply, Expr, cast, select
from surgery.passes.kinds import attach
from surgery.passes.kinds.rotate_find import Linear, Norm, Position, Stream
from surgery.passes.operation import Resolved

MODULE_TAG = "surgery.shortcut"


class ShortcutModule(nn.Module):
    """The step of the stream from one basis to the next: ``x W^T`` with ``W [d', d']``, on the shortcut of a residual addition.

    It counts as something on top of the model (``edits``): analyses see the stream pass through, so a later cut of its width goes on.
    """

    weight: nn.Parameter

    def __init__(self, features: int) -> None:
        super().__init__()
        self.edits = 0
        self.register_parameter("weight", nn.Parameter(torch.empty(features, features)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def expand_flat(self, flat: Any, args: Any, kwargs: Any, spec: Any) -> Any:
        return flat.call(torch.ops.aten.linear.default, (args[0], flat.own(self, "weight"), None), spec)

    def follow(self, around: Around) -> Follow | str:
        """Loses the features on both sides that the stream loses."""
        kept = around.inputs[0][-1] if around.inputs and around.inputs[0] else None
        mask = None if kept is None else np.asarray(kept)
        return Follow(None, {"weight": (mask, mask)})

    def module_config(self) -> dict[str, Any]:
        return {"features": self.weight.shape[0]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ShortcutModule:
        return cls(int(config["features"]))


register_module(MODULE_TAG, ShortcutModule)


def rewrite(program: Program, stream: Stream, bases: list[Expr], keep: int, op: Resolved) -> int:
    """Write the model in the first ``keep`` columns of ``bases``; returns the number of parameters that are new."""
    old = dict(program.weights)
    first = stream.positions[0].writers[0]
    if keep < stream.width:
        cut(program, program.dims.coupled(first.weight, first.axis, range(keep, stream.width)), op.origin)
    work = Rewriting(program, stream, old, [select(b, 1, ((0, keep),)) for b in bases], keep, op)
    for position in stream.positions:
        work.norm(position.norm)
    added = sum(work.shortcut(i) for i in range(1, len(stream.positions)))
    added += sum(work.position(i) for i in range(len(stream.positions)))
    for module in program.graph.modules():
        if isinstance(module, fx.GraphModule):
            attach.recompile_later(module)
    program.touch()
    return added


@dataclass
class Rewriting:
    """One rewriting of a program. ``old`` are the weights before it, ``bases`` those of the places, ``[d, d']``."""

    program: Program
    stream: Stream
    old: dict[str, Expr]
    bases: list[Expr]
    keep: int
    op: Resolved

    @property
    def scale(self) -> float:
        """A norm over ``d'`` features divides by their number, one over ``d`` by that: the maps behind it take the difference."""
        return math.sqrt(self.stream.width / self.keep)

    @property
    def origin(self) -> Origin:
        return self.op.origin

    def function(self, name: str) -> str:
        return f"{self.op.verb}/{self.op.method.name}:{name}"

    def write(self, name: str, expr: Expr) -> None:
        dtype = self.old[name].dtype if name in self.old else expr.dtype
        self.program.weights[name] = cast(expr, dtype)
        self.program.journal.record(name, self.origin)

    def turn(self, linear: Linear, name: str, axis: int, basis: Expr, gain: str = "", *, writes: bool) -> None:
        source = self.old[name]
        shape = list(source.shape)
        shape[axis] = self.keep
        params: tuple[tuple[str, Any], ...] = (("axis", axis),)
        if writes:
            params += (("centre", True),) if self.stream.centred else ()
        else:
            params += (("scale", self.scale),)
        args = (source, basis, *((self.old[gain],) if gain else ()))
        self.write(name, Apply(tuple(shape), source.dtype, self.function("turned"), args, params))

    def position(self, i: int) -> int:
        """The maps around one place; returns the number of new parameters."""
        place, basis, added = self.stream.positions[i], self.bases[i], 0
        for writer in place.writers:
            self.turn(writer, writer.weight, writer.axis, basis, writes=True)
            if writer.bias:
                self.turn(writer, writer.bias, 0, basis, writes=True)
        for reader in place.readers:
            self.turn(reader, reader.weight, reader.axis, basis, place.norm.gain, writes=False)
            added += self.shift(reader, place.norm) if place.norm.shift else 0
        return added + (self.restore(place, basis) if place.restored else 0)

    def shift(self, reader: Linear, norm: Norm) -> int:
        """What the norm adds goes into the bias behind; one is made where there is none."""
        source = self.old[reader.weight]
        out = source.shape[1 - reader.axis]
        name = reader.bias or f"{reader.module}.bias"
        args = (source, self.old[norm.shift], *((self.old[reader.bias],) if reader.bias else ()))
        expr = Apply((out,), source.dtype, self.function("shifted"), args, (("axis", reader.axis),))
        self.write(name, expr)
        if reader.bias:
            return 0
        module = self.program.module(reader.module)
        self.new_parameter(module, "bias", (out,), module.weight, name, reader.weight)
        return out

    def new_parameter(self, module: nn.Module, leaf: str, shape: tuple[int, ...], like: Tensor, name: str, frozen_as: str) -> None:
        module.register_parameter(leaf, nn.Parameter(torch.empty(shape, dtype=like.dtype, device="meta"), requires_grad=like.requires_grad))
        if frozen_as in self.program.frozen:
            self.program.frozen.add(name)

    def norm(self, norm: Norm) -> None:
        """A norm without gain in the place of the old one, over the features that are left."""
        ref = norm.site.calls[0]
        gm = self.program.module(ref.graph)
        node = self.program.node(ref)
        path = norm.gain.rpartition(".")[0] or norm.site.path
        made = nn.RMSNorm(self.keep, eps=norm.eps * self.stream.width / self.keep, elementwise_affine=False)
        parent, _, leaf = path.rpartition(".")
        for name in (norm.gain, norm.shift):
            if name:
                attach.drop_tensor(self.program, name)
        setattr(self.program.module(parent), leaf, made)
        if node.op == "call_module":
            return
        source = self._local(norm.source, ref.graph, gm)
        inside = _between(source, node)
        target = attach.relative(path, ref.graph)
        assert target is not None  # a norm stands in the graph that calls it
        with gm.graph.inserting_before(node):
            new = gm.graph.create_node("call_module", target, (source,), name=target.replace(".", "_"))
        new.meta.update(attach.spec_of(node))
        node.replace_all_uses_with(new)
        for gone in reversed([n for n in gm.graph.nodes if n in inside]):
            if not gone.users:
                gm.graph.erase_node(gone)

    def _local(self, value: fx.Node, graph: str, gm: fx.GraphModule) -> fx.Node:
        """The node that stands for a flat value in one graph of the tree."""
        names = [r.node for r in value.meta["refs"] if r.graph == graph]
        return next(n for n in gm.graph.nodes if n.name == names[-1])

    def shortcut(self, i: int) -> int:
        """The step from place ``i - 1`` to place ``i``; returns its number of parameters."""
        here, there = self.stream.positions[i - 1], self.stream.positions[i]
        assert there.add is not None
        ref = NodeRef(*there.add.meta["origin"])
        gm = self.program.module(ref.graph)
        add = self.program.node(ref)
        value = next(a for a in add.all_input_nodes if NodeRef(ref.graph, a.name) in here.value.meta["refs"])
        path = attach.join(ref.graph, attach.free_name(gm, "shortcut"))
        module = ShortcutModule.__new__(ShortcutModule)
        nn.Module.__init__(module)
        module.edits = 0
        writer = there.writers[0].weight
        like: Any = self.program.graph.get_parameter(writer)
        size = (self.keep, self.keep)
        self.new_parameter(module, "weight", size, like, f"{path}.weight", writer)
        self.program.graph.add_submodule(path, module)
        expr = Apply(size, self.old[writer].dtype, self.function("crossed"), (self.bases[i - 1], self.bases[i]), ())
        self.write(f"{path}.weight", expr)
        target = attach.relative(path, ref.graph)
        assert target is not None
        with gm.graph.inserting_before(add):
            node = gm.graph.create_node("call_module", target, (value,), name=target.replace(".", "_"))
        node.meta.update(attach.spec_of(value))
        add.replace_input_with(value, node)
        self.program.journal.record(NodeRef(ref.graph, node.name), self.origin)
        return self.keep * self.keep

    def restore(self, place: Position, basis: Expr) -> int:
        """A normed value that leaves the model goes back to the model's own features."""
        norm, d = place.norm, self.stream.width
        ref = norm.site.calls[0]
        gm = self.program.module(ref.graph)
        path = norm.gain.rpartition(".")[0] or norm.site.path
        target = attach.relative(path, ref.graph)
        value = next(n for n in gm.graph.nodes if n.op == "call_module" and str(n.target) == target)
        name = attach.join(ref.graph, attach.free_name(gm, "restore"))
        like: Any = self.program.graph.get_parameter((place.readers or place.writers)[0].weight)
        module = nn.Linear(self.keep, d, bias=bool(norm.shift), device="meta", dtype=like.dtype)
        self.program.graph.add_submodule(name, module)
        frozen = place.writers[0].weight
        self.new_parameter(module, "weight", (d, self.keep), like, f"{name}.weight", frozen)
        gain = (self.old[norm.gain],) if norm.gain else ()
        dtype = self.old[place.writers[0].weight].dtype
        self.write(f"{name}.weight", Apply((d, self.keep), dtype, self.function("restored"), (basis, *gain), (("scale", self.scale),)))
        if norm.shift:
            self.new_parameter(module, "bias", (d,), like, f"{name}.bias", frozen)
            self.write(f"{name}.bias", cast(self.old[norm.shift], dtype))
        output = next(n for n in gm.graph.nodes if n.op == "output")
        local = attach.relative(name, ref.graph)
        assert local is not None
        with gm.graph.inserting_after(value):
            node = gm.graph.create_node("call_module", local, (value,), name=local.replace(".", "_"))
        spec = value.meta.get("spec")
        node.meta["spec"] = type(spec)(spec.kind, spec.dtype, (*spec.shape[:-1], d))  # type: ignore[union-attr,misc]
        output.replace_input_with(value, node)
        return d * self.keep + (d if norm.shift else 0)


def _between(source: fx.Node, node: fx.Node) -> set[fx.Node]:
    """``node`` and what it depends on behind ``source``."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in found or current is source or current.op == "placeholder":
            continue
        found.add(current)
        stack.extend(current.all_input_nodes)
    return found
