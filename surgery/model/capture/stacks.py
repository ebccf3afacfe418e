"""Which modules are repeated layers, and which of them are twins."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_STRUCTURE = {
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training", "forward", "layer_idx", "layer_id",
    "_is_full_backward_hook", "_is_hf_initialized", "_hf_hook",
}  # fmt: skip


def find_stacks(module: nn.Module) -> list[str]:
    """Paths of the repeated layers below ``module``, in order; none lies inside another.

    A layer is a member of a ``ModuleList`` or ``Sequential`` with a sibling of its class. Where the siblings of a list have
    no two of equal shape (the stages of a pyramid) and hold lists of their own that do, those inner members are the layers.
    """
    return list(dict.fromkeys(_stacks(module, "")))


def _members(container: nn.Module) -> list[tuple[str, nn.Module]]:
    """The children of a list that repeat, leaves excluded; a list of one counts when it is a ModuleList."""
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        return []
    inner = [(name, child) for name, child in container.named_children() if next(child.children(), None) is not None]
    classes = Counter(type(child) for _, child in inner)
    lonely = isinstance(container, nn.ModuleList) and len(inner) == 1 and len(container) == 1
    return [(name, child) for name, child in inner if classes[type(child)] > 1 or lonely]


def _stacks(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        members = _members(child)
        if not members:
            yield from _stacks(child, f"{path}.")
            continue
        shapes = Counter(_shape_signature(member) for _, member in members)
        if max(shapes.values()) > 1:
            yield from (f"{path}.{member}" for member, _ in members)
            continue
        deeper = [inner for inner in _stacks(child, f"{path}.") if inner]
        if deeper and _has_pair(module, name, deeper, path, len(members)):
            yield from deeper
        elif isinstance(child, nn.ModuleList):
            yield from (f"{path}.{member}" for member, _ in members)
        else:
            yield from deeper


def _has_pair(owner: nn.Module, name: str, deeper: list[str], path: str, members: int) -> bool:
    """Whether the inner layers are better layers: two of equal shape in one list, or one list holding one shared layer."""
    if members == 1:
        return True
    container = getattr(owner, name)
    found: Counter[Any] = Counter()
    for inner in deeper:
        parent, _, _ = inner.rpartition(".")
        found[(parent, _shape_signature(container.get_submodule(inner.removeprefix(f"{path}."))))] += 1
    return max(found.values()) > 1


def _shape_signature(module: nn.Module) -> tuple[Any, ...]:
    classes = tuple((name, type(sub)) for name, sub in module.named_modules())
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    return classes, shapes


class Signatures:
    """Static signatures of modules, computed once each: equal signatures mean that equal calls trace to equal graphs.

    Everything a ``forward`` can read from the module counts (classes, training flags, attributes deeply, hooks, parameter
    and buffer shapes), except the layer index, and the rates of dropout and stochastic depth, which stay with each layer's
    own leaf.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[nn.Module, Any]] = {}

    def of(self, module: nn.Module) -> Any:
        found = self._known.get(id(module))
        if found is None:
            seen: dict[int, int] = {}
            found = (module, self._module(module, seen))
            self._known[id(module)] = found
        return found[1]

    def _module(self, module: nn.Module, seen: dict[int, int]) -> Any:
        if id(module) in seen:
            return ("again", seen[id(module)])
        seen[id(module)] = len(seen)
        rate = _rate_name(module)
        attributes = []
        for key, value in sorted(module.__dict__.items()):
            if (
                key in _STRUCTURE
                or (key.endswith("_hooks") and not value)
                or key.endswith("_with_kwargs")
                or key.endswith("_always_called")
            ):
                continue
            attributes.append((key, value > 0 if key == rate and isinstance(value, (int, float)) else _frozen(value, 0)))
        tensors = [
            (kind, name, None if t is None else (tuple(t.shape), t.dtype, seen.setdefault(id(t), len(seen))))
            for kind, table in (("p", module._parameters), ("b", module._buffers))
            for name, t in table.items()
        ]
        children = [(name, None if c is None else self._module(c, seen)) for name, c in module._modules.items()]
        return (type(module), module.training, tuple(attributes), tuple(tensors), tuple(children))


def is_drop_path(module: nn.Module) -> bool:
    """Stochastic depth, by what it is called and holds: a class named so with a drop probability and no tensors."""
    name = type(module).__name__.lower()
    named = "droppath" in name or "stochasticdepth" in name
    return named and drop_path_rate(module) is not None and not module._parameters and not module._buffers


def drop_path_rate(module: nn.Module) -> float | None:
    for key in ("drop_prob", "p"):
        value = getattr(module, key, None)
        if isinstance(value, (int, float)):
            return float(value)
    return None


def _rate_name(module: nn.Module) -> str:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return "p"
    if is_drop_path(module):
        return "drop_prob" if isinstance(getattr(module, "drop_prob", None), (int, float)) else "p"
    return ""


def _frozen(value: Any, depth: int) -> Any:
    """A hashable stand-in: equal by value for plain data, by identity for anything that cannot be compared deeply."""
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size, type)):
        return (type(value).__name__, value)
    if depth > 6 or isinstance(value, torch.Tensor):
        return ("id", id(value))
    if isinstance(value, functools.partial):
        return ("partial", _frozen(value.func, depth + 1), _frozen(value.args, depth + 1), _frozen(value.keywords, depth + 1))
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, tuple(_frozen(v, depth + 1) for v in value))
    if isinstance(value, dict):
        return ("dict", tuple((str(k), _frozen(v, depth + 1)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return ("set", tuple(sorted(repr(_frozen(v, depth + 1)) for v in value)))
    if callable(value) and hasattr(value, "__func__"):
        return ("method", id(value.__func__))
    return ("id", id(value))
