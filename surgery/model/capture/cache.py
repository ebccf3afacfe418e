"""Captures kept on disk in the artifact's graph format: a JSON file and, beside it, the constants as safetensors.

An entry is named by the hash of everything that decides a capture. It holds that hash again and the hash of its content; one
that does not agree in both, or does not load, is ignored and written again. Writing replaces files in one step.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from surgery.core.diagnostics import SurgeryError
from surgery.model import graphjson, pytree
from surgery.model.capture.pipeline import Captured
from surgery.model.program import Signature

VERSION = 1  # of the capture's own rules; raised whenever the same model would be captured differently


@cache
def code_version() -> str:
    """Hash of the sources that make, describe and store a capture: a change of them must not meet captures from before."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in [*sorted(here.glob("*.py")), *(here.parent / name for name in ("graphjson.py", "modules.py", "pytree.py", "program.py"))]:
        with contextlib.suppress(OSError):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cache_key(config: Any, architecture: str) -> str:
    """Hash of the config, the class, and the versions of torch, transformers and the capture."""
    plain = dict(config) if isinstance(config, dict) else config.to_dict()
    for name in ("transformers_version", "_name_or_path", "name_or_path", "torch_dtype", "dtype"):
        plain.pop(name, None)
    parts = [plain, architecture, torch.__version__, version("transformers"), VERSION, graphjson.SCHEMA, code_version()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def cached(config: Any, architecture: str, folder: Path, capture: Callable[[], Captured]) -> Captured:
    """The stored capture of this config, else ``capture()`` and store it. A folder that cannot be written is no error."""
    key = cache_key(config, architecture)
    found = _read(folder, key)
    if found is not None:
        return found
    fresh = capture()
    with contextlib.suppress(OSError, SurgeryError):  # a graph that the format cannot hold is traced again each time
        _write(folder, key, fresh)
    return fresh


def _files(folder: Path, key: str) -> tuple[Path, Path]:
    return folder / "captures" / f"{key}.json", folder / "captures" / f"{key}.safetensors"


def _digest(body: dict[str, Any], constants: bytes) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode() + b"\0" + constants).hexdigest()


def _write(folder: Path, key: str, capture: Captured) -> None:
    signature = capture.signature
    body = {
        "graph": graphjson.dump(capture.graph),
        "signature": {
            "parameters": list(signature.parameters), "in_spec": signature.in_spec, "out_spec": signature.out_spec,
            "constants": signature.constants, "symbols": {k: list(v) for k, v in signature.symbols.items()},
        },
        "aliases": capture.aliases,
        "parameters": {name: [list(shape), dtype] for name, (shape, dtype) in capture.parameters.items()},
        "constants": list(capture.constants),
        "fallback": capture.fallback, "notes": list(capture.notes),
    }  # fmt: skip
    tensors = save_tensors({name: t.contiguous().clone() for name, t in capture.constants.items()})
    text = json.dumps({"schema": "surgery.capture/1", "key": key, "hash": _digest(body, tensors), "body": body}, separators=(",", ":"))
    plain, binary = _files(folder, key)
    plain.parent.mkdir(parents=True, exist_ok=True)
    replace_file(binary, tensors)
    replace_file(plain, text.encode())


def replace_file(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all. OSError where it cannot be written."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".capture-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _read(folder: Path, key: str) -> Captured | None:
    plain, binary = _files(folder, key)
    try:
        data = json.loads(plain.read_bytes())
        tensors = binary.read_bytes()
        body = data["body"]
        if data["schema"] != "surgery.capture/1" or data["key"] != key or data["hash"] != _digest(body, tensors):
            return None
        values = load_tensors(tensors)
        stored = body["signature"]
        return Captured(
            graph=graphjson.load(body["graph"]),
            signature=Signature(
                tuple(stored["parameters"]), pytree.check(stored["in_spec"], classes=False),
                pytree.check(stored["out_spec"], classes=False), dict(stored["constants"]),
                {k: (str(name), int(axis), int(size)) for k, (name, axis, size) in stored["symbols"].items()},
            ),
            aliases=dict(body["aliases"]),
            constants={name: values[name] for name in body["constants"]},
            parameters={name: (tuple(shape), str(dtype)) for name, (shape, dtype) in body["parameters"].items()},
            fallback=str(body["fallback"]), notes=tuple(map(str, body["notes"])),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, SurgeryError):
        return None
    except Exception as error:  # safetensors has an error class of its own
        if type(error).__module__.startswith("safetensors"):
            return None
        raise
