"""Turning what surgery attached off and on again in a live module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def disabled(module: nn.Module) -> Iterator[None]:
    """Inside, attached modules pass their values through, so the module computes with its (possibly rewritten) base weights."""
    parts = [m for m in module.modules() if hasattr(m, "surgery_events") and getattr(m, "active", False)]
    for part in parts:
        part.active = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for part in parts:
            part.active = True  # type: ignore[assignment]
