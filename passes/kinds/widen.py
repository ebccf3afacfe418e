"""Folding a parallel bottleneck into the feed-forward block beside it, by making that block wider.

With the same input and the same activation ``f``, ``W2 f(W1 x + b1) + b2 + s (U f(D x + d) + u)`` is a feed-forward block with
``W1' = [W1; D]``, ``b1' = [b1; d]``, ``W2' = [W2, s U]``, ``b2' = b2 + s u``: exact. A gated block ``W2 (f(G x + g) * (W1 x + b1))`` takes
the branch as units whose gate is ``f(D x + d)`` and whose value is 1: ``G' = [G; D]``, ``W1' = [W1; 0]``, ``b1' = [b1; 1]``. Where the model
stores gate and value as one weight, each half grows in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from surgery.core.site import Site
from surgery.model import masked
from surgery.model.program import Attachment, Program, ValueSpec
from surgery.model.weights import Add, Apply, Concat, Expr, Init, Reshape, Scale, cast, select
from surgery.passes.kinds import attach
from surgery.passes.kinds.calls import calls_of, operand
from surgery.passes.kinds.widen_path import Path, computes, path_of, plain_moves, resize
from surgery.passes.operation import Resolved


@dataclass(frozen=True)
class Block:
    """A feed-forward block in one graph: its projections, their calls and what stands between them."""

    graph: str
    up: Site
    gate: Site | None
    down: Site
    path: Path

    @property
    def fused(self) -> bool:
        return self.gate is not None and self.gate.weight == self.up.weight


def widen(program: Program, a: Attachment, op: Resolved) -> str:
    """Fold ``a`` by widening; returns why that is not possible (then nothing was changed), else an empty text."""
    module = program.module(a.module)
    branch: dict[str, Any] | None = getattr(module.method, "branch", lambda site: None)(module.site)
    if module.site.place != "beside" or branch is None:
        return f"only a plain {a.method.name} beside a feed-forward block widens that block"
    block = _block(program, a)
    if isinstance(block, str):
        return block
    node = program.node(a.node)
    first, last = block.path.firsts[0], block.path.last
    if node.graph is not first.graph or any(plain_moves(node.args[0]) is not plain_moves(operand(f)) for f in block.path.firsts):
        return "it does not see the same input as the block"
    if not computes(block.path, branch["activation"], block.gate is not None):
        return f"its activation {branch['activation']} is not the block's"
    if not _same_output(node, last, program.module(block.graph)):
        return "something stands between the block and the place where it adds"
    _Widening(program, a, op, block, branch).run()
    return ""


def _block(program: Program, a: Attachment) -> Block | str:
    parts = {s.role.removeprefix(a.site.role + "."): s for s in program.anatomy.sites if s.role.startswith(a.site.role + ".")}
    up, gate, down = parts.get("up"), parts.get("gate"), parts.get("down")
    if up is None or down is None:
        return "it is not beside a feed-forward block (up, activation, down)"
    sites = [s for s in (up, gate, down) if s is not None]
    if any(s.op not in ("linear", "conv1d") or len(s.calls) != 1 for s in sites):
        return "the block's projections are not linear maps that are used once"
    if any(program.aliases.get(s.weight, s.weight) in program.aliases.values() for s in sites):
        return "the block's weights are shared with other parts, which would grow, too"
    if any(other.site.weight in {s.weight for s in sites} for other in program.attachments if other.site.weight):
        return "other adapters stand on the block's projections; fold them first"
    if down.rows or not _whole(program, up, gate):
        return "the block's projections are parts of larger weights"
    calls = [calls_of(program, s)[0] for s in sites]
    graph = calls[0][0]
    if any(g != graph for g, _ in calls):
        return "the block's projections are used in different graphs"
    firsts = [node for _, node in calls[:-1]]
    order = [r[0][0] if (r := s.rows) else 0 for s in sites[:-1]]
    path = path_of(program.module(graph), firsts, calls[-1][1], gate_first=len(order) == 2 and order[1] < order[0])
    return path if isinstance(path, str) else Block(graph, up, gate, down, path)


def _whole(program: Program, up: Site, gate: Site | None) -> bool:
    """Up and gate have weights of their own, or are the two halves of one."""
    if not up.rows:
        return gate is None or not gate.rows
    if gate is None or gate.weight != up.weight or len(up.rows) != 1 or len(gate.rows) != 1:
        return False
    (a, b), (c, d) = sorted((up.rows[0], gate.rows[0]))
    size = program.weights[program.aliases.get(up.weight, up.weight)].shape[up.out_axis]
    return (a, b, d) == (0, c, size) and b - a == d - c


def _same_output(node: fx.Node, last: fx.Node, gm: fx.GraphModule) -> bool:
    """Whether the value that ``node`` edits is the down projection's output, dropout, changes of shape and other insertions apart."""
    value = node.args[1]
    while isinstance(value, fx.Node) and value is not last:
        moved = plain_moves(value, 1)
        if moved is not value:
            value = moved
            continue
        if value.op != "call_module":
            return False
        module = gm.get_submodule(str(value.target))
        if isinstance(module, (nn.Dropout, nn.Identity)):
            value = value.args[0]
        elif getattr(module, "edits", None) == 1:
            value = value.args[1]
        else:
            return False
    return value is last


