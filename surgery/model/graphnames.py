"""What a stored graph may be written with: names, short forms of operations and dtypes, and the checks of each."""

from __future__ import annotations

import keyword
import re
from typing import Any

import torch
from torch import nn

from surgery.core.diagnostics import SurgeryError, fail
from surgery.model import modules as registry

SCHEMA = "surgery.graph/1"
MAX_MODULES = 200_000
MAX_NODES = 5_000_000
OPS = {"placeholder": "in", "get_attr": "get", "call_module": "mod", "call_function": "fn", "output": "out"}
OP_OF = {short: long for long, short in OPS.items()}
WORD = re.compile(r"(?!__)[A-Za-z0-9_][A-Za-z0-9_-]*")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")
_DUNDER = re.compile(r"__\w*__")
KINDS = ("tensor", "int", "float", "bool", "other")
FORMATS = {
    str(f).removeprefix("torch."): f for f in (torch.contiguous_format, torch.channels_last, torch.channels_last_3d, torch.preserve_format)
}
LAYOUTS = {"strided": torch.strided}
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "bool uint8 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128 float8_e4m3fn float8_e5m2 uint16 uint32 uint64"
    ).split()
}  # fmt: skip


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a short name; ValueError when there is none."""
    if name not in DTYPES:
        raise ValueError(f"dtype {str(name)[:40]!r}")
    return DTYPES[name]


def unknown_op(name: str, where: str) -> SurgeryError:
    return fail(
        "S0824", f"{where} uses the operation {name[:80]}, which is not on the list of operations that an artifact may hold",
        help="if the operation is harmless, add it to surgery/model/oplist.py and report it",
    )  # fmt: skip


def malformed(why: str) -> SurgeryError:
    return fail("S0826", f"the stored graph is damaged: {why}", help="emit the artifact again from its spec")


def is_word(name: str) -> bool:
    """Whether a name may be one step of a stored module path."""
    return WORD.fullmatch(name) is not None and not keyword.iskeyword(name)


def identifier(name: Any) -> str:
    """``name`` itself if it may stand unquoted in generated code; S0826 otherwise."""
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name) or keyword.iskeyword(name) or _DUNDER.fullmatch(name):
        raise malformed(f"{str(name)[:60]!r} is not a name")
    return name


def word(name: Any) -> str:
    """One step of a module path; S0826 for anything that is not a plain word."""
    if not isinstance(name, str) or not is_word(name):
        raise malformed(f"{str(name)[:60]!r} is not a module name")
    return name


def sizes(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, list) or any(type(s) is not int or s < 0 for s in shape):
        raise malformed("a tensor has no proper shape")
    return tuple(shape)


def _walk(root: nn.Module, path: str) -> nn.Module | None:
    for step in path.split("."):
        child = root._modules.get(word(step))
        if child is None:
            return None
        root = child
    return root


def find_tensor(root: nn.Module, path: str) -> tuple[str, nn.Module, str]:
    """(store, module, name) of a parameter or buffer below ``root``; the store is ``""`` when there is none."""
    if not isinstance(path, str):
        return "", root, ""
    where, _, name = path.rpartition(".")
    holder = _walk(root, where) if where else root
    if holder is not None:
        for store in ("_parameters", "_buffers"):
            if getattr(holder, store).get(word(name)) is not None:
                return store, holder, name
    return "", root, name


def can_be_called(root: nn.Module, path: Any) -> bool:
    found = _walk(root, path) if isinstance(path, str) else None
    return found is not None and type(found) not in registry.SCOPES
