"""Operations that torch's exporter cannot take as they are: what stands in for them, and what that is in ONNX."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx

from surgery.model import grouped, recurrence  # noqa: F401  (registers the product of sorted rows, and linear recurrences)


def prepare(root: fx.GraphModule) -> None:
    """Puts the stand-ins in place, in the root and all graphs below it. The graphs compute what they computed."""
    for module in root.modules():
        if not isinstance(module, fx.GraphModule):
            continue
        nodes = [n for n in module.graph.nodes if n.op == "call_function" and n.target is torch.ops.aten._grouped_mm.default]
        for node in nodes:
            offsets = node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
            left, right = node.args[:2]
            if offsets is None or len(node.args) > 3 or set(node.kwargs) - {"offs"}:
                continue  # batched products or a bias: left to the exporter
            node.target, node.args, node.kwargs = torch.ops.surgery.grouped_mm.default, (left, right, offsets), {}
        if nodes:
            module.recompile()


@cache
def translations() -> dict[Any, Callable[..., Any]]:
    """For ``custom_translation_table``: the ONNX form of each stand-in."""
    from onnxscript import FLOAT, INT32
    from onnxscript import opset18 as op

    def products(x: FLOAT, weight: FLOAT, offsets: INT32) -> FLOAT:
        """One slice and one product for each expert: the work is that of the rows, not of rows times experts."""
        ends = op.Cast(offsets, to=7)
        zero, parts = op.Constant(value_ints=[0]), []
        start = zero
        experts = next(n for n in (weight.shape[0], offsets.shape[0]) if isinstance(n, int))  # a live adapter's axes may be open
        for e in range(experts):
            at, after = op.Constant(value_ints=[e]), op.Constant(value_ints=[e + 1])
            end = op.Slice(ends, at, after, zero)
            own = op.Squeeze(op.Slice(weight, at, after, zero), zero)
            parts.append(op.MatMul(op.Slice(x, start, end, zero), own))
            start = end
        return op.Concat(*parts, axis=0)

    def scan(decay: Any, given: Any, dim: int, first: float, over: tuple[str, str]) -> Any:
        """Along one axis: the step's two operations, from ``first`` on."""
        from onnxscript import ir
        from torch.onnx._internal.exporter._torchlib.ops.hop import call_op

        rank = len(decay.shape)
        axis = dim % rank
        rest = op.Constant(value_ints=[i for i in range(rank) if i != axis])
        start = op.CastLike(op.ConstantOfShape(op.Gather(op.Shape(decay), rest), value=ir.tensor([first])), decay)
        return call_op(
            "Scan", start, decay, given, _num_outputs=2, body=_step(decay, axis, over), num_scan_inputs=2, scan_input_axes=[axis, axis],
            scan_output_axes=[axis],
        )[1]  # fmt: skip

    def states(decay: FLOAT, given: FLOAT, dim: int) -> FLOAT:
        return scan(decay, given, dim, 0.0, ("Mul", "Add"))

    def maxima(added: FLOAT, given: FLOAT, dim: int) -> FLOAT:
        return scan(added, given, dim, float("-inf"), ("Add", "Max"))

    return {
        torch.ops.surgery.grouped_mm.default: products,
        torch.ops.surgery.recurrence.default: states,
        torch.ops.surgery.running_maximum.default: maxima,
    }


def _step(like: Any, axis: int, over: tuple[str, str]) -> Any:
    """One step of a recurrence: the next state from the state, its decay and what is given by two operations, once to go on with and once to
    keep."""
    from onnxscript import ir

    shape = ir.Shape([n for i, n in enumerate(like.shape) if i != axis])
    state, decay, given = (
        ir.Value(name=f"{like.name}_{n}", shape=shape, type=ir.TensorType(like.dtype)) for n in ("state", "decay", "given")
    )
    faded = ir.Node("", over[0], [decay, state])
    after = ir.Node("", over[1], [faded.outputs[0], given])
    kept = ir.Node("", "Identity", [after.outputs[0]])
    for node, name in ((faded, "faded"), (after, "after"), (kept, "kept")):
        node.outputs[0].name = f"{like.name}_{name}"
        node.outputs[0].shape, node.outputs[0].type = shape, ir.TensorType(like.dtype)
    return ir.Graph([state, decay, given], [after.outputs[0], kept.outputs[0]], nodes=[faded, after, kept], name=f"{like.name}_step")
