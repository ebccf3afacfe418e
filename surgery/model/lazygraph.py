"""Graph trees that are copied fast, and whose code is made when they are first run.

``fx`` writes Python text for every graph that a module is given, and compiles it. Most programs are read, planned, copied and written, and never run
themselves, so that this was the larger part of opening and copying one. What runs and what comes out are the same.
"""

from __future__ import annotations

from collections import OrderedDict
from copy import deepcopy
from dataclasses import is_dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

T = TypeVar("T", bound=nn.Module)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, type, FunctionType, BuiltinFunctionType)


class LazyGraphModule(fx.GraphModule):
    """A GraphModule that compiles its graph, as it is then, when it is first called or asked for its code."""

    def recompile(self) -> Any:
        """From now on the code is that of the graph at the next call."""
        type(self).forward = _compile_and_run  # type: ignore[method-assign]  # every GraphModule has a class of its own

    def compile_now(self) -> Any:
        return super().recompile()

    @property
    def code(self) -> str:
        if type(self).forward is _compile_and_run:
            self.compile_now()
        return super().code

    def __reduce__(self) -> Any:
        eager = fx.GraphModule(self, self.graph)
        eager.__dict__.update({k: v for k, v in self.__dict__.items() if k not in ("_graph", "_code")})
        return eager.__reduce__()


def _compile_and_run(self: LazyGraphModule, *args: Any, **kwargs: Any) -> Any:
    self.compile_now()
    return type(self).forward(self, *args, **kwargs)


def empty() -> fx.GraphModule:
    """A module without anything in it, which is to be given a graph."""
    return LazyGraphModule(nn.Module(), fx.Graph())


def compile_tree(root: nn.Module) -> None:
    """Compiles every graph that was not, for whoever looks at the code and not only calls it."""
    for module in root.modules():
        if isinstance(module, LazyGraphModule) and type(module).forward is _compile_and_run:
            module.compile_now()


def copy_tree(root: T) -> T:
    """An independent tree: modules, tensors (tied ones stay one) and graphs are its own, specs and other immutable data are shared."""
    made = _copy(root, {})
    assert isinstance(made, fx.GraphModule) or not isinstance(root, fx.GraphModule)
    return cast(T, made)


def _copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    if id(module) in memo:
        found: nn.Module = memo[id(module)]
        return found
    graph = module.graph if isinstance(module, fx.GraphModule) else None
    made: nn.Module = empty() if graph is not None else object.__new__(type(module))
    memo[id(module)] = made
    state = module.__dict__
    own = made.__dict__
    for key, value in state.items():
        if key == "_modules":
            own[key] = {}
        elif key in ("_parameters", "_buffers"):
            own[key] = {name: _tensor(tensor, memo) for name, tensor in value.items()}
        elif not (graph is not None and key in ("_graph", "_code", "_lineno_map", "_prologue_start")):
            own[key] = _value(value, memo)
    for name, child in module._modules.items():
        made._modules[name] = None if child is None else _copy(child, memo)
    if graph is not None:
        made.graph = _copy_graph(graph)
    return made


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    """The same nodes under the same names. ``Graph.graph_copy`` does this, too, and looks through the arguments of every node for symbolic
    numbers to warn of, which takes longer than all the rest; a node that is copied has none that the first one had not."""
    copied = fx.Graph(tracer_cls=graph._tracer_cls)
    table: dict[fx.Node, fx.Node] = {}
    names = copied._graph_namespace
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), table.__getitem__)
        made = fx.Node(copied, names.create_name(node.name, None), node.op, node.target, args, kwargs, node.type)
        names.associate_name_with_obj(made.name, made)
        copied._insert(made)
        copied._find_nodes_lookup_table.insert(made)
        copied._len += 1
        made.meta = dict(node.meta)
        table[node] = made
    copied._codegen = deepcopy(graph._codegen)
    return copied


def _tensor(tensor: torch.Tensor | None, memo: dict[int, Any]) -> torch.Tensor | None:
    if tensor is None:
        return None
    if id(tensor) not in memo:
        memo[id(tensor)] = _meta(tensor) if tensor.is_meta and type(tensor) in (torch.Tensor, nn.Parameter) else deepcopy(tensor, memo)
    copied: torch.Tensor = memo[id(tensor)]
    return copied


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    made = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta"
    )  # torch's empty_like is ten times slower here
    return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _value(value: Any, memo: dict[int, Any]) -> Any:
    """Immutable data as it is, empty and plain containers one level deep, everything else as ``deepcopy`` copies it."""
    if _immutable(value):
        return value
    kind = type(value)
    if kind in (dict, OrderedDict) and all(_immutable(v) for v in value.values()):
        return kind(value)
    if kind in (list, set) and all(_immutable(v) for v in value):
        return kind(value)
    return deepcopy(value, memo)


def _immutable(value: Any) -> bool:
    if isinstance(value, _PLAIN):
        return True
    if type(value) is tuple or type(value) is frozenset:
        return all(_immutable(v) for v in value)
    return is_dataclass(value) and bool(getattr(type(value), "__dataclass_params__").frozen)  # noqa: B009
