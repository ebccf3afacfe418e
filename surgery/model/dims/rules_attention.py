"""Rules of fused attention operators."""

from __future__ import annotations

from math import sqrt

from torch import fx

from surgery.model.dims.algebra import ONE
from surgery.model.dims.context import Axes, Context, argument, rule


def attend(cx: Context, node: fx.Node, mask: Axes, gqa: bool) -> Axes:
    """``q [.., H, L, d]``, ``k [.., G, S, d]``, ``v [.., G, S, e]`` to ``[.., H, L, e]``; with grouped queries H = G x R."""
    q, k, v = (cx.axes(a) for a in node.args[:3])
    cx.inner.append(q[-1])
    cx.unify(q[-1], k[-1])
    cx.unify(k[-2], v[-2])
    cx.mark(q[-1], "contract")
    cx.mark(k[-2], "softmax")
    cx.mark(v[-1], "~value")
    if gqa and len(q) > 2 and q[-3].size != k[-3].size:
        cx.broadcast([k[:-2], v[:-2]])
        repeat = cx.leaf(q[-3].size // k[-3].size)
        cx.unify(q[-3], cx.algebra.product([k[-3], repeat]))
        cx.broadcast([q[:-3], k[:-3], v[:-3]])
        batch = q[:-2]
    else:
        batch = cx.broadcast([q[:-2], k[:-2], v[:-2]])
    for axis in (*batch, *k[:-2]):
        cx.mark(axis, "~batch")
    if mask:
        cx.broadcast([(*batch, q[-2], k[-2]), mask])
    if argument(node, 6, "scale") is None:
        cx.mark(q[-1], "default_scale")
        if q[-1] is not ONE:
            cx.constant(("kwargs", "scale") if len(node.args) < 7 else ("args", 6), "scale", q[-1], data=1.0 / sqrt(q[-1].size))
    return (*batch, q[-2], v[-1])


@rule("aten.scaled_dot_product_attention")
def sdpa(cx: Context, node: fx.Node) -> Axes:
    return attend(cx, node, cx.axes(argument(node, 3, "attn_mask")), bool(node.kwargs.get("enable_gqa", False)))


@rule("aten._scaled_dot_product_flash_attention_for_cpu", "aten._scaled_dot_product_attention_math")
def sdpa_parts(cx: Context, node: fx.Node) -> list[Axes]:
    mask = cx.axes(node.kwargs.get("attn_mask") or argument(node, 3, "attn_mask"))
    out = attend(cx, node, mask, bool(node.kwargs.get("enable_gqa", False)))
    rest = [cx.fresh("a by-product of attention", index=i) for i in range(1, len(cx.shape()))]
    return [out, *rest]
