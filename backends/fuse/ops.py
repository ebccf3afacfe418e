"""The fused operations of this folder together: importing it registers all of them, and their ONNX forms are collected here."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import Any


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """For ``custom_translation_table``: the ONNX form of every fused operation (``translations()`` of every module ``ops_*``)."""
    import surgery.backends.fuse as package

    found: dict[Any, Callable[..., Any]] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        if info.name.startswith("ops_"):
            found |= importlib.import_module(f"{package.__name__}.{info.name}").translations()
    return found
