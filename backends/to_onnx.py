"""The onnx backend: one ONNX file with dynamic axes, the original tensor names, and a measured certificate inside."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import math
import warnings
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import fx

from surgery.backends.protocol import EmitRequest, Emitted, owns
from surgery.core.diagnostics import SurgeryError, error, fail
from surgery.core.source import Span
from surgery.model.atomic import AtomicOutput
from surgery.model.live import live_root
from surgery.model.program import Program
from surgery.model.sample import placeholders, sample_inputs

INLINE_LIMIT = 1 << 30
"""Weights above this many bytes go to one external file (a protobuf cannot hold 2 GiB)."""

PRECISION = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 1e-1}
"""Allowed difference to torch in the same precision, times the output's scale when that is above one."""

CASES = (("random", 2, 16, False), ("padded", 3, 23, True), ("single", 1, 7, False))
"""(name, batch, length, padding) of the inputs that the certificate measures."""


def require_onnx(span: Span | None = None) -> None:
    """Raises S0840 when the onnx extra is not installed."""
    missing = [m for m in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(m) is None]
    if missing:
        raise fail(
            "S0840", f"emitting onnx needs {', '.join(missing)}", span, "asked for here",
            help="pip install 'model-surgery[onnx]'", exit_code=2,
        )  # fmt: skip


@contextmanager
def _quiet() -> Any:
    """The exporter prints progress and logs through several channels; none of it belongs in our output."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def output_names(program: Program, count: int) -> list[str]:
    """Names of the flat outputs from the output tree: the path of keys, joined by dots."""
    names: list[str] = []

    def walk(spec: Any, path: str) -> None:
        kind = spec.get("type")
        if kind == "tensor":
            names.append(path or "output")
        elif kind == "cache":
            layers = int(spec.get("layers", 0)) or sum(1 for i in spec.get("items", []) if i.get("type") == "tensor") // 2
            names.extend(f"present.{i}.{what}" for what in ("key", "value") for i in range(layers))
        elif kind != "const":
            keys = spec.get("keys") or [str(i) for i in range(len(spec.get("items", [])))]
            for key, item in zip(keys, spec.get("items", []), strict=True):
                walk(item, f"{path}.{key}" if path else str(key))

    walk(program.signature.out_spec, "")
    if len(names) != count or len(set(names)) != count:
        return [f"output_{i}" for i in range(count)]
    return names


def dynamic_shapes(program: Program) -> list[dict[int, Any] | None]:
    """Per flat input the dynamic axes of the capture, by axis; one Dim per symbol."""
    dims = {
        s: torch.export.Dim(_axis_name(s, at), min=0 if "past" in at[0] and at[1] != 0 else 1)
        for s, at in program.signature.symbols.items()
    }
    out: list[dict[int, Any] | None] = []
    for _, spec in placeholders(program):
        axes = {i: dims[str(n)] for i, n in enumerate(spec.shape) if str(n) in dims}
        compound = {i for i, n in enumerate(spec.shape) if hasattr(n, "free_symbols") and str(n) not in dims}
        out.append({**axes, **dict.fromkeys(compound, torch.export.Dim.AUTO)} or None)
    return out


def _axis_name(symbol: str, at: tuple[str, int, int]) -> str:
    name, axis, _ = at
    if "past" in name:
        return "past" if axis else "past_batch"
    return ("batch" if axis == 0 else "length") + ("" if "decoder" not in name else "_decoder") + f"_{symbol}"


def export(program: Program, root: fx.GraphModule, *, opset: int) -> Any:
    """The ONNX model (``onnx.ModelProto`` holder) of a realised root graph: flat inputs, flat outputs, original names."""
    example = sample_inputs(program, batch=3, length=13, seed=1, padding=False, dtype=_dtype(root))
    names = [name for name, _ in placeholders(program)]
    outputs = next(n for n in root.graph.nodes if n.op == "output").args[0]
    out_names = output_names(program, len(outputs) if isinstance(outputs, (tuple, list)) else 1)
    axes = [None if d is None else {i: torch.export.Dim.DYNAMIC for i in d} for d in dynamic_shapes(program)]
    with _quiet(), torch.no_grad():
        exported = torch.export.export(root.eval(), tuple(example), dynamic_shapes=tuple(axes), strict=False)
        return torch.onnx.export(
            exported, (), dynamo=True, opset_version=opset, input_names=names, output_names=out_names,
            external_data=False, optimize=True, verbose=False,
        )  # fmt: skip


def _dtype(root: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)


def finish(onnx_program: Any, root: torch.nn.Module) -> Any:
    """A deterministic ModelProto: exporter traces and host paths removed, tensor names the module's own."""
    model = onnx_program.model_proto
    keep = set(dict(root.named_parameters(remove_duplicate=False))) | set(dict(root.named_buffers(remove_duplicate=False)))
    del model.metadata_props[:]
    model.doc_string = ""
    model.producer_name, model.producer_version = "model-surgery", ""
    model.graph.name, model.graph.doc_string = "model", ""
    for graph in [model.graph, *model.functions]:
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
    for group in (model.graph.initializer, model.graph.value_info, model.graph.input, model.graph.output):
        for item in group:
            del item.metadata_props[:]
            item.doc_string = ""
    del model.graph.metadata_props[:]
    # the exporter may spell a parameter `p_encoder_layer_0_weight`: give every initializer its own name back
    flat = {n.replace(".", "_"): n for n in keep}
    rename = {}
    for init in model.graph.initializer:
        plain = init.name.removeprefix("p_").removeprefix("b_").removeprefix("c_")
        if init.name not in keep and plain in flat:
            rename[init.name] = flat[plain]
    for init in model.graph.initializer:
        init.name = rename.get(init.name, init.name)
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = rename.get(name, name)
    return model


