"""A flat fused graph as an ``ExportedProgram``, built from what its nodes say instead of being traced once more."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._export.verifier import TrainingIRVerifier
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from surgery.backends.fuse.inline import general
from surgery.backends.fuse.nodes import CASTS

aten = torch.ops.aten


class Assembled(ExportedProgram):
    """A program whose operations the exporter knows as they are: there is nothing to decompose, and so nothing to trace for that."""

    again: Callable[[], ExportedProgram]
    """Gives the same program as a trace."""

    def run_decompositions(self, decomp_table: dict[Any, Any] | None = None, **options: Any) -> ExportedProgram:
        table = decomp_table or {}
        needed = [n for n in self.graph.nodes if n.op == "call_function" and n.target in table]
        if decomp_table is None or needed:
            return self.again().run_decompositions(decomp_table, **options)
        return self


def assembled(flat: fx.GraphModule, example: Sequence[Tensor], again: Callable[[], ExportedProgram]) -> ExportedProgram | None:
    """The program of a flat graph whose nodes carry their values; ``example`` are inputs that it runs on, ``again`` traces it.

    None where only a trace can tell: values without types, operations that write to their arguments, sizes of which something was assumed.
    """
    if not _known(flat):
        return None
    graph = fx.Graph()
    values: dict[fx.Node, Any] = {}
    sizes: dict[Any, fx.Node] = {}
    inputs: list[InputSpec] = []
    state: dict[str, Any] = {}
    held = {n.target: n for n in flat.graph.nodes if n.op == "get_attr"}
    lifted: dict[Any, fx.Node] = {}
    for name, first in held.items():
        tensor = _attribute(flat, str(name))
        is_parameter = isinstance(tensor, nn.Parameter)
        made = graph.placeholder(f"{'p' if is_parameter else 'b'}_{str(name).replace('.', '_')}")
        made.meta["val"] = first.meta["val"]
        kind = InputKind.PARAMETER if is_parameter else InputKind.BUFFER
        inputs.append(InputSpec(kind, TensorArgument(made.name), str(name), None if is_parameter else True))
        state[str(name)] = tensor
        lifted[name] = made
    for node in flat.graph.nodes:
        if node.op == "get_attr":
            values[node] = lifted[node.target]
        elif node.op == "output":
            outputs = tuple(values[n] for n in node.args[0])
            graph.output(outputs)
        elif _idle(node):
            values[node] = values[node.args[0]]
        elif (size := _size(node)) is not None and (isinstance(size, int) or size in sizes):
            values[node] = size if isinstance(size, int) else sizes[size]
        else:
            values[node] = made = graph.node_copy(node, values.__getitem__)
            _respell(made)
            if size is not None:
                sizes[size] = made
            if node.op == "placeholder":
                inputs.append(InputSpec(InputKind.USER_INPUT, TensorArgument(values[node].name), None))
    signature = ExportGraphSignature(inputs, [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in outputs])
    given: tuple[Any, ...] = (tuple(example), {})
    own = [s.arg for s in inputs if s.kind is InputKind.USER_INPUT]
    call = ModuleCallSignature(
        list(own), [s.arg for s in signature.output_specs], pytree.tree_structure(given), pytree.tree_structure(tuple(outputs)),
        [a.name for a in own],
    )  # fmt: skip
    env = _mode(flat).shape_env
    assert env is not None
    made = Assembled(
        nn.Module(), graph, signature, state, dict(env.var_to_range), [ModuleCallEntry("", call)], given, {}, verifiers=[TrainingIRVerifier]
    )  # fmt: skip
    made.again = again
    return made


_BITWISE = {
    aten.__and__.Tensor: aten.bitwise_and.Tensor,
    aten.__or__.Tensor: aten.bitwise_or.Tensor,
    aten.__xor__.Tensor: aten.bitwise_xor.Tensor,
}


def _respell(node: fx.Node) -> None:
    """The same operation by the name that the exporter knows."""
    if node.target in CASTS:
        node.target, node.args, node.kwargs = aten._to_copy.default, node.args[:1], {"dtype": node.meta["val"].dtype}
    elif node.target in _BITWISE:
        node.target = _BITWISE[node.target]
    elif (pure := _without_writing(node.target)) is not None:
        node.target = pure


def _without_writing(target: Any) -> Any:
    """The operation that gives what another one writes into its first argument, ``div`` for ``div_``; None for one that writes nothing or
    of which torch has no such form."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    space, _, name = target._schema.name.partition("::")
    written = [a.alias_info is not None and a.alias_info.is_write for a in target._schema.arguments]
    if not name.endswith("_") or name.endswith("__") or not written[0] or any(written[1:]):
        return None
    pure = getattr(getattr(getattr(torch.ops, space), name[:-1], None), target._overloadname, None)
    same = pure is not None and [(a.name, str(a.type)) for a in pure._schema.arguments] == [
        (a.name, str(a.type)) for a in target._schema.arguments
    ]
    return pure if same else None


def _unseen(node: fx.Node) -> bool:
    """Whether nobody can tell that a call writes into its first argument: that is new memory, which is not read again but as what the call
    gives, of which no view was taken, and whose type is that of all that is written."""
    into = node.args[0] if node.args else None
    if _without_writing(node.target) is None or not isinstance(into, fx.Node) or not _fresh(into):
        return False
    for user in into.users:
        if user is not node and (node < user or not _reads(user)):
            return False
    dtype = into.meta["val"].dtype
    values = [n.meta.get("val") for n in node.all_input_nodes]
    numbers = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, (float, complex))]
    return all(v.dtype == dtype for v in values if isinstance(v, Tensor)) and (dtype.is_floating_point or not numbers)


def _fresh(node: fx.Node) -> bool:
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return _unseen(node) or _reads(node)


def _reads(node: fx.Node) -> bool:
    """Whether an operation gives new memory and leaves its arguments as they are, as far as torch says of its operations."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or torch.Tag.maybe_aliasing_or_mutating in target.tags:
        return False
    return all(r.alias_info is None for r in target._schema.returns)


def _size(node: fx.Node) -> Any:
    """The number, or the expression of input sizes, that a node computes; None for tensors. Two nodes of one expression are one."""
    value = node.meta.get("val")
    return value.node.expr if isinstance(value, torch.SymInt) else value if type(value) is int else None


def _idle(node: fx.Node) -> bool:
    """Whether a call gives its argument as it is, but for where it lies in memory."""
    if node.target in (aten.contiguous.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default):
        return True
    return node.target in CASTS and node.meta["val"].dtype == node.args[0].meta["val"].dtype  # type: ignore[union-attr]


def _known(flat: fx.GraphModule) -> bool:
    for node in flat.graph.nodes:
        if node.op == "output":
            if not isinstance(node.args[0], (tuple, list)) or not all(isinstance(n, fx.Node) for n in node.args[0]):
                return False
        elif node.op not in ("placeholder", "get_attr", "call_function") or node.meta.get("val") is None:
            return False
        elif node.op == "get_attr" and not isinstance(node.meta["val"], FakeTensor):
            return False
        elif isinstance(node.target, torch._ops.OpOverload):
            if node.target._schema.is_mutable and not _unseen(node):
                return False
        elif node.op == "call_function" and getattr(operator, getattr(node.target, "__name__", ""), None) is not node.target:
            return False
    mode = _mode(flat)
    return mode is not None and mode.shape_env is not None and general(mode.shape_env)


def _mode(flat: fx.GraphModule) -> Any:
    return next((v.fake_mode for n in flat.graph.nodes if isinstance(v := n.meta.get("val"), FakeTensor)), None)


def _attribute(module: nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
