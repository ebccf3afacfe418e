"""Modules that a model casts to another type while it runs: ``self.classifier = self.classifier.to(torch.float32)``.

Parameters of a trace cannot be exchanged. Inside it such a module computes with its parameters cast, at each call; it stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def casting(model: nn.Module) -> Iterator[None]:
    """While inside, ``to`` of a module of ``model`` with a floating type leaves its parameters alone and casts them where they are read."""
    own = set(model.modules())
    changed: dict[nn.Module, torch.dtype] = {}
    original = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        if self not in own or dtype is None:
            return original(self, *args, **kwargs)
        if self in changed or any(p.dtype != dtype for p in self.parameters() if p.is_floating_point()):
            if self not in changed:
                self.__dict__["forward"] = _casted(self, self.forward, changed)
            changed[self] = dtype
        return self

    nn.Module.to = to  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = original  # type: ignore[method-assign]
        for module in changed:
            module.__dict__.pop("forward", None)


def _casted(module: nn.Module, forward: Any, wanted: dict[nn.Module, torch.dtype]) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        tables = [(table, dict(table)) for m in module.modules() for table in (m._parameters,)]
        for table, held in tables:
            for name, tensor in held.items():
                if tensor is not None and tensor.is_floating_point():
                    table[name] = tensor.to(wanted[module])  # type: ignore[assignment]
        try:
            return forward(*args, **kwargs)
        finally:
            for table, held in tables:
                table.update(held)

    return run
