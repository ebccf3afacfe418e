"""Attention that a model writes out itself, in two products and a softmax, becomes ``scaled_dot_product_attention``, which other rules take further."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse import attention_operands as find_operands
from surgery.backends.fuse.attention_operands import Operand, build, score_axes, shape_of, value_axes
from surgery.backends.fuse.attention_scores import LAYOUT, PRODUCTS, Added, Scores, Unread, operands, read
from surgery.backends.fuse.heads import SHAPES, called, through_copies
from surgery.backends.fuse.masks import ancestors
from surgery.backends.fuse.nodes import is_call, same
from surgery.backends.fuse.ops_attention import fill_of
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView, aten

SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
SIZE = aten.sym_size.int
WINDOW = 128
"""Queries of a fixed number up to which the fused operation was measured to be no faster when something is added to its scores."""


@dataclass(frozen=True)
class Written:
    """One attention taken apart. ``out`` is the product with the values and ``axes`` what its axes are in terms of (batch, heads, queries, width), or of
    (batch * heads, queries, width)."""

    softmax: fx.Node
    out: fx.Node
    axes: tuple[int, ...]
    q: Operand
    k: Operand
    v: Operand
    scores: Scores
    path: tuple[fx.Node, ...]


@dataclass
class WrittenAttention:
    """Places are softmaxes whose result is multiplied with values, in batched products or an ``einsum``. Heads may stand on an axis of their own or on that of
    the batch. What the softmax weighs may be scaled anywhere, on queries, keys or scores, multiplied by a tensor without an axis of keys, bounded from below, and
    masked; masks, slopes and tables of relative positions are summed up once for all layers that read the same. A number that a mask puts in the place of a score is
    added to it, which hides as well; a row that may look at nothing gives all keys the same weight, as before."""

    name: str = "written_attention"
    doc: str = "attention that is written out in products and a softmax is found, for the rules of attention"
    order: int = 45
    targets: frozenset[str] = field(default_factory=lambda: frozenset({ONNX}))

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        for node in view.calls(*SOFTMAX):
            try:
                found = _take_apart(view, node)
            except Unread as why:
                yield Miss(view.where(node), why.condition, why.detail)
                continue
            if found is not None:
                yield Match(node, lambda w=found: _apply(view, w), _describe(view, found))  # type: ignore[misc]


# ------------------------------------------------------------------ finding


def _take_apart(view: FuseView, node: fx.Node) -> Written | None:
    ahead = _ahead(view, node)
    if ahead is None:
        return None
    out, at, path = ahead
    if int(node.args[1]) % view.rank(node) != view.rank(node) - 1:  # type: ignore[arg-type]
        raise Unread("the softmax is not over the keys", f"axis {node.args[1]}")
    if view.rank(node) > 4:
        raise Unread("the scores have an axis of blocks, which the runtime's attention has no place for", f"{view.rank(node)} axes")
    scores = read(view, node.args[0])
    for inner in (*scores.chain, node, *path):
        if len(_readers(inner)) != 1:
            raise Unread("something else reads scores or weights", inner.name)
    keyed, valued = score_axes(scores.product), value_axes(out, at)
    if is_call(scores.product, aten.baddbmm.default):
        keyed = (0, 1, 2), (0, 2, 1), True
    if keyed is None or valued is None:
        raise Unread("the products are no product with keys and one with values", str((scores.product if keyed is None else out).target))
    pair = operands(scores.product)
    left, right = pair if keyed[2] else pair[::-1]
    found: dict[str, Operand] = {}
    for name, value, axes in (("queries", left, keyed[0]), ("keys", right, keyed[1]), ("values", operands(out)[1 - at], valued[0])):
        operand = find_operands.find(view, value, axes)
        if operand is None:
            raise Unread("an operand has no axis of heads", name)
        found[name] = operand
    made = Written(node, out, valued[1], found["queries"], found["keys"], found["values"], scores, path)
    _fits(view, made)
    return made


def _ahead(view: FuseView, node: fx.Node) -> tuple[fx.Node, int, tuple[fx.Node, ...]] | None:
    """The product that weights go into, as which operand, and what they pass before; None where a softmax weighs something else."""
    path: list[fx.Node] = []
    here = node
    while True:
        readers = _readers(here)
        products = [r for r in readers if is_call(r, *PRODUCTS)]
        if products:
            at = list(operands(products[0])).index(here) if here in operands(products[0]) else -1
            other = operands(products[0])[1 - at] if at >= 0 else None
            if at < 0 or not isinstance(other, fx.Node) or view.is_parameter(other):
                return None
            if len(readers) > 1:
                raise Unread("something else reads scores or weights", here.name)
            return products[0], at, tuple(path)
        through = [r for r in readers if is_call(r, *LAYOUT)]
        if not through:
            behind = [r for r in readers if any(is_call(u, *PRODUCTS) for u in r.users) and r.op == "call_function"]
            if behind and view.rank(behind[0]) == view.rank(here) > 2 and same(view, view.shape(behind[0])[-2], view.shape(here)[-2]):
                if is_call(behind[0], aten.slice.Tensor):
                    raise Unread(
                        "the softmax weighs more than keys, as with sinks, which the runtime's attention has no place for", behind[0].name
                    )
                raise Unread("between the softmax and the product with the values stands another operation", str(behind[0].target))
            return None
        if not same(view, view.shape(through[0])[-2:], view.shape(here)[-2:]):
            return None
        here = through[0]
        path.append(here)


def _readers(node: fx.Node) -> list[fx.Node]:
    """Who reads more of a value than its size."""
    return [u for u in node.users if not is_call(u, SIZE)]


def _fits(view: FuseView, found: Written) -> None:
    """Raises for the first thing that the fused operation cannot have."""
    q, k, v = (shape_of(view, o) for o in (found.q, found.k, found.v))
    if not all(isinstance(n, int) for n in (q[1], k[1], q[3], k[3], v[3])):
        raise Unread("the number of heads or their width is not known", ", ".join(map(str, (q[1], q[3]))))
    if not same(view, q[1], k[1]) or not same(view, k[1], v[1]):
        raise Unread("queries, keys and values have different numbers of heads", f"{q[1]}, {k[1]}, {v[1]}")
    if not same(view, q[3], k[3]) or not same(view, k[2], v[2]):
        raise Unread("the operands do not fit each other", f"{q[3]}, {k[3]}")
    if not same(view, k[3], v[3]):
        raise Unread("keys and values differ in width", f"{k[3]} and {v[3]}")
    if not same(view, q[0], k[0]) or not same(view, k[0], v[0]):
        raise Unread("operands have different batches", f"{q[0]}, {k[0]}, {v[0]}")
    dtypes = {view.dtype(o.source) for o in (found.q, found.k, found.v)}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float16}:
        raise Unread("the operands are not all float32 or float16", ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes)))
    if found.scores.cap:
        raise Unread(
            "the scores are capped, which the runtime's attention does faster for single steps and more slowly for prompts, and one graph serves both",
            f"at {found.scores.cap:g}",
        )
    if found.scores.added and isinstance(q[2], int) and q[2] <= WINDOW:
        raise Unread("something is added to the scores of short windows, where single operations are as fast", f"{q[2]} queries")
    for part in found.scores.added:
        if any(is_call(n, *PRODUCTS, aten.baddbmm.default) for n in ancestors(part.node)):
            raise Unread(
                "what is added to the scores is made of values of every layer, and a sum of its own costs what is gained", part.node.name
            )
        if part.hides is None and view.dtype(part.node) not in dtypes:
            raise Unread("what is added to the scores has another type", str(view.dtype(part.node)))
        _layout(view, part, q)


def _layout(view: FuseView, part: Added, shape: tuple[Any, ...]) -> tuple[str, tuple[Any, ...]]:
    """How what is added becomes [batch or 1, heads or 1, queries or 1, keys or 1]: as it is, its first axis taken apart, or its first two put
    together; with its sizes, as many as the scores had there."""
    level = view.shape(part.level)
    own = view.shape(part.node)
    own = (1,) * (len(level) - len(own)) + own
    if len(own) == len(level) == 4 and same(view, level[:2], shape[:2]):
        return "plain", own
    if len(level) == 3:
        return ("plain" if same(view, own[0], 1) else "apart"), own
    if len(level) == 5 and same(view, level[0] * level[1], shape[0]) and same(view, level[2], shape[1]):
        return "together", own
    raise Unread("what is added to the scores is not for batch, heads, queries and keys", str(list(level)))


def _describe(view: FuseView, found: Written) -> str:
    heads = shape_of(view, found.q)[1]
    said = f"{heads} head{'' if heads == 1 else 's'}"
    masks = sum(p.hides is not None for p in found.scores.added)
    sums = len(found.scores.added) - masks
    parts = [f"{sums} added to the scores"] if sums else []
    parts += [f"{masks} mask{'' if masks == 1 else 's'}"] if masks else []
    return ", ".join([said, *parts])


# ------------------------------------------------------------------ rewriting


def _apply(view: FuseView, found: Written) -> None:
    like = found.out
    with view.before(like):
        q, k, v = (build(view, o, like) for o in (found.q, found.k, found.v))
        for factor in found.scores.factors:
            q = view.call(aten.mul.Tensor, q, factor, like=like)
        if found.v.factor != 1:
            v = view.call(aten.mul.Tensor, v, found.v.factor, like=like)
        mask = _mask(view, found, q, k)
        scale = found.scores.scale * found.q.factor * found.k.factor
        made = view.call(SDPA, q, k, v, mask, 0.0, False, like=like, scale=scale)
    _sizes(view, found, q, k)
    _put(view, found, made)


def _mask(view: FuseView, found: Written, q: fx.Node, k: fx.Node) -> fx.Node | None:
    """Everything that is added, as one value; the same for all layers that add the same."""
    added = found.scores.added
    if not added:
        return None
    shape, dtype = shape_of(view, found.q), view.dtype(q)
    key = ("added", dtype, shape[1], *((p.node, p.factor, p.hides, view.rank(p.level)) for p in added))

    def make() -> fx.Node:
        total: fx.Node | None = None
        for part in reversed(added):
            value = _numbers(view, part, dtype, shape, q)
            total = value if total is None else view.call(aten.add.Tensor, total, value)
        assert total is not None
        return total

    return view.once(key, make)


def _numbers(view: FuseView, part: Added, dtype: torch.dtype | None, shape: tuple[Any, ...], q: fx.Node) -> fx.Node:
    assert dtype is not None
    node = part.node
    how, own = _layout(view, part, shape)
    if how == "apart":
        sizes = [n if isinstance(n, int) else view.size(node, i - 3 + view.rank(node)) for i, n in enumerate(own)]
        node = view.call(aten.reshape.default, node, [-1, int(shape[1]), *sizes[1:]])
    elif how == "together":
        wide = [view.size(part.level, 0), view.size(part.level, 1)]
        if not same(view, own[:2], (1, 1)):
            node = view.call(aten.expand.default, node, [*wide, -1, -1, -1])
        node = view.call(
            aten.reshape.default, node, [-1, *(n if isinstance(n, int) else view.size(node, i + 2) for i, n in enumerate(own[2:]))]
        )
    if part.hides is not None:
        zero, low = (view.call(aten.scalar_tensor.default, x, dtype=dtype) for x in (0.0, _low(part.factor, dtype)))
        return view.call(aten.where.self, node, *((low, zero) if part.hides else (zero, low)))
    return node if part.factor == 1 else view.call(aten.mul.Tensor, node, part.factor)


def _low(fill: float, dtype: torch.dtype) -> float:
    """The number that hides: the model's own, so that what several masks hide stays behind what one of them hides, but low enough to leave nothing of a score."""
    return max(min(fill, fill_of(dtype)), torch.finfo(dtype).min)


