"""Where half precision overflows: weights that have no value in it, and the first place of a graph whose result is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from surgery.backends.onnx_run import open_session


def lost_weights(root: nn.Module, exact: Callable[[str], torch.Tensor]) -> list[tuple[str, float]]:
    """Parameters with values beyond the root's own type, and the largest of them; ``exact`` gives a parameter as it is stored.

    Buffers are left out: masks hold the lowest number there is on purpose.
    """
    found = []
    for name, parameter in root.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            true = exact(name)
            if bool(torch.isfinite(true).all()):
                found.append((name, float(true.abs().max())))
    return found


def first_overflow(model: Any, feeds: Mapping[str, Any]) -> str:
    """The first place of a graph where finite values give one that is not, in words; "" when there is none.

    The graph runs with every value given out, so that each is rounded to the type that the graph states for it, as it is on
    a device that computes in that type.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    known = {o.name for o in copy.graph.output}
    made = [name for node in copy.graph.node for name in node.output if name]
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in made if name not in known)
    run = open_session(copy)
    names = [o.name for o in run.get_outputs()]
    values = dict(zip(names, run.run(None, dict(feeds)), strict=True)) | dict(feeds)
    bad = {name: _lost(value) for name, value in values.items()}
    held = {i.name: i for i in model.graph.initializer}
    for name, init in held.items():
        bad[name] = _lost(onnx.numpy_helper.to_array(init)) if init.raw_data or not init.external_data else False
    maker = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if any(bad.get(n) for n in node.output) and not any(bad.get(n) for n in node.input):
            return _where(node, values, held, maker)
    return next((_where(n, values, held, maker) for n in model.graph.node if any(bad.get(o) for o in n.output)), "")


def _lost(value: Any) -> bool:
    import numpy as np

    kind = getattr(value, "dtype", None)
    return kind is not None and kind.kind in "fV" and not bool(np.isfinite(value.astype(np.float32)).all())


def _where(node: Any, values: Mapping[str, Any], held: Mapping[str, Any], maker: Mapping[str, Any]) -> str:
    import numpy as np

    weights = [n for n in (_parameter(name, held, maker) for name in node.input) if n]
    sizes = [
        float(np.abs(values[n].astype(np.float32)).max())
        for n in node.input
        if n in values and values[n].dtype.kind in "fV" and values[n].size
    ]
    text = f"`{node.output[0]}`, the result of {node.op_type}"
    if weights:
        text += f" with `{weights[0]}`"
    return text + (f", from values of at most {max(sizes):.4g}" if sizes else "")


def _parameter(name: str, held: Mapping[str, Any], maker: Mapping[str, Any]) -> str:
    """The initializer that a value is a view or a cast of, "" for anything else."""
    for _ in range(8):
        if name in held:
            return name if len(held[name].dims) else ""
        node = maker.get(name)
        if node is None or node.op_type not in ("Transpose", "Cast", "Reshape", "Unsqueeze", "Squeeze", "Slice"):
            return ""
        name = node.input[0]
    return ""
