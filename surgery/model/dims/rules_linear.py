"""Rules of products: linear, addmm, matmul, bmm, einsum, grouped matrix products of experts."""

from __future__ import annotations

from typing import Any

from torch import fx

from surgery.model.dims.algebra import ONE, Axis, leaves_below
from surgery.model.dims.context import Axes, Context, argument, rule
from surgery.model.dims.domains import lose_domain


def contract(cx: Context, a: Axis, b: Axis) -> None:
    cx.unify(a, b)
    cx.mark(a, "contract")


def product_marks(cx: Context, batch: Axes, inner: Axis, value: Axis) -> None:
    """Names for the axes of a batched product of activations: score product or value product of attention."""
    below = leaves_below(inner)
    scores = any("softmax" in leaf.flags for leaf in below)
    for axis in batch:
        cx.mark(axis, "~batch")
    if scores:
        cx.mark(value, "~value")
    else:
        cx.inner.append(inner)


@rule("aten.linear")
def linear(cx: Context, node: fx.Node) -> Axes:
    x, w, bias = cx.axes(node.args[0]), cx.axes(node.args[1]), cx.axes(argument(node, 2, "bias"))
    contract(cx, x[-1], w[-1])
    if len(w) == 1:
        return x[:-1]
    if bias:
        cx.unify(w[0], bias[0])
    return (*x[:-1], w[0])


@rule("aten.addmm", "aten.baddbmm", "aten.addbmm")
def addmm(cx: Context, node: fx.Node) -> Axes:
    bias, a, b = (cx.axes(arg) for arg in node.args[:3])
    out = matmul_axes(cx, a, b)
    cx.broadcast([out, bias])
    return out


@rule("aten.mm", "aten.bmm", "aten.matmul", "aten.mv", "aten.dot")
def matmul(cx: Context, node: fx.Node) -> Axes:
    return matmul_axes(cx, cx.axes(node.args[0]), cx.axes(node.args[1]))


def matmul_axes(cx: Context, a: Axes, b: Axes) -> Axes:
    if len(b) == 1:
        contract(cx, a[-1], b[0])
        return a[:-1]
    if len(a) == 1:
        contract(cx, a[0], b[-2])
        return (*b[:-2], b[-1])
    contract(cx, a[-1], b[-2])
    batch = cx.broadcast([a[:-2], b[:-2]])
    if len(a) > 2 and len(b) > 2:
        product_marks(cx, batch, a[-1], b[-1])
    return (*batch, a[-2], b[-1])


@rule("aten.einsum")
def einsum(cx: Context, node: fx.Node) -> Axes:
    tensors: Any = node.args[1]
    arrays = [cx.axes(t) for t in tensors]
    equation = spelled_out(str(node.args[0]), [len(a) for a in arrays])
    if equation is None:
        for axes in arrays:
            cx.freeze(axes, "einsum without a result")
        return cx.fresh("einsum without a result")
    inputs, output = equation.split("->")
    named: dict[str, Axis] = {}
    for letters, axes in zip(inputs.split(","), arrays, strict=True):
        if len(set(letters)) != len(letters):
            cx.freeze(axes, "einsum over a diagonal")
        for letter, axis in zip(letters, axes, strict=True):
            if letter in named and named[letter] is not ONE:
                cx.unify(named[letter], axis)
            else:
                named[letter] = axis
    for letter, axis in named.items():
        if letter not in output:
            cx.mark(axis, "contract")
    if len(arrays) == 2:
        first, second = inputs.split(",")
        both = [c for c in second if c in first]
        inner, value = [c for c in both if c not in output], [c for c in second if c in output and c not in first]
        if len(inner) == len(value) == 1 and len(both) > 1:
            product_marks(cx, tuple(named[c] for c in both if c in output), named[inner[0]], named[value[0]])
    return tuple(named[letter] for letter in output)


def spelled_out(equation: str, ranks: list[int]) -> str | None:
    """An equation of einsum with letters for its dots; None where it says no result."""
    equation = equation.replace(" ", "")
    if "->" not in equation:
        return None
    if "..." not in equation:
        return equation
    inputs, output = equation.split("->")
    parts = inputs.split(",")
    dots = [rank - len(p) + 3 if "..." in p else 0 for p, rank in zip(parts, ranks, strict=True)]
    free = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation][: max(dots)]
    given = [p.replace("...", "".join(free[len(free) - n :])) for p, n in zip(parts, dots, strict=True)]
    return ",".join(given) + "->" + output.replace("...", "".join(free))


def grouped(cx: Context, node: fx.Node) -> Axes:
    """``x [N, K]`` times ``w [E, K, M]`` where ``offs [E]`` says which rows belong to which expert: ``[N, M]``."""
    x, w = cx.axes(node.args[0]), cx.axes(node.args[1])
    offsets: Any = argument(node, 2, "offs")
    contract(cx, x[-1], w[-2])
    if cx.is_tensor(offsets):
        cx.unify(w[0], cx.axes(offsets)[0])
        lose_domain(cx, offsets, "experts counted in an unknown way")
    else:
        cx.freeze(w[0], "experts without offsets")
    bias = cx.axes(argument(node, 3, "bias"))
    if bias:
        cx.broadcast([(x[0], w[-1]), bias])
    return (x[0], w[-1])


rule("aten._grouped_mm", "surgery.grouped_mm", "transformers.grouped_mm_fallback", "transformers.grouped_mm")(grouped)


@rule("aten.outer", "aten.ger")
def outer(cx: Context, node: fx.Node) -> Axes:
    return (cx.axes(node.args[0])[0], cx.axes(node.args[1])[0])


@rule("aten.cdist")
def cdist(cx: Context, node: fx.Node) -> Axes:
    a, b = cx.axes(node.args[0]), cx.axes(node.args[1])
    contract(cx, a[-1], b[-1])
    return (*cx.broadcast([a[:-2], b[:-2]]), a[-2], b[-2])
