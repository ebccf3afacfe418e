"""Where a parameter multiplies something: the products that read it, and what stands on each of its axes there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from surgery.core.site import NodeRef
from surgery.model import grouped  # noqa: F401  (registers surgery.grouped_mm)
from surgery.model.flat import constants, flatten
from surgery.model.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Use:
    """One product of a value ``x`` with a parameter (or rows of it).

    ``ref`` is the node of the program's tree and ``x`` the number of the argument there. ``kind`` is ``linear`` (features on
    the last axis of ``x``), ``grouped`` (rows of ``x`` sorted by expert, ends in argument ``offsets``), ``stacked`` (``x`` has
    the experts in front), ``conv`` or ``transposed`` (a transposed convolution). ``in_axis`` and ``expert_axis`` are axes of the stored
    parameter; ``rows`` = (axis, start, stop) when the product reads only a slice. ``conv`` holds stride, padding, dilation, groups and
    padding mode.
    """

    ref: NodeRef
    kind: str
    x: int
    in_axis: int
    expert_axis: int | None = None
    offsets: int = 2
    rows: tuple[int, int, int] | None = None
    conv: tuple[Any, ...] = ()


@dataclass(frozen=True)
class _View:
    """A view of a parameter on its way to a product: the stored axis behind each axis, and a slice."""

    axes: tuple[int, ...]
    rows: tuple[int, int, int] | None = None


def uses_of(program: Program, names: Iterable[str]) -> dict[str, list[Use]]:
    """For each parameter (by first name) the products that read it, in graph order. A parameter that is read in another way too
    (looked up as a table, added as a bias) has those uses left out; one that is in no product has an empty list."""
    graph = flatten(program.graph, program.aliases)
    found = constants(graph)
    out: dict[str, list[Use]] = {}
    for name in names:
        first = program.aliases.get(name, name)
        node = found.get(first)
        uses: list[Use] = []
        if node is not None:
            shape = tuple(node.meta["spec"].shape)
            _walk(program, node, _View(tuple(range(len(shape)))), uses)
        out[first] = uses
    return out


def _walk(program: Program, node: fx.Node, view: _View, uses: list[Use]) -> None:
    for user in node.users:
        step = _through(user, node, view)
        if step is not None:
            _walk(program, user, step, uses)
            continue
        use = _product(program, user, node, view)
        if use is not None:
            uses.append(use)


def _through(user: fx.Node, node: fx.Node, view: _View) -> _View | None:
    """The view behind an operation that only looks at the parameter otherwise; None for any other operation."""
    args = user.args
    if not args or args[0] is not node:
        return None
    rank = len(view.axes)
    match user.target:
        case aten.to.dtype | aten.to.device | aten.contiguous.default | aten.clone.default | aten.detach.default | aten.alias.default:
            return view
        case aten.t.default if rank == 2:
            return _View(view.axes[::-1], view.rows)
        case aten.numpy_T.default:
            return _View(view.axes[::-1], view.rows)
        case aten.transpose.int | aten.swapaxes.default:
            axes = list(view.axes)
            a, b = int(args[1]) % rank, int(args[2]) % rank  # type: ignore[arg-type]
            axes[a], axes[b] = axes[b], axes[a]
            return _View(tuple(axes), view.rows)
        case aten.permute.default if isinstance(args[1], list | tuple):
            return _View(tuple(view.axes[int(i) % rank] for i in args[1]), view.rows)  # type: ignore[call-overload]
        case aten.slice.Tensor if view.rows is None:
            return _sliced(user, node, view)
    return None


def _sliced(user: fx.Node, node: fx.Node, view: _View) -> _View | None:
    given: list[Any] = list(user.args[1:])
    axis, start, stop, step = given + [0, 0, 1 << 62, 1][len(given) :]
    if step != 1 or not all(isinstance(v, int) for v in (axis, start, stop)):
        return None
    size = int(node.meta["spec"].shape[axis])
    start, stop = (v + size if v < 0 else min(v, size) for v in (start, stop))
    return _View(view.axes, (view.axes[axis], start, stop))


def _product(program: Program, user: fx.Node, node: fx.Node, view: _View) -> Use | None:
    args = user.args
    at = [i for i, a in enumerate(args) if a is node]
    if not at:
        return None
    axes = view.axes
    found: tuple[str, int, int, int | None, tuple[Any, ...]] | None = None
    match user.target:
        case aten.linear.default if at == [1] and len(axes) == 2:
            found = ("linear", 0, axes[1], None, ())
        case aten.matmul.default | aten.mm.default if at == [1] and len(axes) == 2:
            found = ("linear", 0, axes[0], None, ())
        case aten.addmm.default if at == [2]:
            found = ("linear", 1, axes[0], None, ())
        case aten._grouped_mm.default | torch.ops.surgery.grouped_mm.default if at == [1] and len(axes) == 3 and len(args) > 2:
            found = ("grouped", 0, axes[1], axes[0], ())
        case aten.bmm.default | aten.matmul.default if at == [1] and len(axes) == 3:
            found = ("stacked", 0, axes[1], axes[0], ())
        case aten.baddbmm.default if at == [2] and len(axes) == 3:
            found = ("stacked", 1, axes[1], axes[0], ())
        case _:
            found = _convolution(user, at, axes)
    if found is None:
        return None
    kind, x, in_axis, expert_axis, conv = found
    if view.rows is not None and view.rows[0] == in_axis:
        return None
    return _in_tree(program, user, Use(user.meta["origin"], kind, x, in_axis, expert_axis, 2, view.rows, conv))


def _convolution(user: fx.Node, at: list[int], axes: tuple[int, ...]) -> tuple[str, int, int, int | None, tuple[Any, ...]] | None:
    name = str(user.target)
    if at != [1] or axes != tuple(range(len(axes))) or "conv" not in name:
        return None
    args = user.args
    if "conv_transpose" in name:
        return ("transposed", 0, 0, None, ())
    rank = len(axes) - 2
    rest = [args[i] if len(args) > i else default for i, default in ((3, 1), (4, 0), (5, 1), (6, 1))]
    if name.startswith("aten.convolution"):
        if args[6]:
            return ("transposed", 0, 0, None, ())
        rest = [args[3], args[4], args[5], args[8]]
    stride, padding, dilation, groups = rest
    return (
        "conv",
        0,
        1,
        None,
        (_each(stride, rank), padding if isinstance(padding, str) else _each(padding, rank), _each(dilation, rank), groups, ""),
    )


def _each(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(int(v) for v in value) if isinstance(value, list | tuple) else (int(value),)
    return values if len(values) == rank else values * rank


def _in_tree(program: Program, user: fx.Node, use: Use) -> Use | None:
    """The use as it stands in the tree, where an ``nn`` leaf is one call; None when its argument is not to be seen there."""
    node = program.node(use.ref)
    if node.op == "call_function":
        return use if node.target is user.target else None
    if node.op != "call_module":
        return None
    path = f"{use.ref.graph}.{node.target}" if use.ref.graph else str(node.target)
    module = program.module(path)
    if isinstance(module, nn.modules.conv._ConvNd):
        mode = module.padding_mode
        padding = tuple(module._reversed_padding_repeated_twice) if mode != "zeros" else use.conv[1] if use.conv else ()
        conv = (*use.conv[:1], padding, *use.conv[2:4], "" if mode == "zeros" else mode) if use.conv else ()
        return Use(use.ref, use.kind, 0, use.in_axis, use.expert_axis, use.offsets, use.rows, conv)
    if isinstance(module, nn.Linear):
        return Use(use.ref, use.kind, 0, use.in_axis, None, use.offsets, use.rows, ())
    return None
