"""Backends by the name that ``emit`` uses. One module ``to_<name>.py`` each, found by its file name."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import cast

import surgery.backends
from surgery.backends.protocol import Backend, EmitRequest
from surgery.core.diagnostics import fail
from surgery.core.source import Span

request = EmitRequest


def names() -> list[str]:
    """The backends of this installation, sorted."""
    return sorted(m.name.removeprefix("to_") for m in pkgutil.iter_modules(surgery.backends.__path__) if m.name.startswith("to_"))


def get(name: str, span: Span | None = None) -> Backend:
    """The backend object. Raises S0843 when this version has none of that name."""
    if name not in names():
        raise fail(
            "S0843", f"this version of surgery cannot emit `{name}` yet", span, "asked for here",
            help=f"it emits {', '.join(names())}", exit_code=1,
        )  # fmt: skip
    module = importlib.import_module(f"surgery.backends.to_{name}")
    return cast(Backend, module.BACKEND)
