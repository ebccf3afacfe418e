"""Checkpoints: what a model reference names, known from its config and tensor headers alone.

:func:`open_checkpoint` reads the config and the headers; :func:`surgery.model.checkpoint_bind.bind` maps the stored tensors to the
parameters of a module as lazy expressions. No weight is read, no network is used and no code of a checkpoint runs.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from surgery.core.source import Span
from surgery.model.artifact_open import compare_hashes
from surgery.model.checkpoint_config import architecture_of, check_family, read_config
from surgery.model.checkpoint_headers import TensorHeader, read_header
from surgery.model.checkpoint_refs import Ref, load_factory, resolve
from surgery.model.checkpoint_shards import find_weights, read_tensors
from surgery.model.contenthash import Hashing
from surgery.model.weights import Weights, is_float

__all__ = ["Checkpoint", "TensorHeader", "open_checkpoint"]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "source.spm", "target.spm", "normalizer.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "image_processor_config.json", "feature_extractor_config.json", "generation_config.json",
)  # fmt: skip
"""What :func:`tokenizer_files_in` copies along: everything beside config and weights that a user of the model needs."""

SENTENCE_FILES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")


@dataclass(frozen=True)
class Checkpoint:
    """One opened model reference.

    ``kind`` is ``transformers`` (a folder or cached hub model with weights), ``config`` (a config only: seeded random weights),
    ``minilm``, ``artifact`` (surgery's own) or ``python`` (``module`` then holds the module, ``inputs`` what the factory gave beside
    it). ``path`` is the folder; ``family`` the config's ``model_type``; ``dtype`` the floating dtype of most stored bytes;
    ``hash`` the identity of config and headers (never of weight bytes).
    """

    ref: str
    kind: str
    path: Path | None
    config: dict[str, Any]
    family: str
    architecture: str
    dtype: str
    tensors: dict[str, TensorHeader]
    hash: str
    files: tuple[Path, ...] = ()
    tokenizer_files: tuple[Path, ...] = ()
    seed: int = 0
    module: Any = field(default=None, repr=False, compare=False)
    inputs: Any = field(default=None, repr=False, compare=False)
    hashing: Hashing | None = field(default=None, repr=False, compare=False)

    @property
    def random(self) -> bool:
        """Whether the weights are seeded random values."""
        return self.kind == "config"

    @property
    def params(self) -> int:
        """Stored elements (an alias that is stored twice counts twice)."""
        return sum(math.prod(t.shape) for t in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    def bind(self, parameters: Mapping[str, Any], aliases: Mapping[str, str] | None = None, **more: Any) -> Weights:
        """Short for :func:`surgery.model.checkpoint_bind.bind`."""
        from surgery.model.checkpoint_bind import bind

        return bind(self, parameters, aliases, **more)

    def content_hash(self) -> str:
        """sha256 over config and every byte of the weight files; reads them all, unless that is done (:meth:`read_ahead`). Raises S0721, and
        S0822 where an artifact's file is not the one that surgery wrote."""
        digest = hashlib.sha256(self.hash.encode())
        hashes = (self.hashing or Hashing(self.files)).result()
        if self.kind == "artifact" and self.path is not None:
            compare_hashes(self.path, hashes)
        for path in self.files:
            digest.update(bytes.fromhex(hashes[path]))
        return digest.hexdigest()

    def read_ahead(self, folder: Path | None = None) -> Checkpoint:
        """The same checkpoint, whose weight files are being hashed from now on, beside other work; ``folder`` is where captures are kept, and with
        them hashes of files that do not change."""
        return replace(self, hashing=Hashing(self.files, folder)) if self.files else self