def _sizes(view: FuseView, found: Written, q: fx.Node, k: fx.Node) -> None:
    """Sizes that were read off scores or weights are read off queries and keys, so that nothing holds those any longer."""
    for node in (*found.scores.chain, found.softmax, *found.path):
        for user in [u for u in node.users if is_call(u, SIZE)]:
            size = view.shape(node)[int(user.args[1])]  # type: ignore[arg-type]
            for source in (q, k):
                at = next((i for i, n in enumerate(view.shape(source)) if same(view, n, size)), None)
                if at is not None:
                    with view.after(source):
                        fresh = view.call(SIZE, source, at)
                    user.replace_all_uses_with(fresh)
                    break


def _put(view: FuseView, found: Written, made: fx.Node) -> None:
    """Puts attention [batch, heads, queries, width] in place of the product with the values; reshapes behind it that give back the axes of heads go."""
    out = found.out
    if view.rank(out) == 4:
        if found.axes != (0, 1, 2, 3):
            with view.after(made):
                made = view.call(aten.permute.default, made, list(found.axes), like=out)
        view.replace(out, made)
        return
    shape = view.shape(made)
    for user in through_copies(out):
        if called(user, *SHAPES) and view.rank(user) == 4 and same(view, view.shape(user), shape):
            user.replace_all_uses_with(made)
            view.drop(user)
        elif called(user, aten.transpose.int, aten.permute.default) and found.axes == (0, 1, 2):
            _steps_first(view, user, made)
    if not out.users:
        view.drop(out)
        return
    with view.before(out):
        flat = view.call(aten.reshape.default, made, [-1, view.size(made, 2), int(shape[3])], like=out)
        if found.axes != (0, 1, 2):
            flat = view.call(aten.permute.default, flat, list(found.axes), like=out)
    view.replace(out, flat)


def _steps_first(view: FuseView, turn: fx.Node, made: fx.Node) -> None:
    """[queries, batch, heads * width] from attention, where a model makes it by a turn of [batch * heads, queries, width] and a reshape."""
    b, n, s, h = view.shape(made)
    if not same(view, view.shape(turn), (s, b * n, h)):
        return
    for user in through_copies(turn):
        if called(user, *SHAPES) and view.rank(user) == 3 and same(view, view.shape(user), (s, b, n * h)):
            with view.before(user):
                apart = view.call(aten.transpose.int, made, 1, 2, like=user)
                rows = view.call(aten.reshape.default, apart, [view.size(made, 0), view.size(made, 2), int(n * h)], like=user)
                rows = view.call(aten.transpose.int, rows, 0, 1, like=user)
            user.replace_all_uses_with(rows)
            view.drop(user)


RULE = WrittenAttention()
