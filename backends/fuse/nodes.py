"""What rules that read single operations share: arguments by name, numbers, what may be written in place, tensors that rules make."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.backends.fuse.view import FuseView
from surgery.model.sample import placeholders

aten = torch.ops.aten

RESHAPES = frozenset(
    {
        aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.flatten.using_ints, aten.unsqueeze.default,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unflatten.int,
    }
)  # fmt: skip
"""Operations that give the same elements in the same order another shape."""

CASTS = frozenset({aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten._to_copy.default})

_MAY_ALIAS = frozenset(
    {
        "reshape",
        "contiguous",
        "to",
        "type_as",
        "flatten",
        "dropout",
        "feature_dropout",
        "unflatten",
        "expand_as",
        "getitem",
        "chunk",
        "split",
    }
)
"""Operations that give back (a part of) their input as it is, or a copy, as the case may be; views say so in their schema."""


def is_call(value: Any, *targets: Any) -> bool:
    """Whether a value is a call of one of these operations."""
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target in targets


def operand(node: fx.Node, name: str) -> Any:
    """An argument of an operation by its name in the schema, however it was given; its default where it was not."""
    for i, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.name == name:
            if not argument.kwarg_only and i < len(node.args):
                return node.args[i]
            return node.kwargs.get(name, argument.default_value if argument.has_default_value() else None)
    raise KeyError(f"{node.target} has no argument {name}")


def number(view: FuseView, value: Any) -> float | int | None:
    """A plain number, or the one that a constant tensor of no axes holds; None for everything else (parameters and bools included)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if view.name(value) and not view.is_parameter(value) and not view.is_live(value):
        tensor = view.tensor(value)
        if tensor is not None and tensor.ndim == 0 and tensor.dtype != torch.bool and tensor.device.type != "meta":
            return tensor.item()
    return None


def with_number(view: FuseView, node: Any, *targets: Any) -> tuple[fx.Node, float | int] | None:
    """The tensor and the number of an operation between the two, in either order for sums and products; None for anything else."""
    if not is_call(node, *targets) or len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    left, right = node.args[:2]
    value = number(view, right)
    if value is not None and isinstance(left, fx.Node):
        return left, value
    value = number(view, left)
    if value is not None and isinstance(right, fx.Node) and node.target in (aten.add.Tensor, aten.mul.Tensor):
        return right, value
    return None


def pair(node: Any, *targets: Any) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors of an operation between tensors, None for anything else."""
    if not is_call(node, *targets) or len(node.args) != 2 or node.kwargs.get("alpha", 1) != 1:
        return None
    left, right = node.args
    return (left, right) if isinstance(left, fx.Node) and isinstance(right, fx.Node) else None


def same(view: FuseView, a: Any, b: Any) -> bool:
    """Whether two sizes, or two shapes, are equal for every input that the program takes. Beside what the tracer knows this uses the
    program's signature, which says that the batch of two inputs is one batch."""
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same(view, x, y) for x, y in zip(a, b, strict=True))
    if view.same(a, b):
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    known = _signature(view)
    left, right = (size.node.expr.xreplace(known) if isinstance(size, torch.SymInt) else size for size in (a, b))
    return bool(left == right)


def _signature(view: FuseView) -> dict[Any, Any]:
    """The tracer's symbol of every open axis of an input to the program's expression for it."""
    known: dict[Any, Any] = {}
    for node, (_, spec) in zip(view.placeholders, placeholders(view.program), strict=True):
        for size, given in zip(view.shape(node), spec.shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                known.setdefault(size.node.expr, given)
    return known


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that reads this one; None when several do, or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def pure(node: fx.Node) -> bool:
    """Whether a call gives the same value for the same arguments and changes nothing."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem or (not isinstance(node.target, torch._ops.OpOverload) and _symbolic(node.target)):
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    schema, tags = node.target._schema, node.target.tags
    if schema.is_mutable or torch.Tag.nondeterministic_seeded in tags:
        return is_call(node, aten.dropout.default, aten.feature_dropout.default) and not operand(node, "train")
    return str(schema.name) not in ("aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided")


def _symbolic(target: Any) -> bool:
    """Arithmetic of sizes."""
    return getattr(target, "__module__", "") in ("_operator", "operator", "math", "torch") and not isinstance(target, type)


def written(view: FuseView) -> set[fx.Node]:
    """All nodes whose memory some operation of the graph writes to, as far as one can tell from schemas; rules leave them alone."""
    queue: list[fx.Node] = []
    for node in view.nodes:
        target = node.target
        if target is aten.detach_.default:
            continue  # it changes what torch remembers of a tensor, and no number
        if node.op == "call_function" and isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            queue.append(node)
            for i, argument in enumerate(target._schema.arguments):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
                    queue.extend(v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node))
    found: set[fx.Node] = set()
    while queue:
        node = queue.pop()
        if node in found:
            continue
        found.add(node)
        queue.extend(user for user in node.users if _may_alias(user))
        if _may_alias(node):
            queue.extend(node.all_input_nodes)
    return found


def _may_alias(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    named = str(target._schema.name).partition("::")[2]
    return named in _MAY_ALIAS or any(a.alias_info is not None for a in target._schema.arguments)


def stored(view: FuseView, name: str, value: Tensor, like: fx.Node) -> fx.Node:
    """A new constant of the graph, a buffer in the module of ``like``, and the node that reads it."""
    module: nn.Module = view.graph
    leaf, count = name, 1
    while hasattr(module, leaf):
        count += 1
        leaf = f"{name}_{count}"
    module.register_buffer(leaf, value, persistent=True)
    node = view.graph.graph.get_attr(leaf)
    node.meta["val"] = view.mode.from_tensor(value, static_shapes=True)
    if "nn_module_stack" in like.meta:
        node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
    return node


def tensors_of_adapters(view: FuseView) -> frozenset[str]:
    """The names of all tensors that methods attached."""
    return frozenset(name for attachment in view.program.attachments for name in attachment.tensors)


def positions(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """Where each node stands in its graph."""
    return {node: i for i, node in enumerate(nodes)}


def hoist(view: FuseView, node: fx.Node, before: fx.Node) -> bool:
    """Moves a node, and what it needs, in front of ``before`` unless it stands there already; False, and nothing moved, when it depends on
    ``before`` or on an input in between."""
    at = positions(view.graph.graph.nodes)
    moved: list[fx.Node] = []
    if not _collect(node, before, at, moved):
        return False
    for each in sorted(moved, key=at.__getitem__):
        before.prepend(each)
    return True


def _collect(node: fx.Node, before: fx.Node, at: dict[fx.Node, int], moved: list[fx.Node]) -> bool:
    if at[node] < at[before] or node in moved:
        return True
    if node is before or node.op not in ("get_attr", "call_function") or (node.op == "call_function" and not pure(node)):
        return False
    moved.append(node)
    return all(_collect(above, before, at, moved) for above in node.all_input_nodes)


def summands(node: fx.Node) -> Iterator[fx.Node]:
    """The leaves of a tree of plain sums whose inner sums nobody else reads, from left to right."""
    parts = pair(node, aten.add.Tensor)
    if parts is None:
        yield node
        return
    for part in parts:
        if is_call(part, aten.add.Tensor) and len(part.users) == 1 and pair(part, aten.add.Tensor):
            yield from summands(part)
        else:
            yield part
