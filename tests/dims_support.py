"""For the tests of dimension classes: a plain export as a flat graph, a literal cut, and two oracles of what it must equal."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import export
from torch.utils import _pytree as pytree

from surgery.model.dims import Dims, Group, Keep, analyse
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
    with warnings.catch_warnings():
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


def cut(case: Case, group: Group) -> fx.GraphModule:
    """The graph without a group's units: tensors selected, constants patched, views made reshapes."""
    module = copy.deepcopy(case.module)
    nodes = {n.name: n for n in module.graph.nodes}
    further = {}
    for alias, name in case.aliases.items():
        further.setdefault(name, []).append(alias)
    for member in group.members:
        for name in (member.parameter, *further.get(member.parameter, ())):
            holder, tensor = resolve(module, name)
            if tensor is None:
                continue
            index = torch.cat([torch.arange(a, b) for a, b in member.kept]) if member.kept else torch.zeros(0, dtype=torch.long)
            kept = tensor.detach().index_select(member.axis, index).clone()
            leaf = name.rpartition(".")[2]
            if isinstance(tensor, nn.Parameter):
                setattr(holder, leaf, nn.Parameter(kept, requires_grad=False))
            else:
                setattr(holder, leaf, kept)
    for change in group.constants:
        patch(module.graph, nodes[change.node.name], change)
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target is aten.view.default:
            node.target = aten.reshape.default
    module.graph.lint()
    module.recompile()
    return module


def resolve(module: nn.Module, name: str) -> tuple[Any, Any]:
    holder: Any = module
    *path, leaf = name.split(".")
    for part in path:
        holder = getattr(holder, part, None)
        if holder is None:
            return None, None
    return holder, getattr(holder, leaf, None)


def patch(graph: fx.Graph, node: fx.Node, change: Any) -> None:
    kind, at, *deeper = change.path
    if change.kind == "split":
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        node.target, node.args, node.kwargs = aten.split_with_sizes.default, (node.args[0], change.value, dim), {}
        return
    if kind == "kwargs" and not deeper:
        node.kwargs = {**node.kwargs, at: changed(graph, node, node.kwargs.get(at), change)}
        return
    place: Any = list(node.args) if kind == "args" else dict(node.kwargs)
    if deeper:
        inner = list(place[at])
        inner[deeper[0]] = changed(graph, node, inner[deeper[0]], change)
        place[at] = inner
    else:
        place[at] = changed(graph, node, place[at], change)
    if kind == "args":
        node.args = tuple(place)
    else:
        node.kwargs = place


def changed(graph: fx.Graph, node: fx.Node, old: Any, change: Any) -> Any:
    if not isinstance(old, fx.Node):
        return change.value
    top, bottom = change.ratio
    with graph.inserting_before(node):
        import operator

        more = graph.call_function(operator.mul, (old, top))
        return graph.call_function(operator.floordiv, (more, bottom))


# ---------------------------------------------------------------- oracles


def zeroed(case: Case, group: Group) -> list[torch.Tensor]:
    """The original graph with the removed slices of every parameter set to zero."""
    module = copy.deepcopy(case.module)
    for member in group.members:
        _, tensor = resolve(module, member.parameter)
        if tensor is not None and tensor.is_floating_point():
            with torch.no_grad():
                for a, b in member.removed:
                    tensor.narrow(member.axis, a, b - a).zero_()
    with torch.no_grad():
        return floats(module(*case.inputs))


