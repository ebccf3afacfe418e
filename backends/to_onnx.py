"""The onnx backend: one ONNX file with dynamic axes, the original tensor names, and a measured certificate inside."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from surgery.backends.onnx_export import STEPS, export, input_names
from surgery.backends.protocol import EmitRequest, Emitted, owns
from surgery.core.diagnostics import SurgeryError, error, fail
from surgery.core.progress import report
from surgery.core.source import Span
from surgery.model.atomic import AtomicOutput, afterwards
from surgery.model.live import live_root
from surgery.model.program import Program
from surgery.model.sample import sample_inputs
from surgery.model.threads import one_thread

BFLOAT16 = 16
"""TensorProto.BFLOAT16"""

INLINE_LIMIT = 1 << 30
"""Weights above this many bytes go to one external file (a protobuf cannot hold 2 GiB)."""

PRECISION = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Allowed difference to torch in the same precision, times the output's scale when that is above one."""

CASES = (("random", 2, 16, False, 0), ("padded", 3, 23, True, 0), ("single", 1, 7, False, 0), ("cached", 2, 1, False, 6))
"""(name, batch, length, padding, past) of the inputs that the certificate measures; the last only where there is a cache."""


def require_onnx(span: Span | None = None) -> None:
    """Raises S0840 when the onnx extra is not installed."""
    missing = [m for m in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(m) is None]
    if missing:
        raise fail(
            "S0840", f"emitting onnx needs {', '.join(missing)}", span, "asked for here",
            help="pip install 'model-surgery[onnx]'", exit_code=2,
        )  # fmt: skip


def _dtype(root: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)


def session(data: bytes | str) -> Any:
    """An onnxruntime session on the CPU with quiet logs and one thread (results must not depend on the machine)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


class Reference:
    """The standard's own evaluator with the interface of a session: slow and complete, for types that onnxruntime's CPU has no kernels for."""

    def __init__(self, model: Any) -> None:
        from onnx.reference import ReferenceEvaluator

        self.inner = ReferenceEvaluator(model)

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=n) for n in self.inner.input_names]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=n) for n in self.inner.output_names]

    def run(self, names: None, feeds: dict[str, Any]) -> list[Any]:
        found: list[Any] = self.inner.run(names, feeds)
        return found


def as_numpy(tensor: torch.Tensor) -> Any:
    """An array of the same values; numpy has no bfloat16 of its own."""
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    import ml_dtypes

    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def checked_session(model: Any) -> Any:
    """A session on a model that the ONNX checker accepts; one too large for a single message goes through a temporary folder.

    onnxruntime's CPU provider has few operations in bfloat16: a graph that needs others is run by :class:`Reference`.
    """
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    try:
        return _session(model)
    except NoKernel:
        if weight_bytes(model) > INLINE_LIMIT or not any(i.data_type == BFLOAT16 for i in model.graph.initializer):
            raise
        return Reference(model)


def _session(model: Any) -> Any:
    import onnx

    if weight_bytes(model) <= INLINE_LIMIT:
        onnx.checker.check_model(model)
        return session(model.SerializeToString())
    with tempfile.TemporaryDirectory() as folder:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        name, data = externalise(copy, "model")
        (Path(folder) / name).write_bytes(data)
        del data
        path = Path(folder) / "model.onnx"
        path.write_bytes(copy.SerializeToString())
        onnx.checker.check_model(str(path))
        return session(str(path))


def inexpressible(exc: Exception, span: Span | None, opset: int) -> SurgeryError:
    """S0841 with the operations that have no translation, else with the exporter's own first lines."""
    text, cause = str(exc), exc.__cause__
    while cause is not None:
        text, cause = f"{text}\n{cause}", cause.__cause__
    missing = sorted(set(re.findall(r"No (?:ONNX function|decomposition|translation) found for.*?([\w]+[.:]+[\w.]+)", text)))
    missing += sorted(set(re.findall(r"OpOverload\(op='([\w.]+)'", text)) - set(missing)) if "No ONNX function" in text else []
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [
        line.strip() for line in plain.splitlines() if line.strip() and not line.strip().startswith(("#", "- If ", "Failed to convert"))
    ]
    help = "emit torch instead, or try another opset"
    if "bfloat16" in plain and opset < 22:
        help = "write `opset = 22`: older ones have no convolutions and poolings in bf16"
    what = f"ONNX has no operation for {', '.join(dict.fromkeys(missing))}" if missing else "the exporter cannot express this model in ONNX"
    return fail(
        "S0841", what, span, "asked for here", notes=() if missing else tuple(lines[:3]) or (type(exc).__name__,), help=help
    )  # fmt: skip


