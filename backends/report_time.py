"""Times of one call for a report: the model before and after in torch, and the ONNX files that were emitted before the report."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from surgery.backends.protocol import EmitRequest
from surgery.model.atomic import pending
from surgery.model.live import live_root
from surgery.model.program import Program
from surgery.model.running import is_small
from surgery.model.sample import sample_inputs

SHAPES = ((1, 16), (1, 128), (8, 128))
"""(batch, length) of the calls; models without tokens read the batch only."""

ROUNDS = 5


def measured(request: EmitRequest, program: Program) -> list[tuple[str, ...]]:
    """Rows for a table, its head first: median milliseconds of :data:`ROUNDS` interleaved calls, by what runs and shape.

    Models too large to be run whole are left out, and the head says so.
    """
    assert request.base is not None
    arms: dict[str, Callable[[list[torch.Tensor]], Any]] = {}
    for name, one in (("torch, before", request.base), ("torch, after", program)):
        if is_small(one):
            arms[name] = _torch(one, request.tensors)
    if not arms:
        return [("too large to be run here",)]
    for backend, path, emitted in request.earlier:
        if backend == "onnx" and len(emitted.paths) == 1:  # one that keeps its weights beside it cannot be opened before both stand
            arms[f"onnx, {path}"] = _onnx(pending(emitted.paths[0]), program)
    found: dict[tuple[str, tuple[int, int]], float] = {}
    for shape in SHAPES:
        inputs = sample_inputs(program, batch=shape[0], length=shape[1], seed=5, padding=False)
        spent: dict[str, list[float]] = {name: [] for name in arms}
        for turn in range(ROUNDS + 1):
            for name, run in arms.items():
                start = time.perf_counter()
                run(inputs)
                if turn:  # the first call warms up
                    spent[name].append(time.perf_counter() - start)
        found |= {(name, shape): 1000 * statistics.median(times) for name, times in spent.items()}
    head = ("", *(f"({b}, {n})" for b, n in SHAPES))
    return [head, *((name, *(f"{found[name, s]:.2f}" for s in SHAPES)) for name in arms)]


def _torch(program: Program, tensors: Any) -> Callable[[list[torch.Tensor]], Any]:
    root = live_root(program, tensors, dtype=torch.float32).eval()

    def run(inputs: list[torch.Tensor]) -> Any:
        with torch.no_grad():
            return root(*inputs)

    return run


def _onnx(path: Any, program: Program) -> Callable[[list[torch.Tensor]], Any]:
    import onnxruntime

    from surgery.backends.onnx_export import input_names

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    read = {i.name: i.type for i in session.get_inputs()}
    names = input_names(program)

    def run(inputs: list[torch.Tensor]) -> Any:
        return session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True) if n in read})

    return run
