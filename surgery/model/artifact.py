"""The artifact: a folder that holds a program, its weights and the evidence, as data only.

=================================  ============================================================================
``surgery.json``                   the manifest: versions, signature, journal, attachments, certificates, hashes
``graph.json``                     the graph tree (:mod:`surgery.model.graphjson`)
``model.safetensors`` (or shards)  parameters and persistent buffers under their original names
``constants.safetensors``          buffers that are no part of the state dict
``config.json``, tokenizer files   as in any checkpoint
``spec.surg``, ``spec.surg.lock``  what made it
=================================  ============================================================================

Reading trusts nothing: the manifest carries a digest of itself and the sha256 and size of every other file; names must be plain
relative paths to regular files inside the folder; tensor headers are checked against the file before a tensor is made; the
graph is read as :mod:`surgery.model.graphjson` says. Nothing is unpickled and nothing of the folder is executed. The hash of a
weights file is only compared when asked for (``verify="all"``), because reading a large file twice doubles the time to load it;
its size and header always are. Files that the manifest does not name (a trainer's own) are ignored.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.core.diagnostics import SurgeryError, fail
from surgery.model import graphjson, masked
from surgery.model.artifact_open import (
    CONSTANTS,
    FORMAT,
    GRAPH,
    LOCK,
    MANIFEST,
    SPEC,
    Artifact,
    file_digest,
    is_artifact,
    manifest_digest,
    open_artifact,
    tidy,
)
from surgery.model.narrow import narrowed
from surgery.model.program import Program
from surgery.model.record import Methods, constant_names, program_of, record_of, signature_of
from surgery.model.runtime import MODEL_DTYPE, build_module
from surgery.model.shards import write_safetensors
from surgery.model.weights import Weights

# --- writing ----------------------------------------------------------------------------------------------------------------


def write_artifact(
    folder: str | Path,
    program: Program,
    tensors: Mapping[str, Any],
    *,
    dtype: str = "",
    files: Iterable[Path] = (),
    plan: Any = None,
    certificates: Iterable[Mapping[str, Any]] = (),
    spec: str = "",
    lock: str = "",
    spec_digest: str = "",
    progress: Any = None,
    workers: int = 0,
    costs: Mapping[str, int] | None = None,
    soon: Any = None,
    streams: Mapping[str, Any] | None = None,
    checked: dict[Path, int] | None = None,
) -> list[Path]:
    """Fill ``folder`` (existing, best a temporary one of :class:`surgery.model.atomic.AtomicOutput`) with an artifact.

    ``tensors`` gives the realised tensor of every name in ``program.weights`` (a realiser streams them). ``dtype`` (a short name)
    casts what has the model's own dtype; the default keeps what the expressions have. ``files`` are copied along (tokenizer,
    generation config). ``workers``, ``costs``, ``soon`` and ``streams`` are those of :func:`surgery.model.shards.write_safetensors`. The
    bytes depend on the other arguments alone. With ``checked`` every byte of the files that hold tensors is read back and compared; it is filled
    with their number. Raises S08xx for storage faults.
    """
    folder = Path(folder)
    record = record_of(program, dtype=dtype)
    metas = _meta_tensors(program.graph)
    constants = set(constant_names(program.graph))

    def final(name: str) -> str:
        stored = program.weights[name].dtype
        return dtype if dtype and name in metas and metas[name].dtype == MODEL_DTYPE else stored

    names = [n for n in program.weights if n not in program.aliases]
    shapes = {n: tuple(program.weights[n].shape) for n in names}
    makers = {n: _maker(tensors, n, graphjson.dtype_of(final(n))) for n in names}
    files_of = {CONSTANTS: [n for n in names if n in constants]}
    main = [n for n in names if n not in constants]
    stored = write_safetensors(
        folder, makers, {n: shapes[n] for n in main}, {n: final(n) for n in main}, progress=progress, workers=workers, costs=costs, soon=soon,
        hashing=True, checking=checked is not None, streams=streams,
    )  # fmt: skip
    written, compared = list(stored.files), dict(stored.checked)
    if files_of[CONSTANTS]:
        held = files_of[CONSTANTS]
        sizes, kinds = {n: shapes[n] for n in held}, {n: final(n) for n in held}
        more = write_safetensors(folder / CONSTANTS, makers, sizes, kinds, progress=progress, checking=checked is not None)
        written += more.files
        compared |= more.checked
    if checked is not None:
        checked.update(compared)
    extra = copy_files(folder, files)
    record["generation"] = _generation(folder)
    body = {
        "spec_digest": spec_digest, "plan": plan.as_json() if hasattr(plan, "as_json") else plan, "certificates": [dict(c) for c in certificates],
        "trainable": sorted(n for n, m in metas.items() if isinstance(m, nn.Parameter) and n not in program.frozen and n not in program.aliases),
    }  # fmt: skip
    texts = {SPEC: spec, LOCK: lock}
    return _finish(folder, record, body, [*written, *extra], texts, stored.digests)


def _maker(tensors: Mapping[str, Any], name: str, dtype: torch.dtype) -> Any:
    def make() -> torch.Tensor:
        value = tensors[name]
        value = value if isinstance(value, torch.Tensor) else value()
        return narrowed(value.detach().to("cpu"), dtype, name).contiguous()

    return make


def _meta_tensors(root: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(root.named_buffers(remove_duplicate=False)), **dict(root.named_parameters(remove_duplicate=False))}


def copy_files(folder: Path, files: Iterable[Path]) -> list[Path]:
    """Copies beside the model; a pooling config keeps its own sub-folder."""
    made = []
    for source in files:
        name = f"{source.parent.name}/{source.name}" if re.fullmatch(r"\d+_\w+", source.parent.name) else source.name
        if name in (MANIFEST, GRAPH, "config.json", SPEC, LOCK) or name.endswith(".safetensors"):
            continue
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(source.read_bytes())
        made.append(target)
    return made


def _generation(folder: Path) -> dict[str, Any] | None:
    path = folder / "generation_config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None
    except (ValueError, TypeError):
        return None


def _finish(
    folder: Path, record: dict[str, Any], body: Mapping[str, Any], written: list[Path], texts: Mapping[str, str],
    digests: Mapping[Path, str] | None = None,
) -> list[Path]:  # fmt: skip
    """The files of text, and last the manifest with the hashes of all others; ``digests`` are those that are known already."""
    import transformers

    from surgery.core.version import VERSION as version

    record = dict(record)
    texts = {
        **texts,
        GRAPH: _json(record.pop("graph"), indent=None),
        "config.json": _json(record["info"]["config"]) if record["info"]["config"] else "",
    }
    for name, text in texts.items():
        if text:
            (folder / name).write_text(text, encoding="utf-8")
            written.append(folder / name)
    known = digests or {}
    files = {
        p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": known.get(p) or file_digest(p)} for p in sorted(set(written))
    }  # fmt: skip
    manifest = {
        "schema": f"surgery.artifact/{FORMAT}", "format": FORMAT, "surgery": version, "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__, **record, **body, "files": files,
    }  # fmt: skip
    manifest["digest"] = manifest_digest(manifest)
    (folder / MANIFEST).write_text(_json(manifest), encoding="utf-8")
    return [*sorted(set(written)), folder / MANIFEST]


def add_certificates(folder: Path, certificates: Iterable[Mapping[str, Any]]) -> None:
    """Write further certificates into the manifest of an artifact that is being made."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["certificates"] = [*manifest["certificates"], *(dict(c) for c in certificates)]
    manifest["digest"] = manifest_digest(manifest)
    path.write_text(_json(manifest), encoding="utf-8")


