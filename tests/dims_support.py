"""For the tests of dimension classes: a plain export as a flat graph and a literal cut of it, beside the two oracles of what it must equal."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo import config as tracing
from torch.export import export
from torch.utils import _pytree as pytree

from surgery.model import oracle
from surgery.model.cut_graph import patch
from surgery.model.cut_sizes import NewSizes
from surgery.model.dims import Dims, Group, Keep, analyse
from surgery.model.oracle import FlatRun, MaskedRun
from surgery.model.program import ValueSpec

aten = torch.ops.aten


def spec_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        shape = tuple(s.node.expr if isinstance(s, torch.SymInt) else int(s) for s in value.shape)
        return ValueSpec("tensor", str(value.dtype).removeprefix("torch."), shape)
    if isinstance(value, (torch.SymInt, int)) and not isinstance(value, bool):
        return ValueSpec("int", "int64", (value.node.expr if isinstance(value, torch.SymInt) else value,))
    if isinstance(value, (tuple, list)):
        return tuple(spec_of(v) for v in value)
    return ValueSpec("other")


@dataclass
class Case:
    """A flat graph with its tensors, sample inputs and the analysis."""

    module: fx.GraphModule
    inputs: list[torch.Tensor]
    dims: Dims
    aliases: dict[str, str]

    def run(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return floats(self.module(*self.inputs))


def floats(out: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def trace(model: nn.Module, inputs: dict[str, torch.Tensor], dynamic: dict[str, Any] | None = None, *, strict: bool = True) -> Case:
    """Export ``model`` in evaluation mode and analyse the flat graph; parameters get a seeded perturbation first."""
    model = model.eval()
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(0.05 * torch.randn_like(p))
            if p.dim() == 4:  # deep stacks of convolutions must not damp everything to zero
                nn.init.kaiming_normal_(p)
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if first.setdefault(id(tensor), name) != name:
            aliases[name] = first[id(tensor)]
    # small models are traced once each: the tracer's memory of earlier operations would cost more than it gives
    with warnings.catch_warnings(), tracing.patch(fake_tensor_cache_enabled=False):
        warnings.simplefilter("ignore")
        ep = export(model, (), inputs, dynamic_shapes=dynamic, strict=False)
        module = ep.module(check_guards=False)
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" or node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
            graph.erase_node(node)
    inline_wrappers(module)
    for node in graph.nodes:
        if node.op == "get_attr":
            value: Any = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            node.meta["spec"] = spec_of(value)
        elif "val" in node.meta:
            node.meta["spec"] = spec_of(node.meta["val"])
    graph.set_codegen(fx.graph.CodeGen())
    names = [n.target for n in graph.nodes if n.op == "placeholder"]
    flat = fx.GraphModule(module, graph)
    flat.graph.eliminate_dead_code()
    for node in list(flat.graph.nodes):
        if node.op == "placeholder" and node.meta.get("spec") is None:
            raise AssertionError(node)
    flat.eval()
    flat.recompile()
    given = pytree.tree_leaves([inputs[n] for n in inputs])
    assert len(given) == len(names)
    return Case(flat, given, analyse(flat, aliases=aliases, strict=strict), aliases)


def inline_wrappers(module: fx.GraphModule) -> None:
    """Put the body of grad-mode and autocast wrappers in their place."""
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not str(node.target).startswith("wrap_with"):
            continue
        at = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        inner = getattr(module, node.args[at].target)
        table = dict(zip([n for n in inner.graph.nodes if n.op == "placeholder"], node.args[at + 1 :], strict=True))
        result: Any = None
        with graph.inserting_before(node):
            for item in inner.graph.nodes:
                if item.op == "output":
                    result = item.args[0]
                elif item.op != "placeholder" and item.target is not aten._assert_tensor_metadata.default:
                    table[item] = graph.node_copy(item, table.__getitem__)
        for user in list(node.users):
            user.replace_all_uses_with(table[result[user.args[1]]])
            graph.erase_node(user)
        graph.erase_node(node)
    graph.eliminate_dead_code()


# ---------------------------------------------------------------- the cut


def cut(case: Case, group: Group) -> Callable[..., Any]:
    """What runs the graph without a group's units: tensors selected, constants patched, views made reshapes."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(case.module.graph, copies))
    further: dict[str, list[str]] = {}
    for alias, name in case.aliases.items():
        further.setdefault(name, []).append(alias)
    tensors: dict[str, torch.Tensor] = {}
    for member in group.members:
        for name in (member.parameter, *further.get(member.parameter, ())):
            tensor = tensors.get(name, resolve(case.module, name)[1])
            if tensor is None:
                continue
            index = torch.cat([torch.arange(a, b) for a, b in member.kept]) if member.kept else torch.zeros(0, dtype=torch.long)
            tensors[name] = tensor.detach().index_select(member.axis, index)
    sizes = NewSizes(group.dims, group.keep)
    for change in group.constants:
        patch(copies[change.node], change, sizes)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is aten.view.default:
            node.target = aten.reshape.default
    graph.lint()
    run = FlatRun(graph, lambda name: tensors[name] if name in tensors else resolve(case.module, name)[1])
    return lambda *inputs: run(inputs)


def resolve(module: nn.Module, name: str) -> tuple[Any, Any]:
    holder: Any = module
    *path, leaf = name.split(".")
    for part in path:
        holder = getattr(holder, part, None)
        if holder is None:
            return None, None
    return holder, getattr(holder, leaf, None)


# ---------------------------------------------------------------- oracles


def read(case: Case) -> Any:
    return lambda name: resolve(case.module, name)[1]


def zeroed(case: Case, group: Group) -> list[torch.Tensor]:
    """The original graph with the removed slices of every parameter set to zero."""
    return floats(FlatRun(case.module.graph, oracle.without(group.members, read(case)))(case.inputs))


def masked(case: Case, group: Group) -> list[torch.Tensor]:
    """The original graph with every value masked by its axes; normalisers count and see only units that stay."""
    axes = {n: case.dims.axes(n) for n in case.module.graph.nodes if n.op != "output"}
    return floats(MaskedRun(case.module.graph, read(case), case.dims, group.keep, axes.__getitem__)(case.inputs))


def select_outputs(case: Case, group: Group, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The oracle's outputs with the axes that the cut made smaller selected."""
    node = case.module.graph.output_node()
    values = [v for v in pytree.tree_leaves(node.args[0]) if isinstance(v, fx.Node) and v.meta["spec"].dtype.startswith("float")]
    return [oracle.selected(group, case.dims.axes(v), t) for v, t in zip(values, outputs, strict=True)]


def error(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    assert [t.shape for t in a] == [t.shape for t in b], ([t.shape for t in a], [t.shape for t in b])
    return max(float((x - y).abs().max()) if x.numel() else 0.0 for x, y in zip(a, b, strict=True))


def check(case: Case, group: Group, *, oracle: Any = masked) -> float:
    """Largest difference between the cut graph and the oracle."""
    assert not group.refusal, group.refusal
    with torch.no_grad():
        got = floats(cut(case, group)(*case.inputs))
    return error(got, select_outputs(case, group, oracle(case, group)))


__all__ = ["Case", "Keep", "check", "cut", "error", "masked", "trace", "zeroed"]
