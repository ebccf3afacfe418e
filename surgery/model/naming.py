"""Checkpoints whose tensors are named as the module's parameters are: no table of conversions applies to them.

Transformers builds its tables of all families before it looks into one, and looking needs a model of the class. Both cost more than reading the
headers of a checkpoint. What decides is small and the same for every checkpoint of a config: the prefix of the class and the patterns of stored names
that its table acts on. It is kept beside the capture, and where no stored name is touched by it, every tensor is the parameter of its name.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = "surgery.naming/1"


@dataclass(frozen=True)
class Naming:
    """``prefix`` of the class's base model, and the regular expressions that find stored names which are renamed or converted."""

    prefix: str
    patterns: tuple[str, ...]

    def keeps(self, stored: Iterable[str], parameters: Mapping[str, Any]) -> bool:
        """Whether all ``stored`` names are names of ``parameters`` that stay as they are, conservatively: a pattern may be meant for a part of the
        model only, and is held to be for all of it."""
        found = [re.compile(p) for p in self.patterns]
        for name in stored:
            if name not in parameters or f"{self.prefix}.{name}" in parameters or any(p.search(name) for p in found):
                return False
            if self.prefix and name.startswith(self.prefix) and re.sub(f"^{self.prefix}.", "", name, count=1) in parameters:
                return False
        return True


def naming_of(model: Any) -> Naming | None:
    """That of a transformers model; None where this version's table cannot be read that way."""
    from transformers import conversion_mapping

    if getattr(conversion_mapping, "USER_REGISTERED_MAPPINGS", None):
        return None
    patterns = [
        getattr(getattr(t, "compiled_sources", None), "pattern", None) for t in conversion_mapping.get_model_conversion_mapping(model)
    ]
    if any(not isinstance(p, str) for p in patterns):
        return None
    return Naming(str(model.base_model_prefix), tuple(map(str, patterns)))


def _file(folder: Path, key: str) -> Path:
    return folder / "captures" / f"{key}.naming.json"


def read_naming(folder: Path, key: str) -> Naming | None:
    """What is kept for a capture's key; None where there is nothing, nothing that can be read, or where this process registered tables of its own."""
    if getattr(sys.modules.get("transformers.conversion_mapping"), "USER_REGISTERED_MAPPINGS", None):
        return None
    try:
        data = json.loads(_file(folder, key).read_bytes())
        if data["schema"] != SCHEMA or data["key"] != key:
            return None
        patterns = tuple(str(p) for p in data["patterns"])
        for pattern in patterns:
            re.compile(pattern)
        return Naming(str(data["prefix"]), patterns)
    except (OSError, ValueError, KeyError, TypeError, re.error):
        return None


def write_naming(folder: Path, key: str, naming: Naming) -> None:
    """Keeps it, in one step; a folder that cannot be written is no error."""
    from surgery.model.capture.cache import replace_file

    text = json.dumps({"schema": SCHEMA, "key": key, "prefix": naming.prefix, "patterns": list(naming.patterns)}, separators=(",", ":"))
    with contextlib.suppress(OSError):
        _file(folder, key).parent.mkdir(parents=True, exist_ok=True)
        replace_file(_file(folder, key), text.encode())
