"""Adapters that stay tensors of their own in an ONNX graph, so that a session can exchange them without another export.

Their tensors are inputs of the graph that have initializers of the same name: a run that does not give them uses the adapter that was
emitted, and no optimizer of a runtime computes with their values or renames them, as it would with plain initializers (a transposed
weight is folded when the model is loaded, its name is lost, and what is given under that name is then ignored without a word). Names
and layout are those of the torch artifact. Axes that the model leaves open, such as the rank, are open in the graph as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from surgery.core.diagnostics import fail
from surgery.core.source import Span
from surgery.model.program import Attachment, Program

aten = torch.ops.aten
RECORD = "surgery.adapters"
"""Key of the metadata entry: per module the label, the method, its parameters, its scale and its tensors."""


def held(program: Program, modules: frozenset[str]) -> list[Attachment]:
    """The attachments in these modules, in order."""
    return [a for a in program.attachments if a.module in modules]


def tensor_names(program: Program, modules: frozenset[str]) -> tuple[str, ...]:
    """The stored names of the tensors of these modules, each once, in order."""
    return tuple(dict.fromkeys(program.aliases.get(t, t) for a in held(program, modules) for t in a.tensors))


def values(root: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """These tensors of a root, by name."""
    tensors = dict(root.named_parameters(remove_duplicate=False)) | dict(root.named_buffers(remove_duplicate=False))
    return {n: tensors[n].detach() for n in names if n in tensors}


class WithLive(nn.Module):
    """A root that takes some of its tensors as further inputs, behind its own.

    It has the root's modules for its own, so that all names stay; the root itself is no submodule.
    """

    def __init__(self, root: fx.GraphModule, names: Sequence[str]) -> None:
        super().__init__()
        self._modules, self._parameters, self._buffers = root._modules, root._parameters, root._buffers
        self.__dict__["root"], self.__dict__["names"] = root, tuple(names)

    def forward(self, *given: Tensor) -> Any:
        own = len(given) - len(self.names)
        return functional_call(self.root, dict(zip(self.names, given[own:], strict=True)), tuple(given[:own]))


def loosen(root: fx.GraphModule, names: Iterable[str]) -> None:
    """Sizes that a flat graph has fixed to those of live tensors are read from the values instead, so that a rank stays open.

    That is the last size of a reshape that keeps the last axis, where the value was computed from such a tensor.
    """
    wanted, graph = set(names), root.graph
    reached: set[fx.Node] = set()
    changed = False
    for node in list(graph.nodes):
        if (node.op == "get_attr" and str(node.target) in wanted) or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
        if node not in reached or node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
            continue
        source, sizes = node.args[0], node.args[1]
        shape = getattr(source.meta.get("val"), "shape", None) if isinstance(source, fx.Node) else None
        if not shape or not isinstance(sizes, list | tuple) or not sizes or not isinstance(sizes[-1], int) or sizes[-1] != shape[-1]:
            continue
        with graph.inserting_before(node):
            last = graph.call_function(aten.sym_size.int, (source, len(shape) - 1))
        node.args = (source, [*sizes[:-1], last])
        changed = True
    if changed:
        root.recompile()


def blamed(exported: Any, program: Program, modules: frozenset[str], operations: Iterable[str]) -> list[str]:
    """The labels of live adapters that compute with one of these operations, by the modules that the tracer saw them in."""
    from torch._decomp import decomposition_table

    wanted = tuple(operations)
    found: dict[str, None] = {}
    for node in exported.run_decompositions(dict(decomposition_table)).graph.nodes:
        if node.op != "call_function" or not any(name in str(node.target) for name in wanted):
            continue
        paths = {str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()}
        found.update(
            dict.fromkeys(a.name for a in held(program, modules) if any(p == a.module or p.endswith(f".{a.module}") for p in paths))
        )
    return list(found)


def overridable(model: Any, root: nn.Module, names: Sequence[str], span: Span | None) -> None:
    """Gives the inputs of these names their initializers. Raises S0871 when one has no place in the graph: giving it would do nothing."""
    import onnx

    there = {i.name for i in model.graph.input}
    used = {n for node in model.graph.node for n in node.input}
    found = values(root, names)
    for name in names:
        if name not in there or name not in used:
            raise fail(
                "S0871", f"`{name}` cannot stay live: the graph does not read it", span, "asked to stay live here",
                help="leave it out of `live`, then it is folded, or use `emit torch`",
            )  # fmt: skip
        tensor = found[name].contiguous()
        plain = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        kind = next(i.type.tensor_type.elem_type for i in model.graph.input if i.name == name)
        model.graph.initializer.append(onnx.helper.make_tensor(name, kind, list(tensor.shape), plain.numpy().tobytes(), raw=True))


def open_axes(model: Any, names: Sequence[str]) -> dict[str, list[str | int]]:
    """The shape of each live input: a name where the axis is open."""
    wanted = set(names)
    return {
        i.name: [d.dim_param or int(d.dim_value) for d in i.type.tensor_type.shape.dim] for i in model.graph.input if i.name in wanted
    }  # fmt: skip


def scale_of(method: Any) -> float | None:
    """The factor that a method puts in front of its change, where it has one: it is a constant of the graph."""
    scale = getattr(method, "scale", None)
    return float(scale()) if callable(scale) else None


def record(program: Program, modules: frozenset[str], model: Any) -> list[dict[str, Any]]:
    """What the metadata says of the live adapters."""
    shapes = open_axes(model, tensor_names(program, modules))
    out = []
    for a in held(program, modules):
        out.append(
            {
                "name": a.name, "site": a.site.role, "module": a.module, "method": f"{a.method.verb} {a.method.name}",
                "params": json.loads(json.dumps(a.method.params(), default=str)), "scale": scale_of(a.method),
                "tensors": {t: shapes[program.aliases.get(t, t)] for t in a.tensors if program.aliases.get(t, t) in shapes},
            }
        )  # fmt: skip
    return out


# ------------------------------------------------------------------ other values, for the certificate


def another(root: nn.Module, names: Sequence[str], shapes: dict[str, list[str | int]], more: int) -> dict[str, Tensor]:
    """Other values for live tensors, seeded by their names' order: of their own size, or ``more`` larger on every open axis."""
    generator = torch.Generator().manual_seed(29)
    out: dict[str, Tensor] = {}
    for name, tensor in values(root, names).items():
        sizes = [n + (more if isinstance(s, str) else 0) for n, s in zip(tensor.shape, shapes[name], strict=True)]
        if not tensor.is_floating_point():
            out[name] = tensor
            continue
        new = torch.randn(sizes, generator=generator) * (0.5 / math.sqrt(max(1, sizes[-1] if sizes else 1)))
        out[name] = new.to(tensor.dtype)
    return out


