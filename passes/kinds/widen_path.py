"""What stands between the projections of a feed-forward block: which function it computes, and its sizes when the block grows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery.model.program import ValueSpec
from surgery.passes.kinds.calls import operand

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "identity": lambda x: x,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip
_SHAPES = ("reshape", "view", "_unsafe_view", "contiguous", "clone", "alias")
_CASTS = ("to", "_to_copy", "dropout", "detach")
_PARTS = ("chunk", "split", "split_with_sizes")


@dataclass(frozen=True)
class Path:
    """``firsts`` are the calls of up (and of gate: the same one where both are one weight), ``inner`` what is between them and ``last``,
    in the graph's order. ``gate_first``: of one weight, the gate's half is the first."""

    firsts: tuple[fx.Node, ...]
    last: fx.Node
    inner: tuple[fx.Node, ...]
    gate_first: bool = False


def path_of(gm: fx.GraphModule, firsts: list[fx.Node], last: fx.Node, gate_first: bool) -> Path | str:
    """The nodes between projections, or why they are not only the block's activation."""
    starts = set(firsts)
    inner: set[fx.Node] = set()
    stack = [operand(last)]
    while stack:
        node = stack.pop()
        if node in starts or node in inner or _is_number(node):
            continue
        if node.op == "placeholder" or node.op == "get_attr" or not _elementwise(gm, node):
            return "more than an activation stands between the block's projections"
        inner.add(node)
        stack.extend(node.all_input_nodes)
    allowed = inner | {last}
    if any(user not in allowed for node in (*starts, *inner) for user in node.users if not _is_size(user)):
        return "something else reads what is between the block's projections"
    return Path(tuple(firsts), last, tuple(sorted(inner)), gate_first)


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and "sym_size" in str(node.target)


def _is_number(node: fx.Node) -> bool:
    spec = node.meta.get("spec")
    return isinstance(spec, ValueSpec) and spec.kind != "tensor"


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").partition(".")[0].rstrip("_") if node.op == "call_function" else ""


def _elementwise(gm: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(gm.get_submodule(str(node.target)), (nn.Dropout, nn.Identity))
    if node.target is operator.getitem:
        return True
    name = _name(node)
    if name in _SHAPES or name in _CASTS or name in _PARTS:
        return True
    target = node.target
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags


def plain_moves(node: Any, most: int = 16) -> Any:
    """What a value was before changes of its shape alone."""
    for _ in range(most):
        if not isinstance(node, fx.Node) or _name(node) not in _SHAPES or not isinstance(node.args[0], fx.Node):
            break
        node = node.args[0]
    return node


def computes(path: Path, activation: str, gated: bool) -> bool:
    """Whether the path is ``f(up)``, or ``f(gate) * up``, tried on numbers in float64: an activation may be written in many ways."""
    f = _FUNCTIONS.get(activation)
    if f is None:
        return False
    g = torch.Generator().manual_seed(0)
    up, gate = (torch.randn(64, generator=g, dtype=torch.float64) * 3 for _ in range(2))
    values: dict[fx.Node, Any] = {}
    if not gated:
        values[path.firsts[0]] = up
    elif path.firsts[0] is path.firsts[1]:
        values[path.firsts[0]] = torch.cat([gate, up] if path.gate_first else [up, gate])
    else:
        values |= dict(zip(path.firsts, (up, gate), strict=True))
    try:
        for node in path.inner:
            values[node] = _value(node, values)
        found = values[operand(path.last)]
    except (KeyError, RuntimeError, TypeError, IndexError):
        return False
    want = f(gate) * up if gated else f(up)
    return isinstance(found, Tensor) and found.shape == want.shape and bool(torch.allclose(found, want, rtol=1e-9, atol=1e-9))


def _value(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    first = values[node.args[0]] if isinstance(node.args[0], fx.Node) else node.args[0]
    name = _name(node)
    if node.op == "call_module" or name in _SHAPES or name in _CASTS:
        return first
    if node.target is operator.getitem:
        return first[node.args[1]]
    if name in _PARTS:
        return first.chunk(2)
    args = fx.node.map_arg(node.args, values.__getitem__)
    kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def resize(gm: fx.GraphModule, path: Path, width: int) -> None:
    """The sizes of the path's values and the constants of its operations when each projection has ``width`` units more."""
    fused = len(path.firsts) == 2 and path.firsts[0] is path.firsts[1]
    old = {n: int(n.meta["spec"].shape[-1]) for n in dict.fromkeys(path.firsts)}
    size = next(iter(old.values())) // (2 if fused else 1)
    for node in dict.fromkeys(path.firsts):
        node.meta["spec"] = _wider(node.meta["spec"], old[node], width * (2 if fused else 1))
    whole = 2 * size if fused else size
    for node in path.inner:
        if "spec" in node.meta:
            node.meta["spec"] = _wider(node.meta["spec"], size, width) if not fused else _either(node.meta["spec"], size, whole, width)
        if _name(node) in _SHAPES and len(node.args) > 1 and isinstance(node.args[1], list | tuple):
            *outer, last = node.args[1]
            node.args = (node.args[0], [*outer, _grown(last, size, whole, width)], *node.args[2:])
        elif _name(node) in ("split", "split_with_sizes"):
            sizes = node.args[1]
            new = [_grown(n, size, whole, width) for n in sizes] if isinstance(sizes, list | tuple) else _grown(sizes, size, whole, width)
            node.args = (node.args[0], new, *node.args[2:])


def _grown(n: Any, size: int, whole: int, width: int) -> Any:
    if not isinstance(n, int):
        return n
    return n + width if n == size else n + 2 * width if n == whole else n


def _either(spec: Any, size: int, whole: int, width: int) -> Any:
    last = spec.shape[-1] if isinstance(spec, ValueSpec) and spec.shape else None
    return _wider(spec, whole, 2 * width) if last == whole else _wider(spec, size, width)


def _wider(spec: Any, size: int, width: int) -> Any:
    if isinstance(spec, tuple | list):
        return tuple(_wider(s, size, width) for s in spec)
    if not isinstance(spec, ValueSpec) or not spec.shape or spec.shape[-1] != size:
        return spec
    return ValueSpec(spec.kind, spec.dtype, (*spec.shape[:-1], size + width))