def session(data: bytes | str) -> Any:
    """An onnxruntime session on the CPU with quiet logs and one thread (results must not depend on the machine)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def certify(program: Program, root: torch.nn.Module, run: Any, *, tolerance: float) -> list[dict[str, Any]]:
    """Measures torch against onnxruntime on random, padded and single inputs: per output the largest absolute difference
    and its share of the output's scale. Positions that a mask switches off are compared too: both sides compute them."""
    names = [i.name for i in run.get_inputs()]
    outs = [o.name for o in run.get_outputs()]
    found: list[dict[str, Any]] = []
    for case, batch, length, padding in CASES:
        inputs = sample_inputs(program, batch=batch, length=length, seed=7, padding=padding, dtype=_dtype(root))
        with torch.no_grad():
            expected = root(*inputs)
        expected = expected if isinstance(expected, (tuple, list)) else (expected,)
        feeds = {n: t.numpy() for (n, _), t in zip(placeholders(program), inputs, strict=True) if n in names}
        for name, want, got in zip(outs, expected, run.run(None, feeds), strict=True):
            want_np = want.detach().double().numpy()
            error_abs = float(abs(want_np - got.astype("float64")).max()) if want_np.size else 0.0
            scale = max(1.0, float(abs(want_np).max()) if want_np.size else 1.0)
            found.append(
                {
                    "claim": "torch = onnx", "case": case, "output": name, "batch": batch, "length": length,
                    "max_abs_error": error_abs, "tolerance": tolerance * scale, "ok": error_abs <= tolerance * scale and math.isfinite(error_abs),
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
        import onnx

        precision = str(request.params.get("precision") or "fp32")
        root = live_root(program, request.tensors, dtype=PRECISION[precision]).eval()
        try:
            model = finish(export(program, root, opset=int(request.params.get("opset") or 20)), root)
            onnx.checker.check_model(model)
            run = session(model.SerializeToString())
        except SurgeryError:
            raise
        except Exception as exc:
            lines = str(exc).strip().splitlines() or [type(exc).__name__]
            raise fail(
                "S0841", "the exporter cannot express this model in ONNX", request.span, "asked for here",
                notes=tuple(line.strip() for line in lines if line.strip())[:3], help="emit torch instead, or try another opset",
            ) from exc  # fmt: skip
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

    if sum(len(i.raw_data) for i in model.graph.initializer) <= INLINE_LIMIT:
        replace(target, model.SerializeToString(deterministic=True))
        name = ""
    else:
        name, data = externalise(model, target.name)
        replace(target.with_name(name), data)
        replace(target, model.SerializeToString(deterministic=True))
    for old in sorted(target.parent.glob(f"{target.name}.*.data")):
        if old.name != name:
            old.unlink()
    return [target, target.with_name(name)] if name else [target]


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
