"""From a model reference (or a live module) to a Program: checkpoint headers, capture, lazy weights."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from surgery.core.progress import report
from surgery.core.source import Span
from surgery.model.checkpoint_config import meta_model
from surgery.model.lazygraph import copy_tree
from surgery.model.naming import Naming, naming_of, read_naming, write_naming
from surgery.model.program import ModelInfo, Program
from surgery.model.realise import held
from surgery.model.stacked import fuse_stacked
from surgery.model.viewed import unfold_experts
from surgery.model.weights import Weights


def cache_folder() -> Path:
    """Where captures are kept: ``$SURGERY_CACHE``, else ``$XDG_CACHE_HOME/surgery``, else ``~/.cache/surgery``."""
    stated = os.environ.get("SURGERY_CACHE")
    if stated:
        return Path(stated)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "surgery"


def open_program(
    ref: str | nn.Module,
    *,
    inputs: Any = None,
    dynamic: Any = "batch, sequence",
    allow_code: bool = False,
    use_cache: bool = True,
    span: Span | None = None,
    base: Path | None = None,
    hash_content: bool = False,
    captures: dict[str, Any] | None = None,
) -> tuple[Program, Any]:
    """The program of a model and its checkpoint (None for a live module).

    No weight is read: parameters are meta tensors with expressions over the stored tensors. ``hash_content`` says that the hash of
    the weight files will be asked for, so that they are read while the model is traced. ``captures`` keeps what was captured, by config, for
    whoever opens several checkpoints; the first of a config may be changed, the graphs of further ones only be read.
    """
    if isinstance(ref, nn.Module):
        return capture(ref, inputs, dynamic=dynamic), None
    from surgery.model.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(ref, allow_code=allow_code, span=span, base=base)
    if hash_content:
        checkpoint = checkpoint.read_ahead(cache_folder() if use_cache else None)
    if checkpoint.kind == "artifact":
        from surgery.model.artifact import read_artifact
        from surgery.passes import registry

        assert checkpoint.path is not None
        program = read_artifact(checkpoint.path, resolver=registry.get)
        program.info = replace(program.info, ref=str(ref), hash=_artifact_hash(program, checkpoint.path))
        return program, checkpoint
    if checkpoint.kind == "python":
        program = capture(checkpoint.module, checkpoint.inputs if inputs is None else inputs, dynamic=dynamic)
        program.info = replace(program.info, ref=ref)
        return program, checkpoint
    from surgery.model.capture.cache import cache_key
    from surgery.model.checkpoint_bind import bind

    report("capturing the model")
    folder, key = cache_folder() if use_cache else None, cache_key(checkpoint.config, checkpoint.architecture)
    captured = _captured(checkpoint, folder, key, captures)
    model, naming = _naming(checkpoint, folder, key, span)
    weights = bind(checkpoint, captured.parameters, captured.aliases, model=model, own_dtype="bfloat16", span=span, naming=naming)
    return assemble(captured, weights, info_of(checkpoint)), checkpoint


def _captured(checkpoint: Any, folder: Path | None, key: str, captures: dict[str, Any] | None) -> Any:
    """The capture of a checkpoint's config. Further ones of equal config share one graph, which nobody changes: they are opened to be read."""
    from surgery.model.capture import capture_config

    if captures is None:
        return capture_config(checkpoint.config, checkpoint.architecture, cache_dir=folder)
    if key in captures:
        return captures[key]
    captures[key] = capture_config(checkpoint.config, checkpoint.architecture, cache_dir=folder)
    return replace(captures[key], graph=copy_tree(captures[key].graph))


def _naming(checkpoint: Any, folder: Path | None, key: str, span: Span | None) -> tuple[Any, Naming | None]:
    """What is known of the conversions of stored tensors; where nothing is, it is kept for the next time, and the model that told comes along."""
    if folder is None or checkpoint.random:
        return None, None
    naming = read_naming(folder, key)
    if naming is not None:
        return None, naming
    model = meta_model(checkpoint, span)
    naming = naming_of(model)
    if naming is not None:
        write_naming(folder, key, naming)
    return model, naming


def info_of(checkpoint: Any) -> ModelInfo:
    return ModelInfo(
        ref=str(checkpoint.ref), family=checkpoint.family, architecture=checkpoint.architecture, config=checkpoint.config,
        dtype=checkpoint.dtype or "float32", hash=checkpoint.hash,
    )  # fmt: skip


def _artifact_hash(program: Program, folder: Path) -> str:
    """What the artifact is, not what it was made from: graph and weights by the hashes in its manifest, what is attached and frozen.
    Measured numbers and versions, which differ between machines, stay out."""
    files = json.loads((folder / "surgery.json").read_text(encoding="utf-8"))["files"]
    content = {n: f["sha256"] for n, f in files.items() if n in ("graph.json", "config.json") or n.endswith(".safetensors")}
    added = [[a.module, a.method.verb, a.method.name, a.method.params()] for a in program.attachments]
    parts = [content, added, sorted(program.frozen), program.aliases]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def assemble(captured: Any, weights: Weights, info: ModelInfo) -> Program:
    """Graph, weights and constants as one program, expressions in state-dict order, constants held by content."""
    for name, tensor in captured.constants.items():
        weights.setdefault(name, held(tensor))
    info = replace(info, notes=captured.notes)
    program = Program(graph=captured.graph, signature=captured.signature, weights=weights, info=info, aliases=dict(captured.aliases))
    fuse_stacked(program)
    unfold_experts(program)
    return program


def capture(module: nn.Module, inputs: Any, *, dynamic: Any = "batch, sequence") -> Program:
    """A Program of any ``nn.Module`` with example inputs (a tuple of tensors or a dict of keyword arguments).

    ``dynamic`` says which axes may change: ``"batch, sequence"``, or ``{input: {axis: name}}``. The module is left as it is: its
    tensors are copied when the program is realised and never shared. Raises S05xx when the module cannot be captured.
    """
    from surgery.model.capture import capture_module

    captured = capture_module(module, inputs, dynamic=dynamic)
    state = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    weights = Weights()
    total = hashlib.sha256()
    for name in captured.parameters:
        if name in captured.constants or name in captured.aliases:
            continue
        weights[name] = held(state[name])
        total.update(f"{name}={weights[name].digest};".encode())  # type: ignore[attr-defined]
    config = getattr(module, "config", None)
    plain = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    floats = [str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()]
    info = ModelInfo(
        ref=f"<{type(module).__name__}>", family=str(plain.get("model_type", "")), architecture=type(module).__name__, config=plain,
        dtype=floats[0] if floats else "float32", hash=total.hexdigest(),
    )  # fmt: skip
    return assemble(captured, weights, info)
