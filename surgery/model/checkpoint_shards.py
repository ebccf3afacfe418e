"""The weight files of a folder: one safetensors file, or shards with an index."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.core.diagnostics import Diagnostic, Sink, SurgeryError, error, fail
from surgery.core.source import Span
from surgery.model.checkpoint_headers import TensorHeader, read_header, unreadable

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5")


@dataclass(frozen=True)
class WeightFiles:
    """``files`` in order; ``index`` maps tensor names to file names where there is an index."""

    files: tuple[Path, ...]
    index: dict[str, str] | None = None
    index_path: Path | None = None


def find_weights(folder: Path, file: Path | None = None, span: Span | None = None) -> WeightFiles:
    """The weight files of ``folder`` (or just ``file``). S0705 only pickles, S0706 none or a shard is missing, S0711 a bad index."""
    if file is not None:
        return WeightFiles((file,))
    if (folder / INDEX).is_file():
        return _sharded(folder, folder / INDEX, span)
    if (folder / SINGLE).is_file():
        return WeightFiles((folder / SINGLE,))
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    tensors = [n for n in names if n.endswith(".safetensors")]
    if len(tensors) == 1 and not tensors[0].startswith("adapter_"):
        return WeightFiles((folder / tensors[0],))
    pickled = [n for n in names if n.endswith(PICKLED) and not n.startswith(("training_args", "optimizer", "scheduler", "rng_state"))]
    if pickled:
        raise refuse_pickle(folder / pickled[0], span)
    if any(n.startswith("model-") for n in tensors):
        raise fail(
            "S0706", f"{folder} has {len(tensors)} shards but no {INDEX}", span,
            help="copy the index along with the shards",
        )  # fmt: skip
    if tensors:
        raise fail(
            "S0706", f"{folder} has {len(tensors)} safetensors files and none is {SINGLE}", span,
            notes=(f"found: {', '.join(tensors[:4])}",), help="name the file: `model \"folder/file.safetensors\"`",
        )  # fmt: skip
    raise fail(
        "S0706", f"there are no weights in {folder}", span,
        help=f"put {SINGLE} there, or use `config:{folder}` for seeded random weights",
    )  # fmt: skip


_CONVERT = (
    "import sys, torch, safetensors.torch as s; "
    "d = torch.load(sys.argv[1], weights_only=True, map_location='cpu'); "
    "s.save_file({k: v.clone().contiguous() for k, v in d.items()}, sys.argv[2], {'format': 'pt'})"
)


def refuse_pickle(path: Path, span: Span | None = None) -> SurgeryError:
    """S0705: a file whose loading can run code."""
    return fail(
        "S0705", f"{path.name} is a pickled checkpoint, and reading one can run any code", span, notes=(f"file: {path}",),
        help=f"convert it once, where you trust its source: `python -c \"{_CONVERT}\" {path.name} {SINGLE}`",
    )  # fmt: skip


def _sharded(folder: Path, path: Path, span: Span | None) -> WeightFiles:
    def bad(message: str) -> SurgeryError:
        return fail("S0711", message, span, notes=(f"file: {path}",), help="fetch the index again from where the shards came")

    try:
        table: Any = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as exc:
        raise unreadable(path, exc, span) from None
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise bad(f"{path.name} is not JSON") from None
    index = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(index, dict) or not index or not all(isinstance(v, str) for v in index.values()):
        raise bad(f"{path.name} has no weight_map from tensors to files")
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise bad(f"{path.name} names the file {name!r}, which is not a safetensors file of this folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        held = sum(1 for v in index.values() if v in missing)
        raise fail(
            "S0706", f"{len(missing)} of {len(names)} shards {'is' if len(missing) == 1 else 'are'} missing: {_some(missing)}", span,
            notes=(f"folder: {folder}", f"{held} of {len(index)} tensors are in what is missing"),
            help="copy or download the missing files",
        )  # fmt: skip
    return WeightFiles(tuple(folder / name for name in names), index, path)


def read_tensors(weights: WeightFiles, span: Span | None = None) -> dict[str, TensorHeader]:
    """All tensors by name. All damaged files are reported together; S0711, S0712, S0713 when shards and index disagree."""
    sink = Sink()
    headers: dict[str, dict[str, TensorHeader]] = {}
    for path in weights.files:
        try:
            headers[path.name] = read_header(path, span).tensors
        except SurgeryError as exc:
            sink.extend(exc.diagnostics)
    sink.raise_if_failed()
    tensors: dict[str, TensorHeader] = {}
    twice: dict[str, str] = {}
    for table in headers.values():
        for name, tensor in table.items():
            if name in tensors:
                twice[name] = f"`{name}` in {Path(tensors[name].file).name} and {Path(tensor.file).name}"
            tensors[name] = tensor
    if twice:
        raise SurgeryError(
            _disagree("S0713", f"{_count(len(twice))} in two shards: {_some(list(twice.values()), quote=False)}", weights, span)
        )
    if weights.index is not None:
        for problem in _check_index(weights, headers, tensors, span):
            sink.add(problem)
        sink.raise_if_failed()
    if not tensors:
        raise fail(
            "S0706", f"{weights.files[0].name} holds no tensors", span, notes=(f"file: {weights.files[0]}",), help="save the model again"
        )
    return tensors


def _check_index(
    weights: WeightFiles, headers: dict[str, dict[str, TensorHeader]], tensors: dict[str, TensorHeader], span: Span | None
) -> list[Diagnostic]:
    assert weights.index is not None and weights.index_path is not None
    out = []
    absent = [name for name, file in weights.index.items() if name not in headers[file]]
    if absent:
        verb = "is not in its shard" if len(absent) == 1 else "are not in their shards"
        text = f"{len(absent)} of {len(weights.index)} tensors of {weights.index_path.name} {verb}: {_some(absent)}"
        out.append(_disagree("S0711", text, weights, span))
    stray = [name for name in tensors if name not in weights.index]
    if stray:
        out.append(
            _disagree("S0712", f"{_count(len(stray))} in the shards but not in {weights.index_path.name}: {_some(stray)}", weights, span)
        )
    return out


def _disagree(code: str, message: str, weights: WeightFiles, span: Span | None) -> Diagnostic:
    return error(
        code,
        message,
        span,
        notes=(f"folder: {weights.files[0].parent}",),
        help="index and shards come from different saves: fetch both again",
    )


def _count(number: int) -> str:
    return f"{number} tensor is" if number == 1 else f"{number} tensors are"


def _some(names: list[str], limit: int = 4, quote: bool = True) -> str:
    shown = ", ".join(f"`{n}`" if quote else n for n in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
