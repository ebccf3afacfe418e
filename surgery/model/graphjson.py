"""The program's graph tree as JSON, and back, byte for byte.

The data is a table of distinct module descriptions: a graph (``nodes``), a leaf (``tag`` and ``config``) or a scope that only
holds others; each names its children by index into the table, and children come before parents. Eighty equal layers are one
description. Specs of values are a table too. A node is ``[name, op, target, args, kwargs, spec, scope?]``.

Loading does not trust the data. ``fx`` turns a graph into Python text and executes it, so everything that reaches that text is
checked first: names of nodes and placeholders are identifiers that fx would have given itself; targets of functions are looked
up in an allow-list of single operations and targets of modules and attributes are paths of plain words that must lead through
registered sub-modules to a parameter, buffer or callable module (never to a Python attribute); keyword names are identifiers;
arguments are numbers, node references, dtypes, devices, slices and strings, which fx writes with ``repr``. Placeholder defaults
and type annotations, which fx would paste in unquoted, cannot be expressed at all. Nothing is imported and nothing unpickled.
Everything else that is wrong with the data is S0826.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from surgery.core.diagnostics import SurgeryError, fail
from surgery.model import lazygraph, oplist
from surgery.model import modules as registry
from surgery.model.exprjson import load_expr, make_symbols
from surgery.model.graphnames import (
    FORMATS,
    KINDS,
    LAYOUTS,
    MAX_MODULES,
    MAX_NODES,
    OP_OF,
    SCHEMA,
    can_be_called,
    dtype_name,
    dtype_of,
    find_tensor,
    identifier,
    malformed,
    sizes,
    unknown_op,
    word,
)
from surgery.model.graphwrite import GraphWriter
from surgery.model.program import ValueSpec

__all__ = ["GraphReader", "dtype_name", "dtype_of", "dump", "load", "malformed", "read_with"]


def dump(root: fx.GraphModule) -> dict[str, Any]:
    """The JSON-able, deterministic data of a graph tree.

    Raises S0824 for an operation that is not on the list, S0825 for a module class that is not registered and S0830 for an
    argument or a size that has no stored form.
    """
    return GraphWriter().tree(root)


def load(data: Any, *, modules: registry.Resolver | None = None) -> fx.GraphModule:
    """The graph tree on the meta device, parameters not requiring gradients, in training mode as ``fx`` makes it.

    ``modules`` finds classes of tags that are not registered yet. Raises S0824 (operation not on the list), S0825 (module
    class unknown), S0827 (an operation's schema has changed in this torch) and S0826 for any other defect.
    """
    root = read_with(GraphReader, data, modules)
    assert isinstance(root, fx.GraphModule)
    return root


def read_with(reader: type[GraphReader], data: Any, modules: registry.Resolver | None = None) -> nn.Module:
    """The tree that a reader makes of the data; every defect of the data is a :class:`SurgeryError`."""
    try:
        return reader(data, modules).tree()
    except SurgeryError:
        raise
    except Exception as err:
        raise malformed(f"{type(err).__name__}: {str(err)[:120]}") from err


class GraphReader:
    """Builds the tree of one file; a subclass may choose what runs a graph."""

    def __init__(self, data: Any, resolver: registry.Resolver | None) -> None:
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            schema = data.get("schema") if isinstance(data, dict) else None
            raise malformed(f"its schema is {str(schema)[:60]!r}, this surgery reads {SCHEMA!r}")
        self.data = data
        self.resolver = resolver
        self.symbols = make_symbols(data["symbols"])
        self.specs: list[Any] = []
        for entry in data["specs"]:
            self.specs.append(self.spec(entry))
        self.check_schemas(data["ops"])
        self.check_size(data["modules"], data["root"])

    def check_schemas(self, recorded: dict[str, str]) -> None:
        for name, text in recorded.items():
            if name not in oplist.ATEN:
                raise unknown_op(name, "the graph")
            now = oplist.overload(name)._schema
            if str(now) != text and not _still_accepts(now, str(text)):
                raise fail(
                    "S0827", f"the operation {name} takes other arguments in torch {torch.__version__.split('+')[0]} than in the torch that wrote the artifact ({self.data.get('torch')})",
                    notes=(f"written with: {str(text)[:300]}", f"this torch:   {now}"), help="load it with the torch that wrote it, or emit it again from its spec",
                )  # fmt: skip

    def check_size(self, table: list[Any], root: int) -> None:
        """Children stand before parents, so nothing is circular; and the tree that the table unfolds to is of sane size."""
        counts: list[int] = []
        nodes: list[int] = []
        depth: list[int] = []
        for i, entry in enumerate(table):
            children = list(entry.get("children", {}).values())
            if any(type(c) is not int or not 0 <= c < i for c in children):
                raise malformed("a module stands before its children")
            counts.append(1 + sum(counts[c] for c in children))
            nodes.append(len(entry.get("nodes", ())) + sum(nodes[c] for c in children))
            depth.append(1 + max((depth[c] for c in children), default=0))
        if counts[root] > MAX_MODULES or nodes[root] > MAX_NODES or depth[root] > 64:
            raise malformed(f"it unfolds to {counts[root]} modules with {nodes[root]} nodes")

    def tree(self) -> nn.Module:
        if "nodes" not in self.data["modules"][self.data["root"]]:
            raise malformed("its root is not a graph")
        root = self.module(self.data["root"])
        for alias, first in self.data["aliases"]:
            self.tie(root, alias, first)
        return root

    def tie(self, root: nn.Module, alias: str, first: str) -> None:
        kind, holder, name = find_tensor(root, alias)
        kind_first, source, source_name = find_tensor(root, first)
        if not kind or kind != kind_first:
            raise malformed(f"{alias!r} cannot share {first!r}")
        getattr(holder, kind)[name] = getattr(source, kind)[source_name]

    def module(self, index: int) -> nn.Module:
        entry = self.data["modules"][index]
        if "nodes" in entry:
            made = self.holder()
        elif "tag" in entry:
            made = self.leaf(entry)
        else:
            made = nn.Module()
        self.add_tensors(made, entry)
        for name, child in entry.get("children", {}).items():
            made.add_module(word(name), self.module(child))
        if "nodes" in entry:
            self.fill(made, index, entry["nodes"])
        return made

    def holder(self) -> nn.Module:
        """An empty module that will run a graph."""
        return lazygraph.empty()

    def fill(self, holder: nn.Module, index: int, nodes: list[Any]) -> None:
        """Give the holder, whose children and tensors are in place, its graph."""
        holder.graph = self.graph(nodes, holder)  # type: ignore[assignment]

    def leaf(self, entry: dict[str, Any]) -> nn.Module:
        main = dtype_of(entry["dtype"]) if "dtype" in entry else None
        made = registry.build(entry["tag"], entry["config"], main, self.resolver)
        others = entry.get("dtypes", {})
        for holder in made.modules():
            prefix = "" if holder is made else next(n for n, m in made.named_modules() if m is holder) + "."
            for store in (holder._parameters, holder._buffers):
                for name, tensor in list(store.items()):
                    if tensor is None:
                        continue
                    want = others.get(prefix + name)
                    dtype = dtype_of(want) if want else main if main is not None and tensor.is_floating_point() else tensor.dtype
                    self.retype(store, name, tensor, dtype)
        return made

    @staticmethod
    def retype(store: dict[str, Any], name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        if isinstance(tensor, nn.Parameter):
            if tensor.dtype == dtype:
                tensor.requires_grad_(False)
            else:
                store[name] = nn.Parameter(torch.empty_like(tensor, dtype=dtype), requires_grad=False)
        elif tensor.dtype != dtype:
            store[name] = torch.empty_like(tensor, dtype=dtype)

    def add_tensors(self, module: nn.Module, entry: dict[str, Any]) -> None:
        for name, dtype, shape in entry.get("parameters", ()):
            tensor = torch.empty(sizes(shape), dtype=dtype_of(dtype), device="meta")
            module.register_parameter(word(name), nn.Parameter(tensor, requires_grad=False))
        for name, dtype, shape, persistent in entry.get("buffers", ()):
            module.register_buffer(word(name), torch.empty(sizes(shape), dtype=dtype_of(dtype), device="meta"), persistent=bool(persistent))

    def graph(self, nodes: list[Any], owner: nn.Module) -> fx.Graph:
        graph = fx.Graph()
        known: dict[str, fx.Node] = {}
        for name, short, target, args, kwargs, spec, *scope in nodes:
            op = OP_OF[short]
            identifier(name)
            found = self.target(op, target, owner)
            if op == "placeholder" and (args or kwargs):
                raise malformed(f"input {name} has a default")
            node = graph.create_node(
                op, found, tuple(self.arg(a, known) for a in args), {identifier(k): self.arg(v, known) for k, v in kwargs.items()}, name
            )  # fmt: skip
            if node.name != name or name in known:
                raise malformed(f"the node name {name!r} cannot be used")
            known[name] = node
            if spec is not None:
                node.meta["spec"] = self.specs[spec]
            if scope:
                node.meta["scope"] = str(scope[0])
        if not nodes or nodes[-1][1] != "out":
            raise malformed("a graph has no output")
        return graph

    def target(self, op: str, target: Any, owner: nn.Module) -> Any:
        if op == "call_function":
            if target in oplist.PYTHON:
                return oplist.PYTHON[target]
            if target not in oplist.ATEN:
                raise unknown_op(str(target), "the graph")
            if target not in self.data["ops"]:
                raise malformed(f"the schema of {target} is not recorded")
            return oplist.overload(target)
        if op == "placeholder":
            return identifier(target)
        if op == "get_attr" and not find_tensor(owner, target)[0]:
            raise malformed(f"{str(target)[:80]!r} is not a parameter or buffer")
        if op == "call_module" and not can_be_called(owner, target):
            raise malformed(f"{str(target)[:80]!r} is not a module that can be called")
        if op == "output" and target != "output":
            raise malformed("an output has a target")
        return target

    def arg(self, data: Any, known: dict[str, fx.Node]) -> Any:
        if data is None or isinstance(data, (bool, int, float, str)):
            return data
        if isinstance(data, list):
            return [self.arg(d, known) for d in data]
        ((tag, value),) = data.items()
        if tag == "n":
            return known[value]
        if tag == "t":
            return tuple(self.arg(d, known) for d in value)
        if tag == "dtype":
            return dtype_of(value)
        if tag == "device":
            return torch.device(str(value))
        if tag == "slice":
            return slice(*(self.arg(d, known) for d in value))
        if tag == "float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[value]
        if tag == "format":
            return FORMATS[value]
        if tag == "layout":
            return LAYOUTS[value]
        if tag == "d":
            return {str(k): self.arg(v, known) for k, v in value}
        raise malformed(f"unknown argument tag {tag[:40]!r}")

    def spec(self, entry: Any) -> Any:
        if isinstance(entry, list):
            return tuple(None if i is None else self.specs[i] for i in entry)
        if entry["k"] not in KINDS or not isinstance(entry["d"], str):
            raise malformed(f"unknown kind of value {str(entry['k'])[:40]!r}")
        return ValueSpec(entry["k"], entry["d"], tuple(load_expr(s, self.symbols) for s in entry["s"]))


def _still_accepts(now: Any, text: str) -> bool:
    """Whether calls written against the recorded schema still mean the same."""
    try:
        return bool(now.is_backward_compatible_with(torch._C.parse_schema(text)))
    except RuntimeError:
        return False
