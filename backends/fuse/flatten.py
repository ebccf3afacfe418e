"""One flat graph of aten operations from a live root: everything inlined, parameters under their own names, every value with its type."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from surgery.backends.fuse.inline import NotInlined, inlined
from surgery.backends.fuse.inline import dtype_of as dtype_of
from surgery.model.program import Program
from surgery.model.sample import placeholders, sample_inputs

aten = torch.ops.aten

CHECKS = frozenset({"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size"})
"""Operations that check what the tracer assumed and compute nothing."""


def dynamic_axes(program: Program) -> tuple[dict[int, Any] | None, ...]:
    """For ``torch.export``: every axis that the capture left open is open."""
    return tuple(
        {i: torch.export.Dim.DYNAMIC for i, n in enumerate(spec.shape) if getattr(n, "free_symbols", None)} or None
        for _, spec in placeholders(program)
    )


def _strip(graph: fx.Graph) -> None:
    """Takes out what computes nothing: dropout in evaluation, and reshapes to the shape that a value has."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if node.target is aten.dropout.default:
            idle = len(node.args) > 2 and node.args[2] is False
        elif node.target in (aten.reshape.default, aten.view.default):
            idle = _same(source.meta.get("val"), node.meta.get("val"))
        else:
            idle = False
        if idle:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _same(a: Any, b: Any) -> bool:
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor) or a.ndim != b.ndim:
        return False
    return all(bool(statically_known_true(x == y)) for x, y in zip(a.shape, b.shape, strict=True))


def flatten_live(program: Program, root: fx.GraphModule) -> fx.GraphModule:
    """The flat module of a root with real tensors. It shares the root's parameters and has its inputs and outputs.

    Every node has ``meta["val"]``, a fake tensor (sizes are symbols where they are open) or a symbolic number; ``get_attr`` nodes name
    parameters and buffers in full; ``meta["nn_module_stack"]`` says in which module it stands. What nobody reads is still there. Raises what ``torch.export`` raises.
    """
    try:
        flat = inlined(program, root)
    except NotInlined:
        flat = _traced(program, root)
    _strip(flat.graph)
    flat.recompile()
    return flat


def _traced(program: Program, root: fx.GraphModule) -> fx.GraphModule:
    """The same by torch's tracer, which takes longer and takes every module apart."""
    example = sample_inputs(program, batch=3, length=13, seed=1, padding=False, dtype=dtype_of(root), past=5)
    with torch.no_grad():
        exported = torch.export.export(root.eval(), tuple(example), dynamic_shapes=dynamic_axes(program), strict=False)
    unlifted = exported.module(check_guards=False)
    graph = unlifted.graph
    graph.set_codegen(fx.graph.CodeGen())
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and str(getattr(node.target, "__name__", node.target)).split(".")[0] in CHECKS:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "call_module" and str(node.target) == "_guards_fn":
            graph.erase_node(node)
    _first_names(program, unlifted, graph)
    flat = fx.GraphModule(unlifted, graph)
    flat.eval()
    return flat


def _first_names(program: Program, module: torch.nn.Module, graph: fx.Graph) -> None:
    """Tensors with several names are read by their first one; the tracer takes any."""
    for node in graph.find_nodes(op="get_attr"):
        name, first = str(node.target), program.aliases.get(str(node.target), str(node.target))
        if first == name:
            continue
        path, _, leaf = name.rpartition(".")
        owner = module
        for part in filter(None, first.rpartition(".")[0].split(".")):
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        if not hasattr(owner, first.rpartition(".")[2]):
            value = getattr(module.get_submodule(path), leaf)
            register = owner.register_parameter if isinstance(value, torch.nn.Parameter) else owner.register_buffer
            register(first.rpartition(".")[2], value)
        node.target = first
