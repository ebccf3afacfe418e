"""The arms of the inference figures: what a user gets without surgery, other optimizers, the floor, and our two artifacts.

Whatever takes long to make is a file in the work folder and made once.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common import ROOT
from benchmarks.inference_floor import onnx_floor, sizes_of, torch_floor
from benchmarks.inference_models import Case, Plain, Shape, cache_of, feeds, folder_of, live, past_of

OURS = ("ours onnx", "ours pt2")
FLOORS = ("floor onnx", "floor torch")
OTHERS = ("eager", "torch.compile", "plain onnx", "onnxruntime optimizer", "optimum O2", "OpenVINO")
INT8 = "ours int8"
"""Measured beside the others and counted with neither: no other arm rounds its weights."""
ORDER = (*OTHERS, *OURS, INT8, *FLOORS)

Call = Callable[[], Any]


@dataclass
class Work:
    """Where things are made. ``left_out`` says which arm is missing and why."""

    folder: Path
    threads: int
    peers: str = ""
    left_out: dict[str, str] = field(default_factory=dict)

    def path(self, case: Case, name: str) -> Path:
        return self.folder / f"{case.name}-{name}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def session(path: Path, threads: int) -> Any:
    """onnxruntime as it comes, on so many threads, which stop spinning when a run ends."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


# ------------------------------------------------------------------ made once


def ours(case: Case, work: Work, kind: str, precision: str = "") -> Path:
    """What ``emit onnx`` or ``emit pt2`` writes of the case's spec."""
    import surgery

    path = work.path(case, f"ours{precision}.{kind}")
    options = f"(precision = {precision})" if precision else ""
    if not path.exists():
        ref = "minilm" if case.config is None else str(folder_of(case, work.folder))
        body = case.spec or "freeze all on layers[*].**\n"
        with quiet():
            surgery.compile(f'surg 1\nmodel "{ref}"\n{body}emit {kind}{options} to "{path}"\n', force=True)
    return path


def plain(case: Case, work: Work) -> Path:
    """What torch's exporter writes of the original model, with its own defaults."""
    path = work.path(case, "plain.onnx")
    if not path.exists():
        model = live(folder_of(case, work.folder))
        given = feeds(case, model, Shape("", 2, 11, 7 if case.cached else 0))
        with quiet(), torch.no_grad():
            export_plain(case, model, given, path)
    return path


