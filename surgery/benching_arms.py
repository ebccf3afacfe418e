"""What ``surgery bench`` times: artifacts and models as arms with one interface, ``prepare(arrays) -> call``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery.benching_feeds import Arrays, Input, from_record
from surgery.core.diagnostics import fail
from surgery.core.progress import report

EAGER, COMPILE, PLAIN, ONNX, PT2 = "eager", "compile", "plain", "onnx", "pt2"
EXTRA_ARMS = (EAGER, COMPILE, PLAIN)
"""What is made of a module beside running it: ``--arms`` chooses among them."""

KINDS = {EAGER: "torch eager", COMPILE: "torch.compile", PLAIN: "plain ONNX", ONNX: "ONNX", PT2: "AOTInductor"}


@dataclass(frozen=True)
class Arm:
    """One thing to run. ``source``: the artifact or model as the user wrote it; ``prepare`` gives a call that may run many times; ``record``
    holds ``cost``, ``bytes`` and ``params`` where they are known (see :func:`surgery.backends.served.record`)."""

    source: str
    kind: str
    inputs: tuple[Input, ...]
    prepare: Callable[[Arrays], Callable[[], Arrays]] = field(repr=False)
    record: Mapping[str, Any] = field(default_factory=dict, repr=False)
    file: str = ""

    @property
    def name(self) -> str:
        return f"{self.source} [{KINDS[self.kind]}]"


@dataclass(frozen=True)
class Options:
    """How arms are opened: ``threads`` for all of them, ``extra`` the arms of modules, ``place`` a folder for exports."""

    threads: int
    extra: tuple[str, ...] = (EAGER, PLAIN)
    place: Path = Path()
    allow_code: bool = False
    use_cache: bool = True


def sort_of(ref: str) -> str:
    """``onnx``, ``pt2``, or ``module`` for an artifact folder or a model reference. Raises S0895 for what bench cannot run."""
    path = Path(ref).expanduser()
    if path.suffix in (".onnx", ".pt2"):
        if not path.is_file():
            raise _cannot(ref, "there is no such file" if not path.exists() else "it is a folder")
        return path.suffix[1:]
    if path.is_dir() and not (path / "surgery.json").is_file() and not (path / "config.json").is_file():
        graphs = sorted(p.name for p in path.glob("*.onnx"))
        raise _cannot(
            ref, "the folder holds neither surgery.json nor config.json", [f"name one of its files: {', '.join(graphs)}"] if graphs else []
        )
    if path.is_file():
        raise _cannot(ref, f"it is a file of another kind ({path.suffix or 'without an extension'})")
    if not path.exists() and (path.suffix or os.sep in ref) and ":" not in ref:
        raise _cannot(ref, "there is no such file or folder")
    return "module"


def _cannot(ref: str, why: str, more: Sequence[str] = ()) -> Exception:
    return fail(
        "S0895", f"{ref} is nothing that bench can run: {why}", exit_code=2,
        help=[*more, "give what `emit torch`, `emit onnx`, `emit pt2` or `emit transformers` wrote, or a model as for `plan`"],
    )  # fmt: skip


def open_arms(ref: str, options: Options) -> list[Arm]:
    """The arms of one artifact or model, in the order eager, compile, plain for modules. Raises S0895, and what opening it raises."""
    kind = sort_of(ref)
    report(f"opening {ref}")
    if kind == ONNX:
        return [onnx_arm(ref, ONNX, Path(ref).expanduser(), options.threads)]
    if kind == PT2:
        return [pt2_arm(ref, options.threads)]
    from surgery.benching_modules import module_arms

    return module_arms(ref, options)


# ------------------------------------------------------------------ files


def onnx_arm(source: str, kind: str, path: Path, threads: int, record: Mapping[str, Any] | None = None) -> Arm:
    """An ONNX file in onnxruntime on the CPU; threads stop spinning when a run ends, so that they do not disturb the next arm."""
    try:
        import onnxruntime
    except ImportError:
        raise fail("S0840", "benching an ONNX file needs onnxruntime", help="pip install 'model-surgery[onnx]'", exit_code=2) from None

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as exc:
        raise fail(
            "S0895", f"{source} is nothing that bench can run: onnxruntime refuses it", exit_code=2, notes=[str(exc).strip().splitlines()[0][:200]],
            help="emit it again; `precision = bf16` has no kernels on the CPU",
        ) from exc  # fmt: skip
    stated = session.get_modelmeta().custom_metadata_map.get("surgery.served")
    known = record if record is not None else _record_of(path, stated)
    rows = {i.name: i.below for i in from_record(known)} if known.get("inputs") else {}
    inputs = tuple(Input(i.name, _numpy_name(i.type), tuple(_dim(d) for d in i.shape), rows.get(i.name)) for i in session.get_inputs())
    names = [o.name for o in session.get_outputs()]
    types = {i.name: np.dtype(i.dtype if i.dtype != "bfloat16" else "float32") for i in inputs}

    def prepare(feeds: Arrays) -> Callable[[], Arrays]:
        own = {n: np.ascontiguousarray(feeds[n], dtype=t) for n, t in types.items()}
        return lambda: dict(zip(names, session.run(None, own), strict=True))

    return Arm(source, kind, inputs, prepare, known, str(path))


def _dim(value: Any) -> int | str:
    return value if isinstance(value, int) else str(value or "sequence")


def _numpy_name(text: str) -> str:
    """``tensor(int64)`` as numpy spells it."""
    inner = text.removeprefix("tensor(").removesuffix(")")
    return {"float": "float32", "double": "float64"}.get(inner, inner)


def _record_of(path: Path, stated: str | None) -> dict[str, Any]:
    """The record in an ONNX file's metadata; of a file without one, what its initializers and look-ups tell."""
    if stated:
        try:
            found = json.loads(stated)
            if isinstance(found, dict):
                return found
        except (ValueError, RecursionError):
            pass
    try:
        import onnx
    except ImportError:
        return {}
    graph = onnx.load(str(path), load_external_data=False).graph
    tables = {i.name: tuple(i.dims) for i in graph.initializer}
    elements = sum(int(np.prod(d, dtype=np.int64)) for d in tables.values())
    rows: dict[str, int] = {}
    for node in graph.node:
        if node.op_type == "Gather" and len(node.input) == 2 and len(tables.get(node.input[0], ())) == 2:
            rows[node.input[1]] = tables[node.input[0]][0]
    inputs = [{"name": i.name, "dtype": "int64", "shape": [], "below": rows[i.name]} for i in graph.input if i.name in rows]
    return {"inputs": inputs, "params": elements, "bytes": sum(_nbytes(i) for i in graph.initializer)}


