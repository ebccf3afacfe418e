"""Rotary position embedding, written as products and concatenations, becomes one operation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse.heads import behind_copies, by_step, called, merge, part
from surgery.backends.fuse.masks import ancestors, subgraph, trials
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView, aten
from surgery.model.threads import one_thread

END = 1 << 40
DEEP = 200
"""Nodes behind a table of angles; more than that, and it is no table."""


@dataclass(frozen=True)
class Turn:
    """``node`` is ``x cos + turned(x) sin``; ``whole`` is what it becomes: itself, or the concatenation with the features that stay."""

    node: fx.Node
    x: fx.Node
    whole: fx.Node
    cos: fx.Node
    sin: fx.Node
    pairs: str


@dataclass
class FuseRotary:
    """Places are ``x * cos + turned(x) * sin`` with the features of ``turned(x)`` exchanged in pairs and half of them negated. That both
    features of a pair have one angle is tested by computing the tables on random inputs."""

    name: str = "rotary"
    doc: str = "rotary position embedding is one operation (com.microsoft RotaryEmbedding)"
    order: int = 200
    targets: frozenset[str] = field(default_factory=lambda: frozenset({ONNX}))

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        memo: dict[fx.Node, str] = {}
        for node in view.calls(aten.add.Tensor):
            turn = _turn(view, node)
            if turn is None:
                continue
            why = _unfit(view, turn, memo)
            if why is not None:
                yield Miss(view.where(node), *why)
                continue
            n, _, w = view.shape(turn.whole)[1:]
            yield Match(node, lambda t=turn: _apply(view, t), f"{n} heads of width {w}")  # type: ignore[misc]


def _turn(view: FuseView, node: fx.Node) -> Turn | None:
    if view.rank(node) != 4 or len(node.args) != 2 or node.kwargs:
        return None
    sides = [behind_copies(a) for a in node.args]
    if not all(called(s, aten.mul.Tensor) and len(s.args) == 2 for s in sides):
        return None
    for plain, turned in (sides, sides[::-1]):
        for value, sin in (turned.args, turned.args[::-1]):
            found = _exchanged(view, value)
            if found is None:
                continue
            x, pairs = found
            for other, cos in (plain.args, plain.args[::-1]):
                if other is x and isinstance(cos, fx.Node) and isinstance(sin, fx.Node):
                    return _widened(view, Turn(node, x, node, cos, sin, pairs))
    return None


def _exchanged(view: FuseView, node: Any) -> tuple[fx.Node, str] | None:
    """``x`` and the kind of pairs, where a value is ``x`` with the features of each pair exchanged and the first then negated."""
    node = behind_copies(node)
    if called(node, aten.cat.default) and _axis(node, 1, 0) in (3, -1):
        pieces, step, kind = node.args[0], 1, "halves"
    elif called(node, aten.view.default, aten.reshape.default, aten.reshape_as.default, aten.flatten.using_ints):
        stack = behind_copies(node.args[0])
        if not called(stack, aten.stack.default) or _axis(stack, 1, 0) not in (4, -1):
            return None
        pieces, step, kind = stack.args[0], 2, "neighbours"
    else:
        return None
    if not isinstance(pieces, (list, tuple)) or len(pieces) != 2 or not called(pieces[0], aten.neg.default):
        return None
    second, first = _slice(pieces[0].args[0]), _slice(pieces[1])
    if second is None or first is None or first[0] is not second[0]:
        return None
    x, width = first[0], view.shape(first[0])[-1]
    if not isinstance(width, int) or width % 2:
        return None
    wanted = [(0, width // 2, 1), (width // 2, width, 1)] if step == 1 else [(0, width, 2), (1, width, 2)]
    found = [(start, min(end, width), by) for _, start, end, by in (first, second)]
    return (x, kind) if found == wanted else None


def _slice(node: Any) -> tuple[fx.Node, int, int, int] | None:
    """Source, start, end and step of a slice of the last axis, or of one of the halves of a split."""
    if called(node, aten.slice.Tensor):
        source, axis, start, end, step = (*node.args, *(None,) * 5)[:5]
        axis, step = 0 if axis is None else axis, 1 if step is None else step
        if not isinstance(source, fx.Node) or axis not in (3, -1) or not isinstance(step, int):
            return None
        low, high = 0 if start is None else start, END if end is None else end
        return (source, low, high, step) if isinstance(low, int) and isinstance(high, int) else None
    return None


def _axis(node: fx.Node, index: int, default: int) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get("dim", default)


def _widened(view: FuseView, turn: Turn) -> Turn:
    """The turn with the features that stay, where the graph puts them behind the turned ones."""
    cut = _slice(turn.x)
    if cut is None or cut[1] != 0 or cut[3] != 1 or len(turn.node.users) != 1:
        return turn
    user = next(iter(turn.node.users))
    if not called(user, aten.cat.default) or _axis(user, 1, 0) not in (3, -1):
        return turn
    pieces = user.args[0]
    rest = _slice(pieces[1]) if isinstance(pieces, (list, tuple)) and len(pieces) == 2 and pieces[0] is turn.node else None
    if rest is None or rest[0] is not cut[0] or rest[1] != cut[2] or rest[3] != 1:
        return turn
    return Turn(turn.node, cut[0], user, turn.cos, turn.sin, turn.pairs)


def _unfit(view: FuseView, turn: Turn, memo: dict[fx.Node, str]) -> tuple[str, str] | None:
    if view.dtype(turn.x) not in (torch.float32, torch.float16):
        return "the runtime has no kernel of this operation in this type", str(view.dtype(turn.x)).removeprefix("torch.")
    shape = view.shape(turn.x)
    if not isinstance(shape[1], int) or not isinstance(shape[3], int):
        return "heads and their width are not known", ""
    for name, table in (("cos", turn.cos), ("sin", turn.sin)):
        sizes = view.shape(table)
        if len(sizes) == 3:
            sizes = (1, *sizes)
        if len(sizes) != 4 or not view.same(sizes[1], 1):
            return "the table of angles differs between heads", name
        if not isinstance(sizes[3], int) or not view.same(sizes[2], shape[2]):
            return "the table of angles has not one row a step", f"{name}: {tuple(map(str, sizes))}"
        if table not in memo:
            memo[table] = _uneven(view, table, turn.pairs)
        if memo[table]:
            return memo[table], name
    if by_step(view, turn.x) is None:
        return "heads do not come from rows of features", ""
    return None


def _uneven(view: FuseView, table: fx.Node, pairs: str) -> str:
    """Why a table does not have one angle for both features of every pair, "" when it does."""
    above = ancestors(table)
    if len(above) > DEEP:
        return "the table of angles is computed from too much to be tried"
    graph, order = subgraph(view, table, above)
    for inputs in trials(view, 0):
        if inputs is None:
            continue
        try:
            with one_thread(), torch.no_grad():
                found = graph(*[inputs[n] for n in order])
        except RuntimeError:
            return "the table of angles does not run by itself"
        a, b = found.chunk(2, -1) if pairs == "halves" else (found[..., ::2], found[..., 1::2])
        if not torch.equal(a, b):
            return "the features of a pair have different angles"
    return ""


def _apply(view: FuseView, turn: Turn) -> None:
    heads = int(view.shape(turn.whole)[1])
    single = all(view.rank(t) == 3 or view.same(view.shape(t)[0], 1) for t in (turn.cos, turn.sin))
    with view.before(turn.whole):
        cos, sin = (_rows(view, t, turn.pairs) for t in (turn.cos, turn.sin))
        rows = None if single else view.once(("rows", turn.cos.name), lambda: _numbers(view, turn.x))
        x = merge(view, turn.x, turn.node)
        made = view.call(torch.ops.surgery.rotary.default, x, cos, sin, rows, heads, turn.pairs, like=turn.node)
        out = part(view, made, heads, turn.node)
    view.replace(turn.whole, out)


def _rows(view: FuseView, table: fx.Node, pairs: str) -> fx.Node:
    """One angle a pair: [batch * steps, pairs]; made once for each table."""

    def make() -> fx.Node:
        width = int(view.shape(table)[-1])
        bounds = (0, width // 2, 1) if pairs == "halves" else (0, width, 2)
        half = view.call(aten.slice.Tensor, table, -1, *bounds)
        return view.call(aten.reshape.default, half, [-1, width // 2])

    return view.once(("angles", table.name, pairs), make)


def _numbers(view: FuseView, x: fx.Node) -> fx.Node:
    """0, 1, 2 ... as [batch, steps]."""
    import operator

    batch, steps = view.size(x, 0), view.size(x, 2)
    count = batch * steps if isinstance(batch, int) and isinstance(steps, int) else view.call(operator.mul, batch, steps)
    return view.call(aten.reshape.default, view.call(aten.arange.default, count), [batch, steps])


RULE = FuseRotary()
