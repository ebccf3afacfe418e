"""What the tensors of an adapter file are called: ``base_model.model.<module>.lora_A[.<name>].weight`` and its relatives."""

from __future__ import annotations

import re
from dataclasses import dataclass

from surgery.model.adapter_forms import Kind

PREFIX = "base_model.model."

LOW = ("A", "B", "embedding_A", "embedding_B", "magnitude", "shift")
"""Roles of the tensors of a low-rank part."""

_FACTOR = re.compile(r"(?P<path>.+)\.lora_(?P<role>A|B)(?:\.(?P<name>[^.]+))?\.(?P<leaf>weight|bias)")
_EMBEDDING = re.compile(r"(?P<path>.+)\.lora_(?P<role>embedding_A|embedding_B)(?:\.(?P<name>[^.]+))?")
_MAGNITUDE = re.compile(r"(?P<path>.+)\.lora_magnitude_vector(?:\.(?P<name>[^.]+))??(?:\.weight)?")
_ROWS = re.compile(r"(?P<path>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
_NORM = re.compile(r"(?P<path>.+)\.ln_tuning_layers(?:\.[^.]+)??\.(?P<leaf>weight|bias)")
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save(?:\.[^.]+)?\.(?P<leaf>.+)")


@dataclass(frozen=True)
class Key:
    """``role`` is one of :data:`LOW`, ``whole`` (a tensor of the base that was trained), ``rows`` (some rows of a table) or ``copy`` (one that is saved along); ``path`` the
    module, of the last two the tensor's name. ``problem`` says what kind of tensor it is that cannot be read."""

    role: str
    path: str
    problem: str = ""
    help: str = ""


def key_of(key: str) -> Key:
    """What a tensor's key says."""
    text = key.removeprefix(PREFIX)
    if m := _ROWS.fullmatch(text):
        return Key("rows", m["path"])
    if m := _FACTOR.fullmatch(text):
        return _low(m["path"], "shift" if m["leaf"] == "bias" else m["role"], m["role"] == "A" and m["leaf"] == "bias")
    if m := _EMBEDDING.fullmatch(text) or (_MAGNITUDE.fullmatch(text)):
        return _low(m["path"], m.groupdict().get("role") or "magnitude")
    if "lora_" in text.rpartition(".base_layer.")[2]:
        return Key("", text, "a tensor of a variant of LoRA that surgery does not know", "save the adapter as a plain LoRA")
    return _beside(text)


def other_key(key: str, kind: Kind) -> Key:
    """What a tensor's key says in a folder of another kind than LoRA."""
    text = key.removeprefix(PREFIX)
    short = re.sub(r"^base_model\.(model\.)?", "", key).removesuffix(".weight")
    name = short.partition(".")[0]
    if name in kind.shared:
        return Key("shared", short if kind.parted else name)
    for role in kind.roles:
        if m := re.fullmatch(rf"(?P<path>.+?)\.{re.escape(role)}(?:\.[^.]+?)??(?:\.weight)?", text):
            return _low(m["path"], kind.roles[role])
    for word, why in (kind.refused or {}).items():
        if f".{word}" in text:
            return Key("", text, why, "train it without that, or give peft's `convert_to_lora` a try")
    return _beside(text)


def _beside(text: str) -> Key:
    """Tensors of the base that stand beside the parts."""
    if m := _ROWS.fullmatch(text):
        return Key("rows", m["path"])
    if m := _NORM.fullmatch(text):
        return Key("whole", f"{m['path']}.{m['leaf']}")
    if m := _SAVED.fullmatch(text):
        return Key("whole", f"{m['path']}.{m['leaf']}")
    if ".base_layer." in text:
        name = text.replace(".base_layer.", ".")
        return Key("whole" if name.endswith("bias") else "copy", name)
    return Key("whole", text)


def _low(path: str, role: str, wrong: bool = False) -> Key:
    if wrong:
        return Key("", path, "a bias behind its first factor", "save the adapter as a plain LoRA")
    return Key(role, path)


def factor_keys(path: str, embedding: bool) -> tuple[str, str]:
    """The keys of ``A`` and ``B`` of the module at ``path``."""
    if embedding:
        return f"{PREFIX}{path}.lora_embedding_A", f"{PREFIX}{path}.lora_embedding_B"
    return f"{PREFIX}{path}.lora_A.weight", f"{PREFIX}{path}.lora_B.weight"


def magnitude_key(path: str) -> str:
    return f"{PREFIX}{path}.lora_magnitude_vector"
