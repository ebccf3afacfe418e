"""Kind ``rotate``: the residual stream of a pre-norm model is turned into a basis of its own at every place, and its tail cut off.

With the gains of its norms moved into the maps behind them, the mean (for layer norms) into everything that writes the stream, and a
matrix ``Q_i^T Q_{i+1}`` on every shortcut, the model computes the same in any orthogonal bases ``Q_i``: what is measured. The cut is then
the cut of one class of units, and the weights are written anew in the bases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from surgery.core.diagnostics import fail
from surgery.core.method import Method
from surgery.model import masked
from surgery.model.claims import Claim
from surgery.model.program import Program
from surgery.model.running import outputs_of
from surgery.model.spill import spilled
from surgery.model.weights import Expr, Init, cast
from surgery.passes.expect import parameter_sizes
from surgery.passes.kinds import attach
from surgery.passes.kinds.calls import calls_of, ties_outside, weight_names
from surgery.passes.kinds.parts import size_of, untie
from surgery.passes.kinds.rotate_find import Misfit, Stream, find_stream
from surgery.passes.kinds.rotate_write import ShortcutModule, rewrite
from surgery.passes.operation import Resolved, SiteChange


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
        whole = _widened(program)
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
    return [spilled(method.basis(g).float()) for g in grams]


def _widened(program: Program) -> Program:
    """A copy that rounds nothing to 16 bits: the claim is about the rotation, not about how turned weights are stored."""
    copy = program.copy()
    for name, expr in copy.weights.items():
        if expr.dtype in ("bfloat16", "float16"):
            copy.weights[name] = cast(expr, "float32")
    return copy


def _claim(before: Program, whole: Program, op: Resolved) -> Claim:
    return Claim("rotated = as it was, before the cut", before, outputs_of(before), outputs_of(whole), tolerance=1e-4, span=op.origin.span)