def open_checkpoint(ref: str, *, allow_code: bool = False, span: Span | None = None, base: Path | None = None, seed: int = 0) -> Checkpoint:
    """Open a model reference: config and tensor headers only.

    ``ref`` is a folder, a ``.safetensors`` file beside its config, a hub name that is in the local cache (``owner/name@revision``),
    ``config:PATH``, ``python:package.module:factory`` (only with ``allow_code``), ``minilm`` or an artifact of surgery. Relative paths
    start at ``base`` (default: the working directory). ``span`` is the place in the spec that errors point at. ``seed`` is for the
    random weights of ``config:``.

    Raises SurgeryError with S0701..S0713, S0721, S0723, S0725.
    """
    found = resolve(ref, base=base or Path.cwd(), span=span)
    if found.kind == "python":
        return _open_python(found, allow_code, span)
    assert found.path is not None
    if found.kind == "artifact":  # one of a module without a config has none
        config = read_config(found.config_path, span) if found.config_path.exists() else {}
        return _open_artifact(found, config, span)
    config = read_config(found.config_path, span)
    family = check_family(config, found.config_path, span)
    architecture = architecture_of(config, found.config_path, span)
    if found.kind == "config":
        dtype = _config_dtype(config)
        return Checkpoint(
            ref, "config", found.path, config, family, architecture, dtype, {}, _identity(config, {}, (), f"seed {seed}"),
            tokenizer_files=tokenizer_files_in(found.path), seed=seed,
        )  # fmt: skip
    weights = find_weights(found.path, found.weights, span)
    tensors = read_tensors(weights, span)
    return Checkpoint(
        ref, found.kind, found.path, config, family, architecture, _storage_dtype(tensors, config), tensors,
        _identity(config, tensors, weights.files), weights.files, tokenizer_files_in(found.path),
    )  # fmt: skip


def _open_python(found: Ref, allow_code: bool, span: Span | None) -> Checkpoint:
    module, inputs = load_factory(found, allow_code, span)
    raw = getattr(module, "config", None)
    config = raw.to_dict() if raw is not None and hasattr(raw, "to_dict") else {}
    shapes = {name: (list(t.shape), str(t.dtype)) for name, t in module.state_dict().items()}
    sizes: dict[str, int] = {}
    for tensor in module.state_dict().values():
        if tensor.is_floating_point():
            name = str(tensor.dtype).removeprefix("torch.")
            sizes[name] = sizes.get(name, 0) + tensor.numel() * tensor.element_size()
    digest = hashlib.sha256(
        json.dumps([found.ref, type(module).__qualname__, config, shapes], sort_keys=True, default=str).encode()
    ).hexdigest()
    return Checkpoint(
        found.ref, "python", None, config, str(config.get("model_type") or ""), type(module).__name__,
        max(sizes, key=lambda n: sizes[n]) if sizes else "float32", {}, digest, module=module, inputs=inputs,
    )  # fmt: skip


def _open_artifact(found: Ref, config: dict[str, Any], span: Span | None) -> Checkpoint:
    """Config and headers of an artifact; its graph and manifest are read by ``surgery.model.artifact``."""
    assert found.path is not None
    try_weights = any((found.path / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))
    weights = find_weights(found.path, None, span) if try_weights else None
    tensors = read_tensors(weights, span) if weights else {}
    architectures = config.get("architectures") or [""]
    return Checkpoint(
        found.ref, "artifact", found.path, config, str(config.get("model_type") or ""), str(architectures[0]),
        _storage_dtype(tensors, config), tensors, _identity(config, tensors, weights.files if weights else ()),
        weights.files if weights else (), tokenizer_files_in(found.path),
    )  # fmt: skip


def tokenizer_files_in(folder: Path) -> tuple[Path, ...]:
    """Files beside config and weights that a copy of the model needs (tokenizer, processor, generation, sentence-transformers)."""
    out = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if (folder / "modules.json").is_file():
        out += [folder / name for name in SENTENCE_FILES if (folder / name).is_file()]
        out += [p for p in sorted(folder.glob("[0-9]*_*/config.json")) if p.is_file()]
    return tuple(out)


def _config_dtype(config: Mapping[str, Any]) -> str:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    name = str(name).removeprefix("torch.")
    return name if is_float(name) else "float32"


def _storage_dtype(tensors: Mapping[str, TensorHeader], config: Mapping[str, Any]) -> str:
    sizes: dict[str, int] = {}
    for tensor in tensors.values():
        if is_float(tensor.dtype):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=lambda n: sizes[n]) if sizes else _config_dtype(config)


def _identity(config: Mapping[str, Any], tensors: Mapping[str, TensorHeader], files: tuple[Path, ...], extra: str = "") -> str:
    """sha256 over config, tensor names, dtypes, shapes, and the headers and sizes of the files (by name, not by folder)."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":"), default=str).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tensor.shape}".encode())
    for path in files:
        header = read_header(path)
        digest.update(f"\n{path.name} {header.size} {header.digest}".encode())
    digest.update(extra.encode())
    return digest.hexdigest()