class _Widening:
    """The new weights, modules and sizes of one block."""

    def __init__(self, program: Program, a: Attachment, op: Resolved, block: Block, branch: dict[str, Any]) -> None:
        self.program, self.a, self.op, self.block, self.branch = program, a, op, block, branch
        self.width: int = branch["width"]

    def run(self) -> None:
        program, block, weights = self.program, self.block, self.program.weights
        up, gate, down = block.up, block.gate, block.down
        d, d_bias = self.own("down_weight"), self.own("down_bias")
        hidden = d.shape[1]
        zero, one = Init((self.width, hidden), d.dtype, "zeros"), Init((self.width,), d.dtype, "ones")
        if gate is None:
            self.grow(up, [(up, d, d_bias)])
        else:
            pieces = [(gate, d, d_bias), (up, zero, one)]
            if block.fused:
                self.grow(up, sorted(pieces, key=lambda p: p[0].rows))
            else:
                for piece in pieces:
                    self.grow(piece[0], [piece])
        shift = self.scaled(self.own("up_bias"))
        self.extend(down.weight, down.in_axis, [(None, self.scaled(self.own("up_weight")), 1)])
        bias = bias_of(down)
        old = weights.get(bias)
        like = weights[down.weight].dtype
        self.put(bias, cast(shift, like) if old is None else Add(shift.shape, old.dtype, (old, cast(shift, old.dtype))))
        for site in (up, gate, down):
            if site is not None:
                resize_module(program, site)
        attach.detach(program, self.a)
        resize(program.module(block.graph), block.path, self.width)
        attach.recompile_later(program.module(block.graph))
        program.touch()

    def own(self, part: str) -> Expr:
        """A tensor of the branch."""
        return self.program.weights[attach.join(self.a.module, part)]

    def scaled(self, expr: Expr) -> Expr:
        learned = self.program.weights.get(attach.join(self.a.module, "scale"))
        if learned is not None:
            return Apply(expr.shape, expr.dtype, f"{self.a.method.verb}/{self.a.method.name}:times", (expr, learned))
        return expr if self.branch["scale"] == 1 else Scale(expr.shape, expr.dtype, expr, float(self.branch["scale"]))

    def put(self, name: str, expr: Expr) -> None:
        if name not in self.program.weights:
            self.program.frozen.add(name)
        self.program.weights[name] = expr
        self.program.journal.fold(name, self.a.origin, self.op.origin)

    def grow(self, site: Site, pieces: list[tuple[Site, Expr, Expr]]) -> None:
        """More outputs for a projection, behind each of the pieces that its weight consists of."""
        weights = self.program.weights
        size = weights[site.weight].shape[site.out_axis]
        name = bias_of(site)
        old = weights.get(name, Init((size,), weights[site.weight].dtype, "zeros"))
        self.extend(site.weight, site.out_axis, [(p.rows[0] if p.rows else None, more, 0) for p, more, _ in pieces])
        parts = []
        for p, _, more in pieces:
            parts += [old if not p.rows else select(old, 0, (p.rows[0],)), cast(more, old.dtype)]
        self.put(name, _concat(parts, 0, old.dtype))

    def extend(self, name: str, axis: int, pieces: list[tuple[tuple[int, int] | None, Expr, int]]) -> None:
        """A weight with further rows or columns on ``axis`` behind each piece: its rows (None: all), what is added and on which axis that
        is counted in ``more`` (the other one is transposed into place)."""

        def made(source: Expr, extra: Callable[[Expr], Expr]) -> Expr:
            parts: list[Expr] = []
            for rows, more, own in pieces:
                laid = more if own == axis else Reshape((more.shape[1], more.shape[0]), more.dtype, more, (1, 0))
                parts += [source if rows is None else select(source, axis, (rows,)), extra(laid)]
            return _concat(parts, axis, source.dtype)

        dtype = self.program.weights[name].dtype
        self.put(name, made(self.program.weights[name], lambda e: cast(e, dtype)))
        masked.reshape_mask(self.program, name, lambda keep: made(keep, lambda e: Init(e.shape, "bool", "ones")))


def bias_of(site: Site) -> str:
    """The name of a projection's bias, which may not be there yet."""
    return site.bias or site.weight[: -len("weight")] + "bias"


def _concat(parts: list[Expr], axis: int, dtype: str) -> Expr:
    shape = list(parts[0].shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    return Concat(tuple(shape), dtype, tuple(parts), axis)


def resize_module(program: Program, site: Site) -> None:
    """Give the leaf (or the holder of the parameters) of a projection tensors of the sizes that its weights have now."""
    path = site.weight.rpartition(".")[0]
    parent, _, leaf = path.rpartition(".")
    old = program.module(path)
    shape, bias = program.weights[site.weight].shape, bias_of(site)
    if isinstance(old, nn.Linear):
        made = nn.Linear(shape[1], shape[0], bias=True, device="meta", dtype=old.weight.dtype)
        made.train(old.training)
        for name, child in old.named_children():
            made.add_module(name, child)
        for parameter in made.parameters():
            parameter.requires_grad_(old.weight.requires_grad)
        setattr(program.module(parent), leaf, made)
        return
    for name in (site.weight, bias):
        holder, _, tensor = name.rpartition(".")
        before = getattr(program.module(holder), tensor)
        empty = torch.empty(program.weights[name].shape, dtype=before.dtype, device="meta")
        setattr(program.module(holder), tensor, nn.Parameter(empty, requires_grad=before.requires_grad))
    for graph in attach.prefixes(site.weight):
        gm = program.module(graph)
        if isinstance(gm, fx.GraphModule):
            for name in (site.weight, bias):
                for node in gm.graph.find_nodes(op="get_attr", target=attach.relative(name, graph)):
                    node.meta["spec"] = ValueSpec("tensor", node.meta["spec"].dtype, tuple(program.weights[name].shape))
