"""Kind ``rotate``: the residual stream of a pre-norm model is turned into a basis of its own at every place, and its tail cut off.

With the gains of its norms moved into the maps behind them, the mean (for layer norms) into everything that writes the stream, and a
matrix ``Q_i^T Q_{i+1}`` on every shortcut, the model computes the same in any orthogonal bases ``Q_i``: what is measured. The cut is then
the cut of one class of units, and the weights are written anew in the bases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery.core.diagnostics import fail
from surgery.core.method import Method
from surgery.core.site import NodeRef
from surgery.model import masked
from surgery.model.claims import Claim
from surgery.model.cut import cut
from surgery.model.cut_attached import Around, Follow
from surgery.model.live import live_root
from surgery.model.modules import register_module
from surgery.model.program import Origin, Program
from surgery.model.realise import held
from surgery.model.weights import Apply, Expr, Init, cast, select
from surgery.passes.expect import parameter_sizes
from surgery.passes.kinds import attach
from surgery.passes.kinds.calls import calls_of, ties_outside, weight_names
from surgery.passes.kinds.parts import size_of, untie
from surgery.passes.kinds.rotate_find import Linear, Misfit, Norm, Position, Stream, find_stream
from surgery.passes.operation import Resolved, SiteChange

MODULE_TAG = "surgery.shortcut"


@dataclass(frozen=True)
class RotateMethod(Method):
    """Base of the methods that give the residual stream other bases."""

    kind: ClassVar[str] = "rotate"
    fold_class: ClassVar[str] = "slice"
    identity: ClassVar[str] = "changed"
    needs_sites: ClassVar[bool] = False

    def width(self, full: int) -> int:
        """How many features of the stream stay, of ``full``."""
        raise NotImplementedError

    def basis(self, gram: Tensor) -> Tensor:
        """The orthogonal basis ``[d, d]`` (float64, best columns first) of a place whose values have ``gram = X^T X``."""
        raise NotImplementedError


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


# ------------------------------------------------------------------ functions of weights (see ``registry.function``)


def turned(
    cls: type[RotateMethod], value: Tensor, basis: Tensor, *gain: Tensor, axis: int, centre: bool = False, scale: float = 1.0
) -> Tensor:
    """A tensor with features of the stream on ``axis``, in the basis ``[d, d']``: ``scale (value * gain) basis`` along that axis.

    With ``centre`` the mean over the features is taken away first (what writes the stream of a layer-norm model). Float64.
    """
    x = value.double().movedim(axis, -1)
    if gain:
        x = x * gain[0].double()
    if centre:
        x = x - x.mean(-1, keepdim=True)
    return (x @ basis.double() * scale).movedim(-1, axis).contiguous()


def shifted(cls: type[RotateMethod], value: Tensor, shift: Tensor, *bias: Tensor, axis: int) -> Tensor:
    """The bias of a map that reads a norm whose ``shift`` moves into it: ``bias + value shift`` along ``axis``."""
    out = value.double().movedim(axis, -1) @ shift.double()
    return out + bias[0].double() if bias else out


def crossed(cls: type[RotateMethod], here: Tensor, there: Tensor) -> Tensor:
    """The weight of a shortcut: ``(Q_i^T Q_{i+1})^T``."""
    return there.double().T @ here.double()


def restored(cls: type[RotateMethod], basis: Tensor, *gain: Tensor, scale: float = 1.0) -> Tensor:
    """The map from a normed value in a basis back to the model's own features: ``scale diag(gain) basis``."""
    out = basis.double() * scale
    return out * gain[0].double().unsqueeze(-1) if gain else out


# ------------------------------------------------------------------ apply


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Rotate and cut the stream. Raises S0467 for a model that is not of the form that this needs, S0468 where something that is in the
    way must go first and S0469 when nothing would be left."""
    method, span = op.method, op.origin.span
    assert isinstance(method, RotateMethod)
    before, total = program.copy(), sum(parameter_sizes(program).values())
    _free(program, op)
    try:
        if any(isinstance(m, ShortcutModule) for m in program.graph.modules()):
            raise Misfit("its stream is rotated already")
        stream = find_stream(program)
        notes, copied = _untie(program, stream)
        if copied:
            stream = find_stream(program)
        _suits(program, stream, op)
    except Misfit as why:
        raise fail(
            "S0467", f"{method.name} cannot rotate this model: {why}", span, "asked for here",
            help="it needs a pre-norm model with plain norms, whose blocks are linear maps around attention and feed-forward; `prune width` cuts others",
        ) from None  # fmt: skip
    keep = method.width(stream.width)
    if not 0 < keep <= stream.width:
        raise fail(
            "S0469",
            f"nothing would be left of the {stream.width} features of the stream",
            span,
            "asked for here",
            help="choose a smaller `ratio`",
        )
    bases = _bases(program, op, stream)
    if op.study is not None:
        whole = program.copy()
        rewrite(whole, find_stream(whole), bases, stream.width, op)
        op.claim(_claim(before, whole, op))
    added = copied + rewrite(program, stream, bases, keep, op)
    after = sum(parameter_sizes(program).values())
    note = f"the stream goes from {stream.width} to {keep} features, with a basis at each of {len(stream.positions)} places"
    if op.study is None:
        op.tell("the bases are those of the calibration data, which compile reads")
    left = [n for n in parameter_sizes(program) if n not in program.frozen]
    trainable = sum(parameter_sizes(program)[n] for n in left)
    removed = total + added - after
    stack = next(s for s in before.anatomy.stacks if s.layers)
    return [SiteChange(stack.name, stack.path, (), (stream.width,), (keep,), added, removed, trainable, "; ".join([note, *notes]))]


def _free(program: Program, op: Resolved) -> None:
    """S0468 for adapters and masks, which belong to the features as they are."""
    if program.attachments:
        a = program.attachments[0]
        raise fail(
            "S0468", f"{a.name} on {a.site.role} was made for the features of the stream as they are", op.origin.span, "rotated here",
            also=[(a.origin.span, "attached here")], help="fold it first, or attach it behind this statement",
        )  # fmt: skip
    hidden = next(iter(masked.masks(program)), "")
    if hidden:
        raise fail(
            "S0468", f"the zeros of `{hidden}` are not zeros in other bases", op.origin.span, "rotated here",
            help="put `prune mask` behind this statement",
        )  # fmt: skip


def _untie(program: Program, stream: Stream) -> tuple[list[str], int]:
    """A table that both writes and reads the stream becomes two. Returns notes for the plan and the parameters that this adds."""
    notes, copied = [], 0
    written = {w.weight for p in stream.positions for w in p.writers}
    both = [r for p in stream.positions for r in p.readers if r.weight in written]
    for reader in both:
        site = next(
            (
                s
                for s in program.anatomy.sites
                if s.op in ("linear", "conv1d") and s.weight and masked.first(program, s.weight) == reader.weight
            ),
            None,
        )
        names = weight_names(program, site) if site is not None and calls_of(program, site) else ()
        if not names or not ties_outside(program, names):
            raise Misfit(f"`{reader.weight}` both reads and writes the stream")
        untie(program, names)
        copied += size_of(program, names[0])
        notes.append(f"{names[0]} is no longer tied, {size_of(program, names[0]):,} parameters more")
    if both:
        program.touch()
    return notes, copied


def _suits(program: Program, stream: Stream, op: Resolved) -> None:
    """Everything that can still be in the way, before anything is changed."""
    maps = [m for p in stream.positions for m in (*p.readers, *p.writers)]
    names = [m.weight for m in maps]
    shared = set(program.aliases.values())
    for name in names:
        if name in shared or names.count(name) > 1:
            raise Misfit(f"`{name}` is used in several places")
    for p in stream.positions:
        for reader in p.readers:
            if p.norm.shift and not reader.bias and not isinstance(attach.parent_module(program, reader.module), nn.Linear):
                raise Misfit(f"`{reader.weight}` has no bias to take what its norm adds")
    group = program.dims.coupled(maps[0].weight, 0 if maps[0].axis == 0 else maps[0].axis, [stream.width - 1])
    if group.refusal:
        raise Misfit(f"its width is fixed: {group.refusal}")
    known = {*names, *(m.bias for m in maps if m.bias), *(n for p in stream.positions for n in (p.norm.gain, p.norm.shift) if n)}
    stray = [m.parameter for m in group.members if m.parameter not in known]
    if stray:
        raise Misfit(f"`{stray[0]}` belongs to the stream too, and neither reads nor writes it in a known way")


def _bases(program: Program, op: Resolved, stream: Stream) -> list[Expr]:
    """One basis ``[d, d]`` for each place, float32; while planning tensors of that shape."""
    method, d = op.method, stream.width
    assert isinstance(method, RotateMethod)
    if op.study is None:
        return [Init((d, d), "float32", "zeros") for _ in stream.positions]
    grams = [torch.zeros(d, d, dtype=torch.float64) for _ in stream.positions]

    def hook(total: Tensor) -> Any:
        def add(value: Tensor, keep: Tensor | None) -> None:
            rows = (value[keep] if keep is not None else value).reshape(-1, d).double()
            if stream.centred:
                rows = rows - rows.mean(-1, keepdim=True)
            total.addmm_(rows.T, rows)

        return add

    op.study.observe(
        program,
        op.data,
        outputs={p.ref: hook(g) for p, g in zip(stream.positions, grams, strict=True)},
        text=f"reading the stream for {op.name}",
    )
    return [held(method.basis(g).float()) for g in grams]


def _claim(before: Program, whole: Program, op: Resolved) -> Claim:
    def run(program: Program) -> Any:
        def outputs(tensors: Any, flat: Any) -> list[Tensor]:
            root = live_root(program, tensors, dtype=torch.float32).eval()
            with torch.no_grad():
                got = root(*flat)
            got = got if isinstance(got, tuple | list) else (got,)
            return [t for t in got if isinstance(t, Tensor) and t.is_floating_point()]

        return outputs

    return Claim("rotated = as it was, before the cut", before, run(before), run(whole), tolerance=1e-4, span=op.origin.span)


# ------------------------------------------------------------------ rewriting


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
