"""Rules that work value by value: every operator with torch's pointwise tag, plus the composite ones listed here."""

from __future__ import annotations

from typing import Any

from torch import fx

from surgery.model.dims.context import Axes, Context, rule
from surgery.model.dims.domains import keep_domain, lose_domain

COMPOSITE = (
    "__and__ __or__ __xor__ __lshift__ __rshift__ where masked_fill masked_fill_ floor_divide floor_divide_ hardswish hardswish_ "
    "relu_ relu6 relu6_ silu_ gelu_ selu selu_ elu_ celu celu_ leaky_relu_ hardtanh hardtanh_ hardsigmoid hardsigmoid_ hardswish_ mish_ "
    "logical_and logical_or logical_not logical_xor square rsub true_divide divide multiply subtract add_ sub_ mul_ div_ pow_ neg_ "
    "clamp_ clamp_min_ clamp_max_ clip clip_ sigmoid_ tanh_ exp_ sqrt_ rsqrt_ nan_to_num log1p softplus_ threshold_ fill_ zero_ "
    "copy_ copy isfinite isinf isnan isclose greater less greater_equal less_equal not_equal fix absolute float_power "
    "prelu_kernel _prelu_kernel nan_to_num_ bernoulli bernoulli_ native_gelu log_sigmoid lerp addcmul addcdiv special_expm1 remainder "
    "expm1 xlogy logaddexp gelu silu sign frac fmod"
).split()

MOVES = (
    "to _to_copy type_as contiguous clone detach detach_ alias lift lift_fresh lift_fresh_copy dropout dropout_ feature_dropout alpha_dropout "
    "feature_alpha_dropout float double half int long bool _autocast_to_reduced_precision _autocast_to_full_precision "
    "resolve_conj resolve_neg requires_grad_ bernoulli_p conj positive data rename"
).split()


@rule(*(f"aten.{name}" for name in dict.fromkeys(MOVES)))
def move(cx: Context, node: fx.Node) -> Axes:
    """The value as it is: dtype, device, layout."""
    return keep_domain(cx, node, cx.axes(node.args[0]))


def tensors_of(cx: Context, node: fx.Node) -> list[Any]:
    found: list[Any] = []
    for arg in (*node.args, *node.kwargs.values()):
        if isinstance(arg, fx.Node):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found.extend(a for a in arg if isinstance(a, fx.Node))
    return [a for a in found if cx.is_tensor(a)]


def pointwise(cx: Context, node: fx.Node) -> Axes:
    tensors = tensors_of(cx, node)
    if cx.domains:
        for tensor in tensors:
            lose_domain(cx, tensor, f"positions on it are used as numbers by {node.target}")
    out = cx.broadcast([cx.axes(t) for t in tensors])
    shape = cx.shape()
    return out if len(out) == len(shape) else cx.fresh() if not out else out


rule(*(f"aten.{name}" for name in dict.fromkeys(COMPOSITE)))(pointwise)


@rule("aten.prelu")
def prelu(cx: Context, node: fx.Node) -> Axes:
    x, w = cx.axes(node.args[0]), cx.axes(node.args[1])
    if len(x) > 1:
        cx.same(x[1:2], w)
    return x


@rule("aten.glu")
def glu(cx: Context, node: fx.Node) -> Axes:
    axes = cx.axes(node.args[0])
    dim = (node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", -1)) % len(axes)  # type: ignore[operator]
    half = axes[dim].size // 2
    parts = cx.algebra.pieces(axes[dim], [half, half])
    if parts is None:
        cx.freeze(axes[dim], "halved through the middle of a unit")
        return (*axes[:dim], cx.frozen(half, "halved through the middle of a unit"), *axes[dim + 1 :])
    cx.unify(parts[0], parts[1])
    return (*axes[:dim], parts[0], *axes[dim + 1 :])


@rule("aten.native_dropout")
def native_dropout(cx: Context, node: fx.Node) -> list[Axes]:
    axes = cx.axes(node.args[0])
    return [axes, axes]