def _json(data: Any, indent: int | None = 1) -> str:
    return json.dumps(data, indent=indent, ensure_ascii=False, separators=(",", ":") if indent is None else None) + "\n"


# --- reading ----------------------------------------------------------------------------------------------------------------


def read_artifact(folder: str | Path, *, resolver: Methods, modules: Any = None, verify: str = "fast") -> Program:
    """The program of an artifact, ready for another spec: its weights are ``Load`` expressions on the artifact's own files.

    ``resolver(verb, name)`` finds method classes, ``modules(tag)`` classes of attached modules. Raises the errors of
    :func:`open_artifact` and :func:`surgery.model.graphjson.load`, S0833 (a tensor is missing), S0834 (unknown method).
    """
    artifact = open_artifact(folder, verify=verify)
    with tidy(artifact.folder):
        weights = Weights()
        program = program_of(artifact.record, weights, resolver, resolver=modules or modules_through(resolver))
        for name, meta in _meta_tensors_in_order(program.graph):
            if name not in program.aliases:
                weights[name] = _header(artifact, name, meta).load()
    return program


def modules_through(methods: Methods) -> Any:
    """A finder of module classes for tags that are not registered yet: ``methods("", tag)`` imports what registers one."""

    def find(tag: str) -> None:
        with suppress(KeyError):
            methods("", tag)

    return find


