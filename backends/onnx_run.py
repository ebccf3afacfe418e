"""Running ONNX graphs here: sessions on the CPU, and the standard's own evaluator where the runtime has no kernels."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from surgery.backends import onnx_files

BFLOAT16 = 16
"""TensorProto.BFLOAT16"""


def session(data: bytes | str, *, optimized: bool = True) -> Any:
    """An onnxruntime session on the CPU with quiet logs and one thread (results must not depend on the machine)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


class Reference:
    """The standard's own evaluator with the interface of a session: slow and complete, for types that onnxruntime's CPU has no kernels for."""

    def __init__(self, model: Any) -> None:
        from onnx.reference import ReferenceEvaluator

        self.inner = ReferenceEvaluator(model)
        held = {i.name for i in model.graph.initializer}
        self.names = [n for n in self.inner.input_names if n not in held]

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=n) for n in self.names]

    def get_outputs(self) -> list[Any]:
        return [SimpleNamespace(name=n) for n in self.inner.output_names]

    def run(self, names: None, feeds: dict[str, Any]) -> list[Any]:
        found: list[Any] = self.inner.run(names, feeds)
        return found


def as_numpy(tensor: torch.Tensor) -> Any:
    """An array of the same values; numpy has no bfloat16 of its own."""
    if tensor.dtype != torch.bfloat16:
        return tensor.detach().numpy()
    import ml_dtypes

    return tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def checked_session(model: Any, packed: onnx_files.Packed | None = None) -> Any:
    """A session on a model that the ONNX checker accepts; one too large for a single message goes through a temporary folder.
    ``packed`` are the model's bytes where they are made already.

    onnxruntime's CPU provider has few operations in bfloat16: a graph that needs others is run by :class:`Reference`.
    """
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    try:
        return _session(model, packed=packed)
    except NoKernel:
        large = onnx_files.weight_bytes(model) > onnx_files.INLINE_LIMIT
        if large or not any(i.data_type == BFLOAT16 for i in model.graph.initializer):
            raise
        return Reference(model)


def open_session(model: Any) -> Any:
    """A session that computes every value of a graph as the graph states it: no optimizer, and no checker, which refuses outputs without a type."""
    return _session(model, optimized=False, check=lambda model: None)


def _session(
    model: Any, *, optimized: bool = True, check: Callable[[Any], None] | None = None, packed: onnx_files.Packed | None = None
) -> Any:  # fmt: skip
    import onnx

    check = check or onnx.checker.check_model
    packed = packed or onnx_files.Packed.of(model)
    if packed is not None:
        check(packed.data)
        return session(packed.data, optimized=optimized)
    with tempfile.TemporaryDirectory() as folder:
        path = onnx_files.inside(Path(folder), model)
        check(str(path))
        return session(str(path), optimized=optimized)