def _nbytes(init: Any) -> int:
    import onnx

    return int(np.prod(init.dims, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(init.data_type).itemsize


def pt2_arm(source: str, threads: int) -> Arm:
    """A package of ``emit pt2``. Raises S0897 for one without our record, or that this machine or this torch cannot load."""
    import torch

    from surgery.backends import aoti, served

    path = Path(source).expanduser()
    record = aoti.read_record(path)
    if record is None or record.get("schema") != served.SCHEMA:
        raise fail(
            "S0897", f"{source} does not say which inputs it takes: `emit pt2` of surgery did not write it", exit_code=2,
            help="bench a package that `emit pt2` wrote",
        )  # fmt: skip
    torch.set_num_threads(threads)
    target = str(record.get("target", "cpu"))
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[str(record.get("precision", "fp32"))]
    try:
        package = aoti.load(path)
    except Exception as exc:
        raise fail(
            "S0897", f"{source} cannot be loaded here", exit_code=2, notes=[str(exc).strip().splitlines()[0][:200] or type(exc).__name__],
            help="a package runs on processors like the one that it was compiled on, with the same version of torch: emit it on this machine",
        ) from exc  # fmt: skip
    inputs = tuple(from_record(record))
    names = [str(n) for n in record["outputs"]]
    into, out = record["call"]["inputs"], record["call"]["outputs"]

    def prepare(feeds: Arrays) -> Callable[[], Arrays]:
        flat = [tensor(feeds[i.name], dtype).to(target) for i in inputs]
        nested = served.nest(iter(flat), into)

        def call() -> Arrays:
            with torch.inference_mode():
                return dict(zip(names, served.flat(package(**nested), out), strict=True))

        return call

    return Arm(source, PT2, inputs, prepare, record, str(path))


def tensor(value: Any, dtype: Any) -> Any:
    """A torch tensor of an array (or tensor); floats in the arm's own type."""
    import torch

    made = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
    return made.to(dtype) if made.is_floating_point() and dtype is not None else made


def labelled(arms: Sequence[Arm]) -> list[Arm]:
    """The arms with names that differ: the same source given twice gets a number."""
    seen: dict[str, int] = {}
    out = []
    for arm in arms:
        seen[arm.name] = seen.get(arm.name, 0) + 1
        out.append(arm if seen[arm.name] == 1 else replace(arm, source=f"{arm.source} ({seen[arm.name]})"))
    return out
