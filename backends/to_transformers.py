"""The transformers backend: a plain checkpoint that ``from_pretrained`` loads, where the family's config can say what the model is now."""

from __future__ import annotations

import json
import math
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from surgery.backends import streaming
from surgery.backends.protocol import EXPORT_RECORD, EmitRequest, Emitted, owns
from surgery.backends.transformers_config import Derived, derive, original
from surgery.backends.transformers_moe import as_mixtral
from surgery.backends.transformers_stacks import Layout, as_stored, layout_of
from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.source import Span
from surgery.model import pytree
from surgery.model.artifact import copy_files
from surgery.model.atomic import AtomicOutput, storage_errors
from surgery.model.live import live_root
from surgery.model.narrow import narrowed, placing
from surgery.model.program import Program
from surgery.model.running import is_small
from surgery.model.sample import sample_inputs
from surgery.model.shards import Written, write_safetensors
from surgery.model.weights import DTYPE_BYTES, is_float

CASES = (("random", 2, 16, False), ("padded", 3, 11, True))


@dataclass(frozen=True)
class Sayable:
    """A program as a plain checkpoint: its config, its class, the name in the checkpoint of every stored tensor, the names in the
    order of the class's state dict, and how tensors of experts are stored (``transformers_stacks``)."""

    derived: Derived
    architecture: str
    names: Mapping[str, str]
    order: tuple[str, ...]
    layout: Layout = field(default_factory=Layout)