def _meta_tensors_in_order(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers, module by module, each name once."""
    for prefix, module in root.named_modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    yield (f"{prefix}.{name}" if prefix else name), tensor


def _header(artifact: Artifact, name: str, meta: torch.Tensor) -> Any:
    header = artifact.tensors.get(name)
    if header is None or tuple(header.shape) != tuple(meta.shape):
        what = "is not in" if header is None else f"has another shape {list(header.shape)} than {list(meta.shape)} in"
        raise fail("S0833", f"the tensor {name} {what} the files of {artifact.folder}", help="emit the artifact again from its spec")
    return header


def load(
    folder: str | Path, *, device: Any = "cpu", dtype: torch.dtype | str | None = None, modules: Any = None, verify: str = "fast"
) -> nn.Module:
    """The module of an artifact: original signature and output classes, in evaluation mode, trainable.

    Errors as :func:`open_artifact`, :func:`surgery.model.graphjson.load` and :func:`surgery.model.runtime.build_module`.
    """
    artifact = open_artifact(folder, verify=verify)
    with tidy(artifact.folder):
        wanted = graphjson.dtype_of(dtype) if isinstance(dtype, str) else dtype
        signature_of(artifact.record)
        module = build_module(artifact.record, read_tensors(artifact), device=device, dtype=wanted, resolver=modules)
    module._surgery_home = str(artifact.folder)  # type: ignore[assignment]
    module._surgery_body = {k: artifact.manifest.get(k) for k in ("plan", "certificates", "trainable")}  # type: ignore[assignment]
    return module


def read_tensors(artifact: Artifact) -> dict[str, torch.Tensor]:
    """All tensors, backed by the files where the system allows it: pages are read when they are used and copied when written."""
    from safetensors import safe_open

    made: dict[str, torch.Tensor] = {}
    for name in artifact.manifest["files"]:
        if name.endswith(".safetensors"):
            with safe_open(str(artifact.folder / name), framework="pt") as file:
                made |= {key: file.get_tensor(key) for key in file.keys()}
    return made


# --- a trained module -------------------------------------------------------------------------------------------------------


def save_trained(module: nn.Module, path: str | Path, *, force: bool = False, state_dict: Mapping[str, Any] | None = None) -> Path:
    """Write a module that :func:`load` or ``build_module`` made, with the weights it has now, as an artifact again.

    A new path is written whole or not at all. Into a folder that exists without a manifest (a trainer's checkpoint folder) the
    files are added, the manifest last. Replacing an artifact needs ``force``. Certificates of the untrained weights are not
    carried over. Returns the path.
    """
    from surgery.model.atomic import AtomicOutput

    record = getattr(module, "_surgery_record", None)
    if record is None:
        raise fail(
            "S0820",
            f"a {type(module).__name__} cannot be saved as an artifact",
            help="save the module that surgery.load returned, not a wrapper or a part of it",
        )
    path = Path(path)
    if path.is_dir() and not is_artifact(path):
        _save_into(path, module, dict(record), state_dict)
    else:
        with AtomicOutput(path, force=force or (path.is_dir() and _same_model(path, record))) as temporary:
            _save_into(temporary, module, dict(record), state_dict)
    return path


def _same_model(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the artifact there is an earlier state of the same program, which saving again may replace."""
    try:
        other = open_artifact(path)
    except SurgeryError:
        return False
    return bool(other.graph == json.loads(json.dumps(record["graph"])) and other.manifest.get("trained"))


def _save_into(folder: Path, module: nn.Module, record: dict[str, Any], state_dict: Mapping[str, Any] | None) -> None:
    aliases: dict[str, str] = record["aliases"]
    constants = constant_names(module)
    given = dict(state_dict) if state_dict is not None else module.state_dict()
    given |= {name: module.get_buffer(name) for name in constants}
    tensors = {n: t for n, t in given.items() if n not in aliases}
    for alias, first in aliases.items():
        if first not in tensors and alias in given:
            tensors[first] = given[alias]
    whole = masked.zeroed(module, {n: _whole(t) for n, t in tensors.items()})
    dtypes = {n: graphjson.dtype_name(t.dtype) for n, t in whole.items()}
    shapes = {n: tuple(t.shape) for n, t in whole.items()}
    main = [n for n in whole if n not in constants]
    written = list(write_safetensors(folder, whole, {n: shapes[n] for n in main}, {n: dtypes[n] for n in main}).files)
    if constants:
        written += write_safetensors(folder / CONSTANTS, whole, {n: shapes[n] for n in constants}, {n: dtypes[n] for n in constants}).files
    record["dtype"] = graphjson.dtype_name(module._surgery_target[0])  # type: ignore[index,union-attr]
    record["info"] = {**record["info"], "dtype": record["dtype"]}
    trains = {n: p.requires_grad for n, p in module.named_parameters(remove_duplicate=False) if n not in aliases}
    record["frozen"] = sorted(n for n, t in trains.items() if not t)
    texts, extra = _carried(folder, getattr(module, "_surgery_home", None))
    body = {
        "plan": (getattr(module, "_surgery_body", None) or {}).get("plan"), "certificates": [], "trained": True,
        "trainable": sorted(n for n, t in trains.items() if t),
    }  # fmt: skip
    _finish(folder, record, body, [*written, *extra], texts)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor on the CPU; a sharded one is gathered."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().to("cpu").contiguous()


def _carried(folder: Path, home: str | None) -> tuple[dict[str, str], list[Path]]:
    """Spec, lock, tokenizer and other small files of the artifact that the module came from, if it is still there."""
    if not home or not is_artifact(home) or Path(home).resolve() == folder.resolve():
        return {}, []
    try:
        source = open_artifact(home)
    except SurgeryError:
        return {}, []
    texts = {n: (source.folder / n).read_text(encoding="utf-8") for n in (SPEC, LOCK) if n in source.manifest["files"]}
    names = [
        n
        for n in source.manifest["files"]
        if n not in (GRAPH, "config.json", SPEC, LOCK) and not re.search(r"\.safetensors(\.index\.json)?$", n)
    ]
    return texts, copy_files(folder, [source.folder / n for n in names])
