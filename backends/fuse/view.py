"""How rules see a flat graph and change it: values with types, tensors with names, new nodes that know their types."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_aggregate

from surgery.backends.fuse.rule import Target
from surgery.model.program import Program

aten = torch.ops.aten


class FuseView:
    """A flat graph with what rules ask of it.

    ``graph`` is the module (``graph.graph`` its nodes), ``program`` what it was made from, ``target`` what it is for. Rules read through
    :meth:`fake`, :meth:`tensor`, :meth:`name`, :meth:`site` and :meth:`where`, and write with :meth:`call`, :meth:`parameter` and
    :meth:`replace` inside :meth:`before` or :meth:`after`.
    """

    def __init__(self, graph: fx.GraphModule, program: Program, target: Target) -> None:
        self.graph = graph
        self.program = program
        self.target = target
        self.made: dict[tuple[str, ...], str] = {}
        """Names of tensors that were put together, by the names of their parts: a layer that is used twice is packed once."""
        self._once: dict[Any, fx.Node] = {}

    # ---------------------------------------------------------------- reading

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes in order, as a list of its own."""
        return list(self.graph.graph.nodes)

    def calls(self, *targets: Any) -> list[fx.Node]:
        """The calls of these operations, in order."""
        return [n for n in self.graph.graph.nodes if n.op == "call_function" and n.target in targets]

    def fake(self, node: Any) -> Any:
        """The value of a node as the tracer knows it: a fake tensor, a symbolic number, a tuple of them; other things are their own value."""
        if not isinstance(node, fx.Node):
            return node
        if node.op == "get_attr" and not isinstance(node.meta.get("val"), FakeTensor):
            node.meta["val"] = self.mode.from_tensor(self.attribute(str(node.target)), static_shapes=True)
        return node.meta.get("val")

    def shape(self, node: Any) -> tuple[Any, ...]:
        """The sizes of a tensor, symbols where they are open; empty for what is no tensor."""
        value = self.fake(node)
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def rank(self, node: Any) -> int:
        """The number of axes of a tensor, -1 for what is no tensor."""
        value = self.fake(node)
        return value.ndim if isinstance(value, Tensor) else -1

    def dtype(self, node: Any) -> torch.dtype | None:
        value = self.fake(node)
        return value.dtype if isinstance(value, Tensor) else None

    def same(self, a: Any, b: Any) -> bool:
        """Whether two sizes (or two tuples of sizes) are equal for every input."""
        if isinstance(a, (tuple, list)):
            return len(a) == len(b) and all(self.same(x, y) for x, y in zip(a, b, strict=True))
        if isinstance(a, int) and isinstance(b, int):
            return a == b
        return bool(statically_known_true(a == b))

    def name(self, node: Any) -> str:
        """The full name of the parameter or buffer that a ``get_attr`` node reads; "" for any other node."""
        return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else ""

    def attribute(self, name: str) -> Tensor:
        """The tensor of a full name."""
        value: Any = self.graph
        for part in name.split("."):
            value = getattr(value, part)
        return value  # type: ignore[no-any-return]

    def tensor(self, node: Any) -> Tensor | None:
        """The real values behind a ``get_attr`` node, None for any other. Do not change them in place."""
        name = self.name(node)
        return self.attribute(name).detach() if name else None

    def is_parameter(self, node: Any) -> bool:
        """Whether a node reads a trained tensor of the model, and not a constant or a buffer."""
        name = self.name(node)
        return bool(name) and isinstance(self.attribute(name), nn.Parameter)

    def is_live(self, node: Any) -> bool:
        """Whether a node reads a tensor that must stay apart under its name."""
        return self.name(node) in self.target.live

    def site(self, node: Any) -> str:
        """The role (``layers[3].attn.q``) of the tensor that a ``get_attr`` node reads; several roles of one fused tensor are joined by
        commas; "" where it has none."""
        return ", ".join(self._roles.get(self.name(node), ()))

    def where(self, node: fx.Node) -> str:
        """A place for people: the module path in which the node was traced, and its name."""
        stack = node.meta.get("nn_module_stack") or {}
        path = max((str(entry[0]) for entry in stack.values()), key=len, default="")
        return f"{path.removeprefix('self.')}::{node.name}" if path else node.name

    @cached_property
    def _roles(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for site in self.program.anatomy.sites:
            for name in (site.weight, site.bias):
                if name:
                    found.setdefault(name, []).append(site.role)
        return found

    @property
    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.graph.nodes if n.op == "placeholder"]

    @property
    def output(self) -> fx.Node:
        return next(n for n in reversed(self.graph.graph.nodes) if n.op == "output")

    @cached_property
    def mode(self) -> FakeTensorMode:
        """The fake mode that the graph's values belong to."""
        for node in self.graph.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        return FakeTensorMode()

    # ---------------------------------------------------------------- writing

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[FuseView]:
        """New nodes go in front of ``node``."""
        with self.graph.graph.inserting_before(node):
            yield self

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[FuseView]:
        """New nodes go behind ``node``, in the order in which they are made."""
        with self.graph.graph.inserting_before(node.next):
            yield self

    def call(self, target: Callable[..., Any], *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        """A new call; its value is computed on fake tensors. ``like`` is the node whose place in the model it takes."""
        node = self.graph.graph.call_function(target, args, kwargs)
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*self._values(args), **self._values(kwargs))
        if like is not None:
            node.meta.update({k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")})
        return node

    def _values(self, tree: Any) -> Any:
        return map_aggregate(tree, lambda n: self.fake(n) if isinstance(n, fx.Node) else n)

    def item(self, node: fx.Node, index: int, like: fx.Node | None = None) -> fx.Node:
        """One of several values of a node."""
        import operator

        return self.call(operator.getitem, node, index, like=like)

    def size(self, node: fx.Node, axis: int) -> Any:
        """A size to be given to an operation: a number, or a node that computes it."""
        size = self.shape(node)[axis]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, node, axis)

    def parameter(self, name: str, value: Tensor, like: fx.Node | None = None) -> fx.Node:
        """A new parameter under a full name (it gets a number when the name is taken) and the node that reads it."""
        parts = name.split(".")
        module: nn.Module = self.graph
        for part in parts[:-1]:
            below = getattr(module, part, None)
            if not isinstance(below, nn.Module):
                below = nn.Module()
                module.add_module(part, below)
            module = below
        leaf, number = parts[-1], 1
        while hasattr(module, leaf):
            number += 1
            leaf = f"{parts[-1]}_{number}"
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
        node = self.graph.graph.get_attr(".".join([*parts[:-1], leaf]))
        node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
        if like is not None and "nn_module_stack" in like.meta:
            node.meta["nn_module_stack"] = like.meta["nn_module_stack"]
        return node

    def packed(self, name: str, parts: Sequence[str], value: Callable[[], Tensor], like: fx.Node | None = None) -> fx.Node:
        """The node of a parameter that is put together from others; the same parts under the same name are one parameter."""
        key = (name, *parts)
        known = self.made.get(key)
        if known is not None and self._holds(known):
            node = self.graph.graph.get_attr(known)
            node.meta["val"] = self.mode.from_tensor(self.attribute(known), static_shapes=True)
            return node
        node = self.parameter(name, value(), like)
        self.made[key] = str(node.target)
        return node

    def _holds(self, name: str) -> bool:
        try:
            self.attribute(name)
        except AttributeError:
            return False
        return True

    def once(self, key: Any, make: Callable[[], fx.Node]) -> fx.Node:
        """The node that ``make`` made for this key before, while it is still in the graph, else a new one."""
        known = self._once.get(key)
        if known is None or known._erased or known.graph is not self.graph.graph:
            known = self._once[key] = make()
        return known

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Everything that read ``old`` reads ``new``; what only ``old`` needed goes."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.drop(old)

    def drop(self, *nodes: fx.Node) -> None:
        """Erases nodes that nobody reads, and then their arguments, as far as nobody reads those."""
        queue = list(nodes)
        while queue:
            node = queue.pop()
            if node.users or node.op in ("placeholder", "output") or node._erased:
                continue
            above: Sequence[fx.Node] = node.all_input_nodes
            self.graph.graph.erase_node(node)
            queue.extend(above)

    def tidy(self) -> None:
        """Nodes without users and tensors that no node reads any more are removed, and the code is written anew."""
        self.graph.graph.eliminate_dead_code()
        read = {str(n.target) for n in self.graph.graph.nodes if n.op == "get_attr"}
        for path, module in list(self.graph.named_modules()):
            prefix = path + "." if path else ""
            for table in (module._parameters, module._buffers):
                for leaf in [leaf for leaf in table if prefix + leaf not in read]:
                    del table[leaf]
        self.graph.recompile()
