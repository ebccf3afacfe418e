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


INSTEAD = {
    "transformers": 'write `emit torch to "..."`: `surgery.load` opens it as a module with the original signature',
    "peft": 'write `emit torch to "..."`: it keeps the adapters apart from the base and trains on; `fold all` above it merges them',
    "pt2": 'write `emit onnx to "....onnx"` for serving, or compile what `surgery.load` opens with torch.compile',
}
"""What to write where a backend of the language is not there."""


def require(name: str, span: Span | None = None) -> None:
    """Raises S0843 when this version has no backend of that name; imports none."""
    if name not in names():
        instead = [INSTEAD[name]] if name in INSTEAD else []
        raise fail(
            "S0843", f"this version of surgery cannot emit `{name}` yet", span, "asked for here",
            help=[*instead, f"this version emits {', '.join(names())}"], exit_code=1,
        )  # fmt: skip


def get(name: str, span: Span | None = None) -> Backend:
    """The backend object. Raises S0843 when this version has none of that name."""
    require(name, span)
    module = importlib.import_module(f"surgery.backends.to_{name}")
    return cast(Backend, module.BACKEND)
