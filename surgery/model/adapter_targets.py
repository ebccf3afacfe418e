"""Which layers the config of an adapter folder speaks of: peft puts nothing onto others, whatever tensors the folder has for them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from surgery.core.diagnostics import SurgeryError

Fault = Callable[..., SurgeryError]
EVERY = "all-linear"
"""The word for all linear layers."""


def left_out(config: Mapping[str, Any], paths: Iterable[str], fault: Fault) -> tuple[str, str]:
    """The first path that the config leaves out and the field that does, else two empty texts. Raises what ``fault`` gives for a field that cannot
    be read."""
    named = config.get("target_modules")
    if named is None or named == EVERY:
        return "", ""
    bare = [str(p) for p in config.get("target_parameters") or ()]
    for path in paths:
        if any(f"{path}.weight" == p or f"{path}.weight".endswith(f".{p}") for p in bare):
            continue
        try:
            field = _field(config, named, path)
        except (re.error, TypeError, ValueError, AttributeError):
            raise fault(
                "which layers it is for cannot be read from its config", "correct `target_modules` and the fields beside it"
            ) from None
        if field:
            return path, field
    return "", ""


def _field(config: Mapping[str, Any], named: Any, path: str) -> str:
    """The field by which a layer is left out, or an empty text."""
    without = config.get("exclude_modules")
    if without and _names(without, path):
        return "exclude_modules"
    for word in config.get("modules_to_save") or ():
        if re.match(rf"(^|.*\.){word}($|\..*)", path):
            return "modules_to_save"
    if not _names(named, path):
        return "target_modules"
    layers = config.get("layers_to_transform")
    if isinstance(named, str) or path in named or layers is None or layers == []:
        return ""
    number = _layer(config.get("layers_pattern"), path)
    chosen = [layers] if isinstance(layers, int) else list(layers)
    return "" if number is not None and number in chosen else "layers_to_transform"


def _names(words: Any, path: str) -> bool:
    """Whether a pattern is the whole path, or one of several words its end."""
    if isinstance(words, str):
        return re.fullmatch(words, path) is not None
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise TypeError(words)
    return any(path == w or path.endswith(f".{w}") for w in words)


def _layer(pattern: Any, path: str) -> int | None:
    """The number of the layer that a path is in: behind one of the names in ``pattern``, or the first number with something in front."""
    found = None
    if not pattern:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
    for word in [pattern] if isinstance(pattern, str) else pattern or ():
        found = found or re.match(rf"(?:^|.*?\.){word}\.(\d+)\.", path)
    return int(found[1]) if found else None
