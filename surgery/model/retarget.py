"""Another dtype or device for a captured graph.

A capture writes the model's own dtype as bfloat16, because only then every cast is recorded; so the dtype of a graph is the
one its bfloat16 constants are replaced by. A device is recorded wherever a tensor is made, and is replaced likewise. Torch's product of
sorted rows is restricted to some dtypes and sizes; to be run it becomes our own, which gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from surgery.model import grouped  # noqa: F401  (registers surgery.grouped_mm)
from surgery.model.program import ValueSpec


def graphs_of(root: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    """Path and module of every GraphModule of a tree, the root first, a shared one once."""
    for path, module in root.named_modules():
        if isinstance(module, fx.GraphModule):
            yield path, module


def retarget(
    graph: nn.Module, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None, source: torch.dtype = torch.bfloat16
) -> None:
    """Rewrites the constants of all graphs of a tree in place: ``source`` becomes ``dtype`` (also the smallest and largest
    number of ``source``, which masks are filled with), every recorded device becomes ``device``. Weights are not touched."""
    where = torch.device(device) if isinstance(device, str) else device
    if dtype == source:
        dtype = None
    if dtype is None and where is None:
        return
    for _, gm in graphs_of(graph):
        if retarget_graph(gm.graph, dtype=dtype, device=where, source=source):
            gm.recompile()


def retarget_graph(
    graph: fx.Graph, *, dtype: torch.dtype | None = None, device: torch.device | None = None, source: torch.dtype = torch.bfloat16
) -> bool:
    """:func:`retarget` for one graph; True when a constant of it was rewritten."""
    if dtype == source:
        dtype = None
    change = _changer(source, dtype, device)
    changed = False
    for node in graph.nodes:
        if node.target is torch.ops.aten._grouped_mm.default:
            changed |= _any_size(node)
        if node.op in ("call_function", "call_module"):
            args, kwargs = _map(node.args, change), _map(node.kwargs, change)
            if not _same(args, node.args) or not _same(kwargs, node.kwargs):
                node.args, node.kwargs = args, kwargs
                changed = True
        if dtype is not None and "spec" in node.meta:
            node.meta["spec"] = _respec(node.meta["spec"], _name(source), _name(dtype))
    return changed


def _any_size(node: fx.Node) -> bool:
    """Torch's product of sorted rows as ours; one of batches, or with a bias, stays."""
    offsets = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
    if offsets is None or len(node.args) > 3 or set(node.kwargs) - {"offs"}:
        return False
    node.target, node.args, node.kwargs = torch.ops.surgery.grouped_mm.default, (*node.args[:2], offsets), {}
    return True


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _changer(source: torch.dtype, dtype: torch.dtype | None, device: torch.device | None) -> Callable[[Any], Any]:
    low, high = torch.finfo(source).min, torch.finfo(source).max

    def change(value: Any) -> Any:
        if isinstance(value, torch.dtype):
            return dtype if dtype is not None and value == source else value
        if isinstance(value, torch.device):
            return device if device is not None else value
        if type(value) is float and dtype is not None:
            if value == low:
                return torch.finfo(dtype).min
            if value == high:
                return torch.finfo(dtype).max
        return value

    return change


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_map(v, change) for v in value) if type(value) in (list, tuple) else [_map(v, change) for v in value]
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    return change(value)


def _same(a: Any, b: Any) -> bool:
    """Equality that does not take True for 1 and keeps fx's own list types apart from nothing."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    return bool(type(a) is type(b) and a == b)


def _respec(spec: Any, source: str, dtype: str) -> Any:
    if isinstance(spec, tuple):
        return tuple(_respec(s, source, dtype) for s in spec)
    if isinstance(spec, ValueSpec) and spec.dtype == source:
        return replace(spec, dtype=dtype)
    return spec
