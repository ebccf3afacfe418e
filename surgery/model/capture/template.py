"""Cutting the flat list of nodes into one graph per layer plus the root's."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.model.capture.errors import Fallback
from surgery.model.capture.markers import ENTER, EXIT, STUB
from surgery.model.capture.normalise import Leaf
from surgery.model.capture.regions import Region
from surgery.model.program import ValueSpec


@dataclass
class Template:
    """A graph whose targets are relative to the module at whose path it will stand, and what those targets are."""

    path: str
    graph: fx.Graph
    leaves: dict[str, Leaf] = field(default_factory=dict)  # relative path -> leaf
    tensors: list[str] = field(default_factory=list)  # relative names that get_attr nodes read
    constants: dict[str, str] = field(default_factory=dict)  # relative name -> lifted constant
    layers: dict[str, Template] = field(default_factory=dict)  # path -> template (root only)
    outer: list[fx.Node] = field(default_factory=list)  # flat nodes of the parent, passed after the inputs
    inputs: list[int] = field(default_factory=list)  # which inputs of the region the graph takes
    outputs: list[int] = field(default_factory=list)  # which outputs of the region the graph returns
    forwards: dict[int, int] = field(default_factory=dict)  # region output -> region input that it is


def _relative(names: Iterable[str], path: str) -> str | None:
    """The name below ``path``, if the tensor has one."""
    for name in names:
        if not path:
            return name
        if name.startswith(f"{path}."):
            return name[len(path) + 1 :]
    return None


class Cutter:
    """Builds templates from a normalised flat graph.

    ``owners``: placeholder name -> full names of the parameter or buffer; ``lifted``: placeholder name -> lifted constant.
    """

    def __init__(self, graph: fx.Graph, regions: list[Region], owners: dict[str, list[str]], lifted: dict[str, str]) -> None:
        self.graph = graph
        self.regions = regions
        self.owners = owners
        self.lifted = lifted
        self.bodies: dict[int, Template] = {}

    def cut(self, names: list[str]) -> Template:
        """The root template; its placeholders are the flat inputs, called ``names``."""
        used = self._used_outputs()
        root = _Builder(self, "")
        stream = iter(names)
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name not in self.owners and node.name not in self.lifted:
                root.placeholder(next(stream), node)
        nodes = iter([n for n in self.graph.nodes if n.op not in ("placeholder", "output")])
        for node in nodes:
            if node.target is ENTER:
                body = list(self._until_exit(nodes, node))
                self._place(root, node, self._body(node, body, used), used)
            elif node.target is STUB:
                self._place(root, node, self.bodies[self.regions[node.args[1]].same_as], used)
            elif node not in root.mapping:
                root.copy(node)
        root.output(self.graph.output_node().args[0])
        return root.template

    @staticmethod
    def _until_exit(nodes: Iterator[fx.Node], enter: fx.Node) -> Iterator[fx.Node]:
        for node in nodes:
            yield node
            if node.target is EXIT:
                if node.args[1] != enter.args[1]:
                    raise Fallback("a layer's end does not match its start")
                return
        raise Fallback("a layer's end is missing")

    def _used_outputs(self) -> dict[int, set[int]]:
        """For each traced region the outputs that some call of its body has users for."""
        used: dict[int, set[int]] = {}
        for node in self.graph.nodes:
            if node.target in (EXIT, STUB):
                body = self.regions[node.args[1]].same_as
                used.setdefault(body, set()).update(int(u.args[1]) for u in node.users if u.users)
        return used

    def _body(self, enter: fx.Node, body: list[fx.Node], used: dict[int, set[int]]) -> Template:
        index = enter.args[1]
        assert isinstance(index, int)
        region = self.regions[index]
        exit_ = body[-1]
        builder = _Builder(self, region.path, shared=any(r.same_as == index and r.index != index for r in self.regions))
        template = builder.template
        entered = {int(n.args[1]): n for n in enter.users}  # type: ignore[arg-type]
        read = {n for n in body[:-1] if n in set(entered.values())}
        results = list(exit_.args[0])  # type: ignore[arg-type]
        positions = {node: i for i, node in entered.items()}
        kept = sorted(used.get(index, ()))
        for out in kept:
            if results[out] in positions:
                template.forwards[out] = positions[results[out]]
            else:
                template.outputs.append(out)
        wanted = [results[o] for o in template.outputs]
        for i, node in sorted(entered.items()):
            if any(u is not exit_ for u in node.users):
                template.inputs.append(i)
                builder.placeholder(region.inputs[i], node)
        builder.prepare(body[:-1])
        for node in body[:-1]:
            if node not in read:
                builder.copy(node)
        builder.output(wanted)
        self.bodies[index] = template
        return template

    def _place(self, root: _Builder, node: fx.Node, template: Template, used: dict[int, set[int]]) -> None:
        """The call of a layer in the root, and its results for everything after."""
        region = self.regions[node.args[1]]  # type: ignore[index]
        known = root.template.layers.setdefault(region.path, template)
        if known is not template and not _equal(known, template):
            raise Fallback(f"`{region.path}` is called in two different ways")
        flat_inputs = list(node.args[0])  # type: ignore[arg-type]
        args = [root.value(flat_inputs[i]) for i in template.inputs] + [root.value(n) for n in template.outer]
        source = self._exit_of(node)
        specs = [o.meta["spec"] for o in _results(template)]
        call = root.template.graph.call_module(region.path, tuple(args))
        call.meta["spec"] = specs[0] if len(specs) == 1 else tuple(specs)
        picked: dict[int, fx.Node] = {}
        if len(template.outputs) == 1:
            picked[template.outputs[0]] = call
        for user in source.users:
            out = int(user.args[1])  # type: ignore[arg-type]
            if not user.users:
                root.mapping[user] = call
            elif out in template.forwards:
                root.mapping[user] = root.value(flat_inputs[template.forwards[out]])
            else:
                if out not in picked:
                    place = template.outputs.index(out)
                    picked[out] = root.template.graph.call_function(operator.getitem, (call, place))
                    picked[out].meta["spec"] = specs[place]
                root.mapping[user] = picked[out]

    def _exit_of(self, node: fx.Node) -> fx.Node:
        if node.target is STUB:
            return node
        return next(n for n in self.graph.nodes if n.target is EXIT and n.args[1] == node.args[1])


def _results(template: Template) -> list[fx.Node]:
    out = template.graph.output_node().args[0]
    return list(out) if isinstance(out, (tuple, list)) else ([out] if isinstance(out, fx.Node) else [])


class _Builder:
    """Copies flat nodes into the graph of one template."""

    def __init__(self, cutter: Cutter, path: str, shared: bool = False) -> None:
        self.cutter = cutter
        self.path = path
        self.shared = shared
        self.template = Template(path, fx.Graph())
        self.mapping: dict[fx.Node, Any] = {}
        self._inside: set[fx.Node] = set()

    def placeholder(self, name: str, node: fx.Node) -> fx.Node:
        new = self.template.graph.placeholder(_identifier(name))
        new.target = new.name
        new.meta["spec"] = node.meta["spec"]
        self.mapping[node] = new
        return new

    def prepare(self, body: list[fx.Node]) -> None:
        """Placeholders for what the body reads from outside; sizes are taken from tensors it already has."""
        inside = set(body)
        for node in body:
            for source in self._sources(node):
                if source in inside or source in self.mapping or source.target is ENTER:
                    continue
                spec = source.meta.get("spec")
                if isinstance(spec, ValueSpec) and spec.kind != "tensor":
                    if not self._has_size(source, spec):
                        self.template.outer.append(source)
                        self.placeholder(source.name, source)
                    continue  # else computed where it is read
                if source.op == "placeholder" and self._named(source) is not None:
                    continue
                tensor_of_model = source.name in self.cutter.owners
                if self.shared and not tensor_of_model:
                    raise Fallback(f"`{self.path}` reads a value that it is not given")
                name = self.cutter.owners[source.name][0].rpartition(".")[2] if tensor_of_model else source.name
                self.template.outer.append(source)
                self.placeholder(name, source)

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        leaf = node.meta.get("leaf")
        if leaf is not None and _relative([leaf[0].path], self.path) is not None:
            return [a for a in leaf[1] if isinstance(a, fx.Node)]
        return node.all_input_nodes

    def _named(self, node: fx.Node) -> str | None:
        """The relative name under which this graph can read a tensor of the model itself."""
        if node.name in self.cutter.lifted:
            return self.cutter.lifted[node.name]
        return _relative(self.cutter.owners.get(node.name, ()), self.path)

    def value(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node in self.mapping:
            return self.mapping[node]
        if node.op == "placeholder":
            name = self._named(node)
            if name is None:
                raise Fallback(f"`{self.path}` reads `{node.name}` from outside")
            new = self.template.graph.get_attr(name)
            if node.name in self.cutter.lifted:
                self.template.constants[name] = name
            else:
                self.template.tensors.append(name)
            new.meta["spec"] = node.meta["spec"]
            self.mapping[node] = new
            return new
        spec = node.meta.get("spec")
        if isinstance(spec, ValueSpec) and spec.kind != "tensor":
            self.mapping[node] = self._size(node, spec)
            return self.mapping[node]
        raise Fallback(f"`{self.path}` reads `{node.name}` from outside")

    def _has_size(self, node: fx.Node, spec: ValueSpec) -> bool:
        """Whether :meth:`_size` can find the size within this graph."""
        if node in self.mapping or not getattr(spec.shape[0], "free_symbols", None):
            return True
        if any(
            p.meta["spec"].kind == "tensor" and spec.shape[0] in p.meta["spec"].shape
            for p in self.template.graph.find_nodes(op="placeholder")
        ):
            return True
        sources = node.all_input_nodes
        return bool(sources) and all(n.meta["spec"].kind != "tensor" and self._has_size(n, n.meta["spec"]) for n in sources)

    def _size(self, node: fx.Node, spec: ValueSpec) -> Any:
        """A size from outside, read off an input that has it, else computed again from such sizes."""
        wanted = spec.shape[0]
        if not hasattr(wanted, "free_symbols") or not wanted.free_symbols:
            return wanted
        for place in self.template.graph.find_nodes(op="placeholder"):
            have = place.meta["spec"]
            if have.kind == "tensor" and wanted in have.shape:
                new = self.template.graph.call_function(torch.ops.aten.sym_size.int, (place, have.shape.index(wanted)))
                new.meta["spec"] = spec
                return new
        if not node.all_input_nodes or any(n.meta["spec"].kind == "tensor" for n in node.all_input_nodes):
            raise Fallback(f"`{self.path}` reads the size {wanted} that none of its inputs has")
        new = self.template.graph.node_copy(node, self.value)
        new.meta = {"spec": spec}
        return new

    def copy(self, node: fx.Node) -> None:
        leaf: tuple[Leaf, tuple[Any, ...]] | None = node.meta.get("leaf")
        target = None if leaf is None else _relative([leaf[0].path], self.path)
        if leaf is not None and target is not None:
            known = self.template.leaves.setdefault(target, leaf[0])
            if known != leaf[0]:
                raise Fallback(f"`{leaf[0].path}` is called with different settings")
            new = self.template.graph.call_module(target, fx.map_arg(leaf[1], self.value))
        else:  # also a leaf that stands outside this layer: the operation itself, reading the tensors it is given
            if leaf is not None and not leaf[0].tensors and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise Fallback(f"`{self.path}` runs `{leaf[0].path}`, which draws numbers, from outside")
            args, kwargs = fx.map_arg(node.args, self.value), fx.map_arg(node.kwargs, self.value)
            new = self.template.graph.create_node(node.op, node.target, args, kwargs)
        new.meta["spec"] = node.meta.get("spec", ValueSpec("other"))
        scope = node.meta.get("scope")
        if scope:
            new.meta["scope"] = scope
        self.mapping[node] = new

    def output(self, values: Any) -> None:
        """One flat tuple for the root; a layer with a single result returns that itself."""
        mapped = [self.value(v) for v in values]
        result = mapped[0] if self.path and len(mapped) == 1 else tuple(mapped)
        node = self.template.graph.output(result)
        node.meta["spec"] = tuple(v.meta["spec"] if isinstance(v, fx.Node) else ValueSpec("other") for v in mapped)


def _identifier(name: str) -> str:
    clean = "".join(c if c.isalnum() or c == "_" else "_" for c in name)
    return clean if clean and not clean[0].isdigit() else f"x_{clean}"


def _equal(a: Template, b: Template) -> bool:
    """Whether two calls of one module traced to the same graph."""
    if (a.inputs, a.outputs, a.forwards, a.leaves, a.tensors, a.constants) != (
        b.inputs,
        b.outputs,
        b.forwards,
        b.leaves,
        b.tensors,
        b.constants,
    ):
        return False
    return str(a.graph) == str(b.graph) and [n.target for n in a.graph.nodes] == [n.target for n in b.graph.nodes]