def certify(program: Program, root: torch.nn.Module, run: Any, *, tolerance: float) -> list[dict[str, Any]]:
    """Measures torch against onnxruntime on random, padded and single inputs: per output the largest absolute difference
    and its share of the output's scale. Positions that a mask switches off are compared too: both sides compute them."""
    read = {i.name for i in run.get_inputs()}
    outs = [o.name for o in run.get_outputs()]
    names = input_names(program)
    found: list[dict[str, Any]] = []
    for case, batch, length, padding, past in CASES:
        if past and not any(n.startswith("past_key_values.") for n in names):
            continue
        inputs = sample_inputs(program, batch=batch, length=length, seed=7, padding=padding, dtype=_dtype(root), past=past)
        with one_thread(), torch.no_grad():
            expected = root(*inputs)
        expected = expected if isinstance(expected, (tuple, list)) else (expected,)
        feeds = {n: as_numpy(t) for n, t in zip(names, inputs, strict=True) if n in read}
        for name, want, got in zip(outs, expected, run.run(None, feeds), strict=True):
            want_np = want.detach().double().numpy()
            error_abs = float(abs(want_np - got.astype("float64")).max()) if want_np.size else 0.0
            scale = max(1.0, float(abs(want_np).max()) if want_np.size else 1.0)
            found.append(
                {
                    "claim": "torch = onnx", "case": case, "output": name, "batch": batch, "length": length,
                    "max_abs_error": error_abs, "tolerance": tolerance * scale, "ok": error_abs <= tolerance * scale and math.isfinite(error_abs),
                    **({"runtime": "onnx reference evaluator"} if isinstance(run, Reference) else {}),
                }
            )  # fmt: skip
    return found


class OnnxBackend:
    """Exports, cleans, checks and certifies, then writes one file (two when the weights are large)."""

    name = "onnx"
    folds = True

    def emit(self, program: Program, request: EmitRequest) -> Emitted:
        """``params``: ``opset``, ``precision`` (fp32, fp16, bf16).

        Raises S0840 without the extra, S0841 when a graph cannot be expressed in ONNX, S0842 when the certificate fails, S0801 to
        S0805 for the target. Nothing is written then.
        """
        require_onnx(request.span)
        precision = str(request.params.get("precision") or "fp32")
        opset = int(request.params.get("opset") or 20)
        root = live_root(program, request.tensors, dtype=PRECISION[precision]).eval()
        try:
            model = export(program, root, opset=opset)
            report("emitting onnx: checking the graph", 3, STEPS)
            run = checked_session(model)
        except SurgeryError:
            raise
        except Exception as exc:
            raise inexpressible(exc, request.span, opset) from exc
        report("emitting onnx: measuring torch against onnxruntime", 4, STEPS)
        certificates = certify(program, root, run, tolerance=TOLERANCE[precision])
        bad = [c for c in certificates if not c["ok"]]
        if bad:
            raise SurgeryError(
                error(
                    "S0842", "the ONNX graph does not compute what the module computes", request.span, "asked for here",
                    notes=[f"{c['output']} on {c['case']} input: error {c['max_abs_error']:.3g}, allowed {c['tolerance']:.3g}" for c in bad],
                    help="nothing was written; try another opset, and please report the model's config",
                )
            )  # fmt: skip
        for key, value in (
            ("surgery.certificate", json.dumps([*request.certificates, *certificates], sort_keys=True)),
            ("surgery.spec", request.spec_digest),
        ):
            entry = model.metadata_props.add()
            entry.key, entry.value = key, value
        report("emitting onnx: writing", 5, STEPS)
        return Emitted(tuple(write(model, request)), tuple(certificates))


def write(model: Any, request: EmitRequest) -> list[Path]:
    """Writes the model whole or not at all; large weights go to one external file.

    The data file is named by its content and written first, so that the model file that stands there at any moment finds its
    own data; data files of earlier models are removed last.
    """
    target = request.target

    def replace(path: Path, data: bytes) -> None:
        with AtomicOutput(path, folder=False, force=request.force, own=lambda p: p != target or owns(p, request.spec_digest)) as temporary:
            temporary.write_bytes(data)

    if weight_bytes(model) <= INLINE_LIMIT:
        replace(target, model.SerializeToString(deterministic=True))
        name = ""
    else:
        name, data = externalise(model, target.name)
        replace(target.with_name(name), data)
        replace(target, model.SerializeToString(deterministic=True))

    def tidy() -> None:
        for old in sorted(target.parent.glob(f"{target.name}.*.data")):
            if old.name != name:
                old.unlink()

    afterwards(tidy)
    return [target, target.with_name(name)] if name else [target]


def weight_bytes(model: Any) -> int:
    return sum(len(i.raw_data) for i in model.graph.initializer)


def externalise(model: Any, stem: str) -> tuple[str, bytes]:
    """Moves all large initializers of a model into one byte string; gives the file name that the model now refers to."""
    digest = hashlib.sha256()
    large = [i for i in model.graph.initializer if len(i.raw_data) >= 1024]
    for init in large:
        digest.update(init.raw_data)
    name = f"{stem}.{digest.hexdigest()[:12]}.data"
    parts, offset = [], 0
    for init in large:
        data = init.raw_data
        for key, value in (("location", name), ("offset", str(offset)), ("length", str(len(data)))):
            item = init.external_data.add()
            item.key, item.value = key, value
        init.ClearField("raw_data")
        init.data_location = 1  # TensorProto.EXTERNAL
        parts.append(data + b"\0" * (-len(data) % 4096))
        offset += len(parts[-1])
    return name, b"".join(parts)


BACKEND = OnnxBackend()
