"""The pages of codes and methods as ``explain`` shows them, from the packaged copies."""

from __future__ import annotations

import json
import pkgutil
from functools import lru_cache
from pathlib import Path

import surgery
import surgery.backends
from surgery.core.catalogue import BACKENDS

PAGES = Path(surgery.__file__).parent / "core" / "errors.json"


@lru_cache(maxsize=1)
def pages() -> dict[str, str]:
    """Code -> Markdown page. Empty when the file has not been generated."""
    try:
        found: dict[str, str] = json.loads(PAGES.read_text("utf-8"))["pages"]
    except OSError:
        return {}
    return found


def headlines() -> dict[str, str]:
    """Code -> headline."""
    return {code: page.split("\n", 1)[0].partition(": ")[2] for code, page in pages().items()}


def absent() -> tuple[str, ...]:
    """The outputs of the language that this installation has no backend for; found by file name, so that nothing heavy is imported."""
    here = {m.name.removeprefix("to_") for m in pkgutil.iter_modules(surgery.backends.__path__)}
    return tuple(name for name in BACKENDS if name not in here)