def tied(root: nn.Module, model: Any, names: Sequence[str], inputs: Sequence[Tensor]) -> frozenset[str]:
    """The live tensors whose open axes cannot grow one by one: sizes that go with other sizes (the sides of a Kronecker product).

    A graph leaves them open where its own operations take any size, and still no other adapter of the method would have such sizes.
    """
    shapes = open_axes(model, names)
    wide = [n for n in names if any(isinstance(s, str) for s in shapes.get(n, ()))]
    if not wide or _grows(root, wide, shapes, inputs):
        return frozenset()
    groups: dict[str, list[str]] = {}
    for name in wide:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    found = [n for group in groups.values() if not _grows(root, group, shapes, inputs) for n in group]
    return frozenset(found or wide)


def _grows(root: nn.Module, names: Sequence[str], shapes: dict[str, list[str | int]], inputs: Sequence[Tensor]) -> bool:
    try:
        run_with(root, another(root, names, shapes, 1), inputs)
    except RuntimeError:
        return False
    return True


def run_with(root: nn.Module, given: dict[str, Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The outputs of a root with other values for some of its tensors."""
    with torch.no_grad():
        found = functional_call(root, given, tuple(inputs))
    return [t for t in (found if isinstance(found, (tuple, list)) else (found,)) if isinstance(t, Tensor)]
