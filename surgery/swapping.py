"""The adapters of a torch artifact as inputs of an ONNX graph that keeps the same adapters live."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from surgery.core.diagnostics import SurgeryError, fail

_TYPES = {1: torch.float32, 10: torch.float16, 11: torch.float64, 16: torch.bfloat16}
"""The floating types of tensors by their number in ONNX."""


def adapter_inputs(graph: str | Path, artifact: str | Path) -> dict[str, Any]:
    """The tensors of an artifact's adapters, by name, as a graph that was emitted with the same adapters live takes them.

    ``session.run(None, {**inputs, **adapter_inputs("model.onnx", "other")})`` runs the graph with the adapters of ``other``; without them
    it runs with those that it was emitted with. They may also be given to ``SessionOptions.add_initializer``, once for a session, or be
    packed with ``onnxruntime.AdapterFormat``. Raises S0879 when a tensor is missing, has a size that the graph does not leave open, or
    belongs to an adapter that is computed in another way or with another scale.
    """
    import onnx

    from surgery.backends.onnx_live import RECORD
    from surgery.backends.onnx_run import as_numpy

    model = onnx.load(str(graph), load_external_data=False)
    entry = next((p.value for p in model.metadata_props if p.key == RECORD), None)
    if entry is None:
        raise _unfit(artifact, f"{graph} keeps no adapter live", "emit it with `emit onnx(live = true)`")
    there, read = _stored(Path(artifact))
    kinds = {i.name: _TYPES.get(i.type.tensor_type.elem_type) for i in model.graph.input}
    out: dict[str, Any] = {}
    for one in json.loads(entry):
        other = there.get(one["module"])
        if other is None:
            raise _unfit(
                artifact,
                f"it has no adapter at {one['site']}, where the graph has {one['name']}",
                "use an artifact with adapters at the same sites",
            )
        for what in ("method", "scale"):
            if other[what] != one[what]:
                raise _unfit(
                    artifact, f"the {what} of {one['name']} at {one['site']} is {one[what]} in the graph and {other[what]} in the artifact",
                    "emit the graph from an adapter of this kind",
                )  # fmt: skip
        for name, shape in one["tensors"].items():
            tensor = read(name)
            if len(shape) != tensor.ndim or any(isinstance(s, int) and s != n for s, n in zip(shape, tensor.shape, strict=True)):
                wanted = ", ".join(str(s) for s in shape)
                raise _unfit(
                    artifact,
                    f"{name} is {list(tensor.shape)}, and the graph takes [{wanted}]",
                    "only axes with a name may have another size",
                )
            kind = kinds.get(name)
            out[name] = as_numpy(tensor.to(kind) if kind is not None and tensor.is_floating_point() else tensor)
    return out


def _unfit(artifact: Any, why: str, help: str) -> SurgeryError:
    return fail("S0879", f"the adapters of {artifact} do not fit the graph: {why}", help=help)


def _stored(folder: Path) -> tuple[dict[str, dict[str, Any]], Any]:
    """The adapters of an artifact by their module, and a function that reads a tensor by its name."""
    from surgery.backends.onnx_live import scale_of
    from surgery.model.artifact import read_artifact
    from surgery.model.live import Tensors
    from surgery.passes import registry

    program = read_artifact(folder, resolver=registry.get)
    tensors = Tensors(registry.function)
    found = {a.module: {"method": f"{a.method.verb} {a.method.name}", "scale": scale_of(a.method)} for a in program.attachments}
    return found, lambda name: tensors.of(program, name)
