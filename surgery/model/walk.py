"""Every module of a tree, and every tensor, in the order of ``named_modules``: analyses ask for them often, and torch's generators are nested."""

from __future__ import annotations

from torch import Tensor, fx, nn


def tree(root: nn.Module, *, every: bool = False) -> list[tuple[str, nn.Module]]:
    """Path and module, parents before children; a module that stands in several places once, or ``every`` time."""
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()
    waiting = [("", root)]
    while waiting:
        path, module = waiting.pop()
        if not every:
            if id(module) in seen:
                continue
            seen.add(id(module))
        found.append((path, module))
        lead = path + "." if path else ""
        waiting.extend((lead + name, child) for name, child in reversed(module._modules.items()) if child is not None)
    return found


def graphs(root: nn.Module) -> list[tuple[str, fx.GraphModule]]:
    """Those of :func:`tree` that run a graph."""
    return [(path, module) for path, module in tree(root) if isinstance(module, fx.GraphModule)]


def tensors(root: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, Tensor]]:
    """Parameters and buffers by every name that they have."""
    parameters: dict[str, nn.Parameter] = {}
    buffers: dict[str, Tensor] = {}
    for path, module in tree(root, every=True):
        lead = path + "." if path else ""
        parameters.update((lead + n, t) for n, t in module._parameters.items() if t is not None)
        buffers.update((lead + n, t) for n, t in module._buffers.items() if t is not None)
    return parameters, buffers


def inside(module: nn.Module, path: str) -> nn.Module:
    """The module at a path below another; KeyError where there is none."""
    for part in path.split(".") if path else ():
        found = module._modules[part]
        assert found is not None, path
        module = found
    return module