def export_plain(case: Case, model: nn.Module, given: dict[str, torch.Tensor], path: Path) -> None:
    dynamic = torch.export.Dim.DYNAMIC
    if case.images:
        torch.onnx.export(
            model, (), str(path), kwargs=given, dynamo=True, opset_version=20, input_names=list(given),
            dynamic_shapes={"pixel_values": {0: dynamic}}, external_data=False,
        )  # fmt: skip
        return
    if not case.cached:
        torch.onnx.export(
            model, (), str(path), kwargs=given, dynamo=True, opset_version=20, input_names=list(given),
            dynamic_shapes={n: {0: dynamic, 1: dynamic} for n in given}, external_data=False,
        )  # fmt: skip
        return
    past = past_of(given)
    shapes = ({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic}, [{0: dynamic, 2: dynamic}] * len(past))
    names = [f"{stem}.{i}.{what}" for stem in ("past_key_values", "present") for i in range(len(past) // 2) for what in ("key", "value")]
    torch.onnx.export(
        Plain(model), (given["input_ids"], given["attention_mask"], past), str(path), dynamo=True, opset_version=20, dynamic_shapes=shapes,
        input_names=["input_ids", "attention_mask", *names[: len(past)]], output_names=["logits", *names[len(past) :]], external_data=False,
    )  # fmt: skip


def optimized(case: Case, work: Work) -> Path:
    """The plain export through onnxruntime's own optimizer for transformers."""
    path = work.path(case, "ort.onnx")
    if not path.exists():
        from onnxruntime.transformers.optimizer import optimize_model

        config: Any = live(folder_of(case, work.folder)).config
        source = str(plain(case, work))
        with quiet():
            try:
                made = optimize_model(
                    source, model_type=case.optimizer, num_heads=config.num_attention_heads, hidden_size=config.hidden_size
                )
            except IndexError:  # its rules for GPT-2 trip over the new exporter's graphs; those for BERT do not
                made = optimize_model(source, model_type="bert", num_heads=config.num_attention_heads, hidden_size=config.hidden_size)
            made.save_model_to_file(str(path))
    return path


def peer(case: Case, work: Work, what: str, target: Path) -> Path:
    """Something that another Python with other packages writes (see :mod:`benchmarks.inference_peers`)."""
    if not target.exists():
        if not work.peers:
            raise RuntimeError("needs `--peers PYTHON` with optimum-onnx installed")
        asked = json.dumps({"what": what, "folder": str(folder_of(case, work.folder)), "target": str(target), "task": case.task})
        done = subprocess.run([work.peers, str(ROOT / "benchmarks/inference_peers.py"), asked], capture_output=True, text=True, check=False)
        if not target.exists():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(lines[-1][:160] if lines else f"{what} wrote nothing")
    return target


# ------------------------------------------------------------------ calls


def onnx_call(path: Path, work: Work, given: dict[str, torch.Tensor]) -> Call:
    run = session(path, work.threads)
    own = {}
    for i in run.get_inputs():
        if i.name not in given and i.name == "position_ids":
            continue
        own[i.name] = given[i.name].numpy()
    return lambda: run.run(None, own)[0]


def eager_call(case: Case, model: nn.Module, given: dict[str, torch.Tensor]) -> Call:
    plain_ = {n: t for n, t in given.items() if not n.startswith("past_key_values")}
    past = past_of(given)

    def call() -> Any:
        with torch.inference_mode():
            if not case.cached:
                return model(**plain_)[0]
            return model(**plain_, past_key_values=cache_of(past), use_cache=True).logits

    return call


def openvino_call(path: Path, work: Work, given: dict[str, torch.Tensor]) -> Call:
    if work.peers and not any("openvino" in p for p in sys.modules):
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        sys.path.append(str(Path(work.peers).parent.parent / "lib" / version / "site-packages"))
    import openvino

    core = openvino.Core()
    made = core.compile_model(
        core.read_model(str(path)),
        "CPU",
        {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": work.threads, "INFERENCE_PRECISION_HINT": "f32"},
    )
    own = {n: given[n].numpy() for i in made.inputs for n in i.get_names() if n in given}
    request = made.create_infer_request()

    def call() -> Any:
        return request.infer(own, share_inputs=True, share_outputs=True)[made.outputs[0]]

    return call


def pt2_call(case: Case, path: Path, given: dict[str, torch.Tensor]) -> Call:
    from surgery.backends import aoti, served

    record = aoti.read_record(path)
    assert record is not None
    package, tree, out = aoti.load(path), record["call"]["inputs"], record["call"]["outputs"]
    nested = served.nest(iter([given[i["name"]] for i in record["inputs"]]), tree)

    def call() -> Any:
        with torch.inference_mode():
            return served.flat(package(**nested), out)[0]

    return call


def calls(case: Case, shape: Shape, work: Work, wanted: tuple[str, ...]) -> dict[str, Call]:
    """The arms that can be had, in the order of the table; the rest is in ``work.left_out``."""
    model = live(folder_of(case, work.folder))
    given = feeds(case, model, shape)
    makers: dict[str, Callable[[], Call]] = {
        "eager": lambda: eager_call(case, model, given),
        "torch.compile": lambda: eager_call(case, compiled(model), given),
        "plain onnx": lambda: onnx_call(plain(case, work), work, given),
        "onnxruntime optimizer": lambda: onnx_call(optimized(case, work), work, given),
        "optimum O2": lambda: onnx_call(peer(case, work, "o2", work.path(case, "o2.onnx")), work, given),
        "OpenVINO": lambda: openvino_call(plain(case, work), work, given),
        "ours onnx": lambda: onnx_call(ours(case, work, "onnx"), work, given),
        "ours pt2": lambda: pt2_call(case, ours(case, work, "pt2"), given),
        INT8: lambda: onnx_call(ours(case, work, "onnx", "int8"), work, given),
        "floor onnx": lambda: onnx_floor(sizes_of(case, model.config, shape), shape, work.folder / "floor.onnx", work.threads),
        "floor torch": lambda: torch_floor(sizes_of(case, model.config, shape), shape),
    }
    found: dict[str, Call] = {}
    for name in ORDER:
        if name not in wanted:
            continue
        try:
            with quiet():
                call = makers[name]()
                call()  # compiles, and shows whether it runs at all
            found[name] = call
        except Exception as exc:
            text = next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
            work.left_out[f"{case.name}, {shape.label}: {name}"] = f"{type(exc).__name__}: {text[:160]}"
    return found


def compiled(model: nn.Module) -> Any:
    """``torch.compile`` for one shape: the form in which it is fastest."""
    torch._dynamo.reset()
    return torch.compile(model, dynamic=False)


def error(reference: Any, value: Any) -> float:
    a, b = (np.asarray(v.numpy() if isinstance(v, torch.Tensor) else v, dtype=np.float64) for v in (reference, value))
    return float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")
