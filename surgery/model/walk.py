"""Every module of a tree, and every tensor, in the order of ``named_modules``: analyses ask for them often, and torch's generators are nested."""

from __future__ import annotations

from torch import Tensor, fx, nn


def tree(root: nn.Module, *, every: bool = False) -> list[tuple[str, nn.Module]]:
    """Path and module, parents before children; a module that stands in several places once, or ``every`` time."""
    found: list[tuple[str, nn.Module]] = [("", root)]
    _below(root, "", found, None if every else {id(root)})
    return found


def _below(module: nn.Module, lead: str, found: list[tuple[str, nn.Module]], seen: set[int] | None) -> None:
    for name, child in module._modules.items():
        if child is None:
            continue
        if seen is not None:
            if id(child) in seen:
                continue
            seen.add(id(child))
        path = lead + name
        found.append((path, child))
        if child._modules:
            _below(child, path + ".", found, seen)


def edits(module: nn.Module) -> int | None:
    """Which argument an attached module passes on changed; None for a module of the model itself. (``hasattr`` makes torch raise and
    word an error for each module that has no such attribute.)"""
    found = module.__dict__.get("edits")
    return getattr(type(module), "edits", None) if found is None else found


def edited(root: nn.Module) -> bool:
    """Whether anything below is attached."""
    return any(edits(module) is not None for _, module in tree(root))


def graphs(root: nn.Module) -> list[tuple[str, fx.GraphModule]]:
    """Those of :func:`tree` that run a graph."""
    return [(path, module) for path, module in tree(root) if isinstance(module, fx.GraphModule)]


def tensors(root: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters and buffers by every name that they have."""
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    for path, module in tree(root, every=True):
        lead = path + "." if path else ""
        for store, found in ((module._parameters, parameters), (module._buffers, buffers)):
            for n, t in store.items():
                if t is not None:
                    found[lead + n] = t  # type: ignore[assignment]
    return parameters, buffers


def inside(module: nn.Module, path: str) -> nn.Module:
    """The module at a path below another; KeyError where there is none."""
    for part in path.split(".") if path else ():
        found = module._modules[part]
        assert found is not None, path
        module = found
    return module