class Masked(fx.Interpreter):
    """The original graph with every value masked by its axes; normalisers count and see only units that stay."""

    def __init__(self, case: Case, group: Group) -> None:
        super().__init__(copy.deepcopy(case.module))
        self.here = {n.name: n for n in case.module.graph.nodes}
        self.dims, self.group = case.dims, group
        self.primes = {int(v): k for k, v in case.dims._cx.sizes.symbols.items()}

    def masks(self, node: fx.Node, value: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        axes = self.dims.axes(self.here[node.name])
        out = []
        for i, axis in enumerate(axes or ()):
            if self.dims.size(axis) == value.shape[i] and value.shape[i] > 1:
                mask = self.group.keep.mask(axis)
                if mask is not None:
                    out.append((i, torch.from_numpy(mask)))
            elif value.shape[i] > 1:
                out += self.symbolic(i, axis, value)
        return out

    def symbolic(self, i: int, axis: Any, value: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """A product of symbolic and stored factors: the stored ones stand behind (or in front) of one run-time size."""
        from surgery.model.dims.algebra import factors

        mask, known, at = torch.ones(1, dtype=torch.bool), 1, None
        parts = factors(axis)
        for part in parts:
            if part.size < 10007:
                known *= part.size
        for j, part in enumerate(parts):
            if part.size >= 10007:
                size = value.shape[i] // known if at is None else 1
                at = j
                mine = torch.ones(size, dtype=torch.bool)
            else:
                got = self.group.keep.mask(part)
                mine = torch.ones(part.size, dtype=torch.bool) if got is None else torch.from_numpy(got)
            mask = (mask[:, None] & mine[None, :]).reshape(-1)
        return [] if bool(mask.all()) or mask.numel() != value.shape[i] else [(i, mask)]

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "call_function":
            special = self.special(n)
            value = super().run_node(n) if special is None else special
        else:
            value = super().run_node(n)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and n.op != "output":
            for i, mask in self.masks(n, value):
                shape = [1] * value.dim()
                shape[i] = -1
                value = torch.where(mask.view(shape), value, torch.zeros((), dtype=value.dtype))
        return value

    def special(self, n: fx.Node) -> torch.Tensor | None:
        name = str(n.target)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        source = n.args[0] if n.args else None
        if not isinstance(source, fx.Node) or not isinstance(args[0], torch.Tensor):
            return None
        masks = dict(self.masks(source, args[0]))
        if name.startswith("aten.layer_norm") or name.startswith("aten.rms_norm"):
            last = args[0].dim() - 1
            if last not in masks:
                return None
            keep, x = masks[last], args[0]
            some = x[..., keep]
            rest = [p[keep] if isinstance(p, torch.Tensor) else p for p in args[2:]]
            out = torch.zeros_like(x)
            out[..., keep] = n.target(some, [int(keep.sum())], *rest, **kwargs)
            return out
        if name.startswith("aten.group_norm") and 1 in masks:
            x, keep = args[0], masks[1]
            groups = int(keep.view(args[1], -1).any(1).sum())
            rest = [p[keep] if isinstance(p, torch.Tensor) else p for p in args[2:]]
            out = torch.zeros_like(x)
            out[:, keep] = n.target(x[:, keep], groups, *rest, **kwargs)
            return out
        if name.startswith("aten.mean.dim"):
            axes = [d % args[0].dim() for d in args[1]]
            ratio = math.prod(args[0].shape[d] / int(masks[d].sum()) for d in axes if d in masks)
            return n.target(*args, **kwargs) * ratio
        if "softmax" in name or "topk" in name:
            x = args[0]
            dim = args[1] if "softmax" in name else -1
            if dim % x.dim() in masks:
                shape = [1] * x.dim()
                shape[dim] = -1
                x = x.masked_fill(~masks[dim % x.dim()].view(shape), -torch.inf)
                return n.target(x, *args[1:], **kwargs)
        return None


def masked(case: Case, group: Group) -> list[torch.Tensor]:
    with torch.no_grad():
        return floats(Masked(case, group).run(*case.inputs))


def select_outputs(case: Case, group: Group, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The oracle's outputs with the axes that the cut made smaller selected."""
    node = next(n for n in case.module.graph.nodes if n.op == "output")
    out = []
    values = [v for v in pytree.tree_leaves(node.args[0]) if isinstance(v, fx.Node) and v.meta["spec"].dtype.startswith("float")]
    for value, tensor in zip(values, outputs, strict=True):
        for i, axis in enumerate(case.dims.axes(value)):
            if case.dims.size(axis) == tensor.shape[i]:
                mask = group.keep.mask(axis)
                if mask is not None:
                    tensor = tensor.index_select(i, torch.from_numpy(mask).nonzero().flatten())
        out.append(tensor)
    return out


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
