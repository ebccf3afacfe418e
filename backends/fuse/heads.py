"""Heads as the graph spells them: which [batch, steps, features] value stands behind a [batch, heads, steps, width] one, and back."""

from __future__ import annotations

from typing import Any

from torch import fx

from surgery.backends.fuse.view import FuseView, aten

SHAPES = frozenset(
    {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default,
     aten.squeeze.dim, aten.view_copy.default}
)  # fmt: skip
"""Operations that keep the order of the elements in memory and change the axes only."""

COPIES = frozenset({aten.contiguous.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default})


def called(node: Any, *targets: Any) -> bool:
    """Whether a value is a call of one of these operations."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def behind_copies(node: Any) -> Any:
    """The value itself, behind operations that only copy it."""
    while called(node, *COPIES):
        node = node.args[0]
    return node


def swaps(view: FuseView, node: Any) -> bool:
    """Whether a call exchanges axes 1 and 2 of four."""
    if called(node, aten.transpose.int) and view.rank(node) == 4:
        return {int(a) % 4 for a in node.args[1:3]} == {1, 2}
    return called(node, aten.permute.default) and [int(a) % 4 for a in node.args[1]] == [0, 2, 1, 3]


def by_step(view: FuseView, node: fx.Node) -> fx.Node | None:
    """The [batch, steps, heads, width] value of which ``node`` [batch, heads, steps, width] is the transpose, None where it is none."""
    inner = behind_copies(node)
    return behind_copies(inner.args[0]) if swaps(view, inner) else None


def merged(view: FuseView, node: fx.Node) -> fx.Node | None:
    """The [batch, steps, heads * width] value that ``node`` [batch, heads, steps, width] was cut from, None where there is none."""
    apart = by_step(view, node)
    if apart is None or not called(apart, *SHAPES):
        return None
    whole = behind_copies(apart.args[0])
    b, s, n, h = view.shape(apart)
    if not isinstance(n, int) or not isinstance(h, int):
        return None
    return whole if view.rank(whole) == 3 and view.same(view.shape(whole), (b, s, n * h)) else None


def merge(view: FuseView, node: fx.Node, like: fx.Node) -> fx.Node:
    """:func:`merged`, made with new operations where the graph has no such value."""
    found = merged(view, node)
    if found is not None:
        return found
    apart = by_step(view, node)
    if apart is None:
        apart = view.call(aten.transpose.int, node, 1, 2, like=like)
    n, h = view.shape(apart)[2:]
    return view.call(aten.reshape.default, apart, [view.size(apart, 0), view.size(apart, 1), int(n * h)], like=like)


def part(view: FuseView, node: fx.Node, heads: int, like: fx.Node) -> fx.Node:
    """[batch, steps, heads * width] as [batch, heads, steps, width]."""
    width = int(view.shape(node)[2]) // heads
    apart = view.call(aten.reshape.default, node, [view.size(node, 0), view.size(node, 1), heads, width], like=like)
    return view.call(aten.transpose.int, apart, 1, 2, like=like)


def unrepeated(view: FuseView, node: fx.Node) -> tuple[fx.Node, int]:
    """The value of which every head stands ``n`` times in a row, and ``n``; the value itself and 1 where nothing is repeated."""
    inner = behind_copies(node)
    if called(inner, aten.repeat_interleave.self_int) and len(inner.args) > 2 and inner.args[2] == 1 and isinstance(inner.args[1], int):
        return inner.args[0], inner.args[1]
    if not called(inner, *SHAPES) or view.rank(inner) != 4:
        return node, 1
    wide = behind_copies(inner.args[0])
    if not called(wide, aten.expand.default) or view.rank(wide) != 5:
        return node, 1
    thin = behind_copies(wide.args[0])
    if not called(thin, aten.unsqueeze.default) or int(thin.args[1]) % 5 != 2:
        return node, 1
    source = thin.args[0]
    b, n, s, h = view.shape(source)
    times = view.shape(wide)[2]
    if not isinstance(times, int) or not view.same(view.shape(wide), (b, n, times, s, h)) or not view.same(view.shape(inner)[1], n * times):
        return node, 1
    return source, times


def replace_attention(view: FuseView, old: fx.Node, out: fx.Node, heads: int) -> None:
    """Puts ``out`` [batch, queries, heads * width] in place of ``old`` [batch, heads, queries, width]: where readers merge the heads of
    ``old`` they read ``out`` itself."""
    for node in _mergers(view, old, view.shape(out)):
        node.replace_all_uses_with(out)
        view.drop(node)
    if old.users:
        with view.after(out):
            split = part(view, out, heads, old)
        old.replace_all_uses_with(split)
    view.drop(old)


def _mergers(view: FuseView, old: fx.Node, shape: tuple[Any, ...]) -> list[fx.Node]:
    found = []
    for user in through_copies(old):
        if not swaps(view, user):
            continue
        for next_user in through_copies(user):
            if called(next_user, *SHAPES) and view.rank(next_user) == 3 and view.same(view.shape(next_user), shape):
                found.append(next_user)
    return found


def through_copies(node: fx.Node) -> list[fx.Node]:
    """The readers of a value, behind operations that only copy it."""
    out = []
    for user in list(node.users):
        if called(user, *COPIES):
            out += through_copies(user)
        else:
            out.append(user)
    return out
