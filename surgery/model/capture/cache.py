"""Captures kept on disk: one safetensors file each, constants as tensors and the graph as JSON in its metadata.

The name of a file is the hash of everything that a capture depends on: the config, the class, the versions of Python, torch,
transformers and of the code that captures and stores. A file that is damaged, or that is not what its name says, is ignored and
written again. Nothing in a file is code: graphs are read with the same checks as any artifact's.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from surgery.core.diagnostics import SurgeryError
from surgery.core.version import VERSION
from surgery.model import graphjson
from surgery.model.capture.pipeline import Captured
from surgery.model.program import Signature

FORMAT = 1


@cache
def code_version() -> str:
    """Hash of the source files whose change may change a capture or its stored form."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(here.glob("*.py")), *(here.parent / n for n in ("graphjson.py", "modules.py", "pytree.py", "program.py"))]:
        with suppress(OSError):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def key_of(config: Any, architecture: str) -> str:
    """The name of a capture: a hash of config, class, versions and code."""
    import transformers

    versions = [FORMAT, VERSION, code_version(), torch.__version__, transformers.__version__, sys.version_info[:2]]
    plain = config.to_dict()
    plain.pop("_name_or_path", None)
    text = json.dumps([plain, type(config).__name__, architecture, versions], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def cached(config: Any, architecture: str, folder: Path, capture: Callable[[], Captured]) -> Captured:
    """The stored capture, else a new one that is then stored. A folder that cannot be written is no error."""
    key = key_of(config, architecture)
    path = folder / f"{key}.capture"
    found = read(path, key)
    if found is not None:
        return found
    made = capture()
    with suppress(OSError, SafetensorError):
        write(path, key, made)
    return made


def write(path: Path, key: str, captured: Captured) -> None:
    """Stores a capture whole or not at all."""
    sign = captured.signature
    body = json.dumps(
        {
            "graph": graphjson.dump(captured.graph),
            "signature": [list(sign.parameters), sign.in_spec, sign.out_spec, sign.constants, {k: list(v) for k, v in sign.symbols.items()}],
            "aliases": captured.aliases,
            "parameters": {k: [list(shape), dtype] for k, (shape, dtype) in captured.parameters.items()},
            "constants": list(captured.constants),
            "fallback": captured.fallback,
        },
        separators=(",", ":"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        tensors = {name: t.detach().cpu().clone().contiguous() for name, t in captured.constants.items()}
        save_file(tensors, temporary, metadata={"key": key, "capture": body, "digest": hashlib.sha256(body.encode()).hexdigest()})
        os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()


def read(path: Path, key: str) -> Captured | None:
    """A stored capture, or None when there is none that is sound."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata() or {}
            body = meta.get("capture", "")
            if meta.get("key") != key or meta.get("digest") != hashlib.sha256(body.encode()).hexdigest():
                return None
            data = json.loads(body)
            constants = {name: file.get_tensor(name) for name in data["constants"]}
        parameters, in_spec, out_spec, fixed, symbols = data["signature"]
        return Captured(
            graph=graphjson.load(data["graph"]),
            signature=Signature(tuple(parameters), in_spec, out_spec, fixed, {k: tuple(v) for k, v in symbols.items()}),
            aliases=data["aliases"],
            constants=constants,
            parameters={k: (tuple(shape), dtype) for k, (shape, dtype) in data["parameters"].items()},
            fallback=data["fallback"],
        )
    except (OSError, SafetensorError, SurgeryError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
