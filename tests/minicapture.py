"""A capture in miniature for tests of what comes after capture: one flat graph, linear and dropout as modules, no regions."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, export

from surgery.model import pytree
from surgery.model.program import ModelInfo, Program, Signature, ValueSpec
from surgery.model.weights import Held, Weights

aten = torch.ops.aten


def value_spec(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        shape = tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in value.shape)
        return ValueSpec("tensor", str(value.dtype).removeprefix("torch."), shape)
    if isinstance(value, torch.SymInt):
        return ValueSpec("int", "int64", (value.node.expr,))
    if isinstance(value, (tuple, list)):
        return tuple(value_spec(v) for v in value)
    return ValueSpec("other")


def mini_capture(live: nn.Module, inputs: dict[str, Any], dynamic: dict[str, Any], *, config: Any = None) -> Program:
    """A Program of ``live`` called with keyword ``inputs``; ``dynamic`` maps an input to its dynamic axes."""
    named = dict(live.named_parameters(remove_duplicate=False)) | dict(live.named_buffers(remove_duplicate=False))
    held = {n: t.detach().clone() for n, t in named.items()}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in named.items():
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    if config is not None:
        with torch.device("meta"):
            model = type(live)(config)
        if hasattr(model, "tie_weights"):
            model.tie_weights()
        model = model.to(torch.bfloat16)
        constants = {n: t for n, t in live.named_buffers() if t.dtype == torch.float32}
        for name in constants:  # a constant stays what it is: only the model's own dtype is free
            holder, _, leaf = name.rpartition(".")
            model.get_submodule(holder)._buffers[leaf] = model.get_submodule(holder)._buffers[leaf].float()
    else:
        model = copy.deepcopy(live).to("meta").to(torch.bfloat16)
    model.train()
    for p in model.parameters():
        p.requires_grad_(False)
    names = list(inputs)
    meta = torch.utils._pytree.tree_map_only(
        torch.Tensor, lambda t: t.to("meta").to(torch.bfloat16) if t.is_floating_point() else t.to("meta"), inputs
    )
    shapes = {n: dynamic.get(n) for n in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = export(model, (), meta, dynamic_shapes=shapes, strict=False)
    traced = exported.module(check_guards=False)
    graph = traced.graph
    normalise(traced)
    output = next(n for n in graph.nodes if n.op == "output")
    flat = torch.utils._pytree.tree_leaves(output.args[0])
    output.args = (tuple(flat),)
    graph.set_codegen(fx.graph.CodeGen())
    root = fx.GraphModule(traced, graph)
    restore_names(root, named, aliases)
    in_values = {n: meta[n] for n in names}
    result = live(**copy.deepcopy(inputs))
    weights = Weights()
    for name in named:
        if name not in aliases:
            tensor = held[name]
            weights[name] = Held(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), "test", tensor)
    symbols: dict[str, tuple[str, int, int]] = {}
    for node in root.graph.nodes:
        if node.op == "placeholder":
            for axis, size in enumerate(node.meta["spec"].shape):
                if not isinstance(size, int) and size.is_Symbol:
                    symbols.setdefault(str(size), (node.name, axis, 2))
    info = ModelInfo(
        ref="test", family=getattr(config, "model_type", "") or "", architecture=type(live).__name__,
        config=config.to_dict() if config is not None else {}, dtype="float32", hash="test",
    )  # fmt: skip
    signature = Signature(tuple(names), pytree.spec_of(in_values), pytree.spec_of(result), {}, symbols)
    return Program(graph=root, signature=signature, weights=weights, info=info, aliases=aliases)


def restore_names(root: fx.GraphModule, named: dict[str, torch.Tensor], aliases: dict[str, str]) -> None:
    """Give every tensor of the live model its place again: export keeps one name of a tied tensor."""
    present = {n: t for n, t in [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]}
    for alias, name in aliases.items():
        tensor = present.get(name, present.get(alias))
        for path in (name, alias):
            holder: nn.Module = root
            *steps, leaf = path.split(".")
            for step in steps:
                if step not in holder._modules:
                    holder.add_module(step, nn.Module())
                holder = holder._modules[step]
            holder._parameters[leaf] = tensor


def normalise(traced: fx.GraphModule) -> None:
    graph = traced.graph
    inline_grad_mode(traced)
    count = 0
    for node in list(graph.nodes):
        if node.op == "call_module" and "_guards" in str(node.target):
            graph.erase_node(node)
        elif node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
            graph.erase_node(node)
    for node in list(graph.nodes):
        if "val" in node.meta:
            node.meta["spec"] = value_spec(node.meta["val"])
        if node.op == "call_function" and node.target is aten.dropout.default:
            path = f"dropout_{count}"
            count += 1
            traced.add_module(path, nn.Dropout(node.args[1]))
            node.op, node.target, node.args = "call_module", path, (node.args[0],)
        if node.op == "call_function" and node.target is aten.linear.default and node.args[1].op == "get_attr":
            as_linear(traced, node)
    graph.eliminate_dead_code()


def as_linear(traced: fx.GraphModule, node: fx.Node) -> None:
    path = node.args[1].target.rpartition(".")[0]
    weight = traced.get_parameter(node.args[1].target)
    if not path or not node.args[1].target.endswith(".weight"):
        return
    parent, _, leaf = path.rpartition(".")
    has_bias = len(node.args) > 2 and node.args[2] is not None
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=has_bias, device="meta", dtype=weight.dtype)
    linear.weight = weight
    if has_bias:
        linear.bias = traced.get_parameter(node.args[2].target)
    setattr(traced.get_submodule(parent), leaf, linear)
    node.op, node.target, node.args = "call_module", path, (node.args[0],)


def inline_grad_mode(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        if "wrap_with_set_grad_enabled" not in str(node.target):
            continue
        inner = getattr(traced, node.args[1].target)
        table = dict(zip([n for n in inner.graph.nodes if n.op == "placeholder"], node.args[2:], strict=True))
        with traced.graph.inserting_before(node):
            outs = None
            for item in inner.graph.nodes:
                if item.op == "output":
                    outs = item.args[0]
                elif item.op != "placeholder":
                    table[item] = traced.graph.node_copy(item, lambda n: table[n])
        for user in list(node.users):
            user.replace_all_uses_with(table[outs[user.args[1]]])
            traced.graph.erase_node(user)
        traced.graph.erase_node(node)


def tensors_of(program: Program) -> dict[str, torch.Tensor]:
    return {name: expr.tensor for name, expr in program.weights.items()}


def accepts(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)