class TransformersBackend:
    """Folds, derives the config, compares the tensors, writes, loads what was written and compares the outputs."""

    name = "transformers"
    folds = True

    def __init__(self) -> None:
        self._checked: tuple[weakref.ref[Program], dict[str, tuple[int, ...]], Sayable] | None = None

    def check(self, program: Program, span: Span | None = None) -> Sayable:
        """How a config describes the program, without a weight. Raises S0860 (no transformers model), S0861 (something stays in the graph)
        and S0862 (the config cannot say it)."""
        config = original(program)
        if config is None or not _known(program.info.architecture):
            raise fail(
                "S0860", f"{program.info.ref} is no transformers model, so there is no config that could describe it", span, "asked for here",
                help="`emit torch` writes any model",
            )  # fmt: skip
        for a in program.attachments:
            raise fail(
                "S0861", f"{a.name} on {a.site.role} stays in the graph, and no class of transformers has it", span, "asked for here",
                also=[(a.origin.span, "added here")], help="`emit torch` keeps everything; or leave this statement out",
            )  # fmt: skip
        converted = as_mixtral(program, config)
        architecture, names = program.info.architecture, _names(program)
        if converted is not None:
            config, architecture, renamed = converted
            names = {name: renamed.get(name, target) for name, target in names.items()}
        derived = derive(program, config)
        layout = _layout(program, derived, architecture, names) if any(s.op == "experts" for s in program.anatomy.sites) else Layout()
        names = {n: t for n, t in names.items() if n not in layout.apart} | {m: m for parts in layout.apart.values() for m in parts}
        order = _agree(as_stored(program, layout), derived, architecture, names, span)
        said = Sayable(derived, architecture, names, order, layout)
        self._checked = weakref.ref(program), _sizes(program), said
        return said

    def _said(self, program: Program, span: Span | None) -> Sayable:
        """What :meth:`check` found while the spec was walked, once, where this is the program as it was then; else it is checked again."""
        known, self._checked = self._checked, None
        if known is not None and known[0]() is program and known[1] == _sizes(program):
            return known[2]
        return self.check(program, span)

    def emit(self, program: Program, request: EmitRequest) -> Emitted:
        """``params``: ``dtype``. Raises what :meth:`check` does, S0863 (what loads from the checkpoint computes something else), S0874 (a weight is beyond
        fp16), and S0801 to S0805 (storage, target)."""
        said = self._said(program, request.span)
        derived, architecture = said.derived, said.architecture
        dtype = streaming.DTYPES[str(request.params.get("dtype") or "")]
        with (
            placing(request.span),
            AtomicOutput(request.target, force=request.force, own=lambda path: owns(path, request.spec_digest)) as folder,
        ):
            stored = _write(as_stored(program, said.layout), said, dtype, folder, request)
            if is_small(program):
                found = [] if dtype else _certify(program, architecture, folder, request)
            else:  # names and shapes were compared; running two copies would take more memory than writing did
                found = [_stored(stored, architecture)]
            record = {
                "schema": "surgery.export/1", "owner": request.spec_digest, "spec": request.spec.text if request.spec else "",
                "changes": _changes(program if request.base is None else request.base, derived), "certificates": [*request.certificates, *found],
            }  # fmt: skip
            with storage_errors(folder):
                (folder / EXPORT_RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
            written = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
        return Emitted((request.target, *(request.target / n for n in written)), tuple(found))


def _sizes(program: Program) -> dict[str, tuple[int, ...]]:
    return {name: expr.shape for name, expr in program.weights.items()}


def _changes(base: Program, derived: Derived) -> dict[str, list[Any]]:
    """What the config says now and what it said before the spec, ``[before, after]`` by name."""
    before = original(base)
    old = {} if before is None else before.to_dict()
    new = derived.config.to_dict()
    quiet = ("architectures", "dtype", "transformers_version", "_name_or_path")
    return {k: [old.get(k), v] for k, v in new.items() if old.get(k) != v and k not in quiet}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's own bars and remarks: what matters of them is in the diagnostics."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _known(architecture: str) -> bool:
    import transformers

    return bool(architecture) and hasattr(transformers, architecture)


def _names(program: Program) -> dict[str, str]:
    """Every stored tensor's name in the checkpoint: dropped layers leave no gap in the numbers of those behind them."""
    moves: dict[str, str] = {}
    for stack in program.anatomy.stacks:
        if not stack.path:
            continue
        for site in program.anatomy.sites:
            if site.op == "region" and site.path and re.fullmatch(re.escape(stack.name) + r"\[\d+\]", site.role):
                target = f"{stack.path}.{site.layer}"
                if site.path != target and re.fullmatch(re.escape(stack.path) + r"\.\d+", site.path):
                    moves[site.path] = target
    out = {}
    for name in program.weights:
        at = next((p for p in moves if name.startswith(p + ".")), None)
        out[name] = name if at is None else moves[at] + name[len(at) :]
    return out


def _empty(derived: Derived, architecture: str) -> torch.nn.Module:
    import transformers

    with torch.device("meta"), torch.no_grad(), _quiet():
        model: torch.nn.Module = getattr(transformers, architecture)(derived.config)
    return model


def _layout(program: Program, derived: Derived, architecture: str, names: Mapping[str, str]) -> Layout:
    """How the class stores experts; as the program does where it cannot be built, which is said later."""
    try:
        model = _empty(derived, architecture)
    except Exception:
        return Layout()
    return layout_of(model, program, names)


def _agree(program: Program, derived: Derived, architecture: str, names: Mapping[str, str], span: Span | None) -> tuple[str, ...]:
    """The class that the config describes has exactly the program's tensors, whose names in the class's order it gives; raises S0862 with the
    statement that prevents it."""
    try:
        model = _empty(derived, architecture)
    except Exception as exc:
        once = "per_layer_config" in derived.changes and re.search(r"'(\w+)' is a per-layer attribute", str(exc))
        why = (
            f"{architecture} reads `{once[1]}` once for all layers"
            if once
            else f"transformers refuses it: {' '.join(str(exc).split())[:200]}"
        )
        raise _unsayable(program, derived, "", why, span) from exc
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    aliases = {names.get(n, n) for n in program.aliases}
    given = {names[n]: n for n in program.weights}
    buffers = {n for n, _ in model.named_buffers()}
    for name, source in given.items():
        shape = program.weights[source].shape
        if name in wanted and wanted[name] != shape:
            what = f"{name} is {list(shape)}, and with this config it would be {list(wanted[name])}"
            raise _unsayable(program, derived, source, what, span)
        if name not in wanted and name not in buffers and is_float(program.weights[source].dtype) and not _computed(program, source):
            raise _unsayable(program, derived, source, f"{name} has no place in {architecture}", span)
    for name in wanted:
        if name not in given and name not in aliases and name not in tied:
            raise _unsayable(program, derived, "", f"{architecture} has {name}, and the model has not", span)
    shared = {n: t for n, t in program.aliases.items() if n not in tied and n in wanted}
    originally = {n for n, _ in _pairs_tied(model)}
    for alias, first in shared.items():
        if names.get(alias, alias) not in originally:
            raise _unsayable(
                program, derived, first, f"{alias} and {first} are one tensor, and a checkpoint of {architecture} keeps two", span
            )
    return tuple(wanted)


def _pairs_tied(model: torch.nn.Module) -> list[tuple[str, str]]:
    """Names beyond the first of tensors that the class itself shares."""
    with torch.no_grad():
        tie: Callable[..., Any] | None = getattr(model, "tie_weights", None)
        if tie is not None:
            tie()
    first: dict[int, str] = {}
    out = []
    for name, tensor in model.named_parameters(remove_duplicate=False):
        before = first.setdefault(id(tensor), name)
        if before != name:
            out += [(name, before), (before, name)]
    return out


def _computed(program: Program, name: str) -> bool:
    """Whether a tensor is a buffer that the class computes at construction, not one that a checkpoint holds."""
    owner, _, leaf = name.rpartition(".")
    try:
        module = program.module(owner)
    except AttributeError:
        return False
    return leaf in module._buffers


def _unsayable(program: Program, derived: Derived, tensor: str, what: str, span: Span | None) -> SurgeryError:
    """S0862: names the statement that made the tensor what it is, where one did."""
    origins = [o for o in program.journal.of(tensor) if o.span.end] if tensor else []
    origins = origins or _structural(program)[-1:]
    also = [(origins[-1].span, "this statement made it so")] if origins else []
    return fail(
        "S0862", f"a config of {program.info.family} cannot describe this model", span, "asked for here", also=also,
        notes=(what, *derived.problems[:4]), help=f"`emit torch` writes any model; {_instead(origins[-1] if origins else None, derived)}",
    )  # fmt: skip


INSTEAD = {
    "share": "a plain checkpoint keeps a tensor for each layer, so emit it before this statement",
    "convert": "a plain checkpoint takes experts in Mixtral's form: convert every layer, to one number of experts, with `router = mixtral`",
    "skip": "a plain checkpoint has whole layers only: drop them with `prune layers`",
    "merge": "merge what the class has",
}


def _instead(origin: Any, derived: Derived) -> str:
    """What to write in place of the statement that no config can say."""
    if origin is not None and origin.verb in INSTEAD:
        return INSTEAD[origin.verb]
    if origin is not None and (origin.verb, origin.method) == ("prune", "layers"):
        return "this family's config describes its layers by a pattern or by lists that the layers left do not follow: drop others, or none"
    if derived.problems:
        return "a plain checkpoint of this family has one number for all layers: select all of them, with one amount"
    if origin is not None and origin.method in ("heads", "kv_groups", "width"):
        return "this family's config has no word for what is left (a width of heads of its own, mostly): prune ffn or layers instead"
    return "a plain checkpoint needs sizes that the family's config has a word for"


def _structural(program: Program) -> list[Any]:
    """The statements that changed more than which numbers train, oldest first."""
    changed = (o for entries in program.journal.entries.values() for o in entries if o.span.end)
    found = dict.fromkeys(o for o in changed if o.verb not in ("freeze", "unfreeze", "adapt", "fold", "merge", "emit"))
    return sorted(found, key=lambda o: (o.span.source.name, o.span.start))


def _write(program: Program, said: Sayable, dtype: str, folder: Path, request: EmitRequest) -> Written:
    config, names = said.derived.config, said.names
    config.architectures = [said.architecture]
    config.dtype = dtype or program.info.dtype
    order = {name: i for i, name in enumerate(said.order)}
    stored = sorted(((names[n], n) for n in program.weights if names[n] in order), key=lambda pair: order[pair[0]])
    shapes = {name: program.weights[source].shape for name, source in stored}
    dtypes = {name: _dtype(program.weights[source].dtype, dtype) for name, source in stored}

    values = streaming.weights(program, request.tensors)

    def make(source: str, wanted: str) -> Callable[[], torch.Tensor]:
        return lambda: narrowed(values[source], getattr(torch, wanted), source)

    total = sum(math.prod(shapes[n]) * DTYPE_BYTES[dtypes[n]] for n in shapes)
    sources = dict(stored)
    lanes = streaming.lanes(program, request.tensors, sources)
    written = write_safetensors(
        folder, {name: make(source, dtypes[name]) for name, source in stored}, shapes, dtypes, progress=request.counting(total),
        workers=lanes.workers, costs=lanes.costs, soon=lanes.soon, streams=lanes.streams, checking=not is_small(program),
        parts=streaming.parts(values, program, sources, dtypes),
    )  # fmt: skip
    with storage_errors(folder):
        (folder / "config.json").write_text(config.to_json_string(use_diff=False), encoding="utf-8")
        copy_files(folder, request.files)
    return written


def _stored(written: Written, architecture: str) -> dict[str, Any]:
    """The claim for a checkpoint that is not loaded: while it was written, every byte was read back and compared with the program's tensors."""
    return {
        "claim": "stored = program", "max_abs_error": 0.0, "tolerance": 0.0, "ok": True, "samples": ["every stored byte"],
        "how": f"read back and compared, names and shapes with those of {architecture}, not run", "bytes": sum(written.checked.values()),
        "tensors": len(written.shard_of),
    }  # fmt: skip


def _dtype(own: str, wanted: str) -> str:
    return wanted if wanted and is_float(own) else own


def _cannot_run(program: Program, architecture: str, fault: Exception, span: Span | None) -> SurgeryError:
    """S0863 for a checkpoint whose class loads it and cannot run it, such as experts of a width that its kernels do not take."""
    experts = any(s.op == "experts" for s in program.anatomy.sites)
    return fail(
        "S0863", f"{architecture} loads the checkpoint and cannot run it: {' '.join(str(fault).split())[:160]}", span, "asked for here",
        also=[(o.span, "changes the structure") for o in _structural(program)[-4:]],
        help=[
            *(["its products of experts take widths of whole 16 bytes: `round_to = 8` keeps them"] if experts else []),
            "nothing was written; `emit torch` writes any model",
        ],
    )  # fmt: skip


def _certify(program: Program, architecture: str, folder: Path, request: EmitRequest) -> list[dict[str, Any]]:
    """``from_pretrained`` on the written folder against the program, in fp32, on random and padded inputs."""
    import transformers

    root = live_root(program, request.tensors, dtype=torch.float32).eval()
    cls = getattr(transformers, architecture)
    with _quiet():
        model = cls.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True).eval()
    signature = program.signature
    worst, scale = 0.0, 1.0
    for _, batch, length, padding in CASES:
        inputs = sample_inputs(program, batch=batch, length=length, seed=11, padding=padding)
        with torch.no_grad():
            want = root(*inputs)
            given = pytree.unflatten(list(inputs), signature.in_spec)
            given = given if isinstance(given, Mapping) else dict(zip(signature.parameters, given, strict=True))
            try:
                out = model(**given, **{k: v for k, v in signature.constants.items() if k not in given})
            except (RuntimeError, ValueError, TypeError, IndexError) as exc:
                raise _cannot_run(program, architecture, exc, request.span) from exc
            got = pytree.flatten(out, signature.out_spec)
        for x, y in zip(want, got, strict=True):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.numel():
                error = float((x.double() - y.double()).abs().max()) if x.shape == y.shape else math.inf
                worst = max(worst, math.inf if math.isnan(error) else error)
                scale = max(scale, float(x.abs().max()))
    allowed = 1e-5 * scale
    entry = {
        "claim": "from_pretrained = program", "max_abs_error": worst, "tolerance": allowed, "ok": worst <= allowed,
        "samples": [case[0] for case in CASES],
    }  # fmt: skip
    if not entry["ok"]:
        raise fail(
            "S0863", f"what {architecture} loads from the checkpoint computes something else (difference {worst:.3g})", request.span,
            "asked for here", also=[(o.span, "changes the structure") for o in _structural(program)[-4:]],
            notes=("names and shapes agree, so a change that no config can say is in the graph",),
            help="nothing was written; `emit torch` writes any model, and a plain checkpoint this one without the statements above",
        )  # fmt: skip
    return [entry]


BACKEND = TransformersBackend()
