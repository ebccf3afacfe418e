"""One flat functional graph of a program's graph tree, for the analyses.

Nested GraphModules are inlined and parametric ``nn`` leaves become the aten operations that they run in evaluation, with
``get_attr`` nodes of the parameters' full names. Nothing is executed or copied: sizes come from ``node.meta["spec"]``.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx, nn

from surgery.core.diagnostics import fail
from surgery.core.site import NodeRef
from surgery.model.capture import leaves
from surgery.model.program import ValueSpec
from surgery.model.walk import edits, inside

aten = torch.ops.aten


@functools.cache
def dtype_name(dtype: torch.dtype) -> str:
    """Short name of a torch dtype: ``float32``."""
    return str(dtype).removeprefix("torch.")


_WORDS: dict[int, tuple[str, Any]] = {}
"""By the identity of the target, which stays because it is kept here: torch's operations are hashed in Python."""


def _word(target: Any) -> str:
    """What ``create_node`` calls a node of this target before it makes the name unique."""
    known = _WORDS.get(id(target))
    if known is None:
        known = _WORDS[id(target)] = fx.Graph()._target_to_str(target), target
    return known[0]


@functools.lru_cache(1 << 12)
def _parts(name: str) -> tuple[str, str, int, bool]:
    """(name without what no name has, its base, the number at its end or -1, whether Python has the name for itself)."""
    name = fx.graph._illegal_char_regex.sub("_", name)
    name = f"_{name}" if name[0].isdigit() else name
    match = fx.graph._name_regex.match(name)
    assert match is not None, name
    base, number = match.groups()
    return name, base, -1 if number is None else int(number), name in fx.graph._illegal_names


def _unique(namespace: Any, name: str) -> str:
    """``namespace.create_name`` for names that come again in every layer: each is taken apart once."""
    used, counts = namespace._used_names, namespace._base_count
    name, base, number, reserved = _parts(name)
    if number < 0 or name in used:
        number = counts.get(base, 0)
        if reserved:
            number += 1
            name = f"{base}_{number}"
    while name in used:
        number += 1
        name = f"{base}_{number}"
    used.add(name)
    counts[base] = number
    return name


class Flattener:
    """The state of one :func:`flatten` run, and what expansions build nodes with.

    A module of surgery's own may offer ``expand_flat(flattener, args, kwargs, spec) -> value`` that builds what it computes in evaluation of
    aten operations with :meth:`call` and :meth:`attribute`; without it the call stays an opaque ``call_module``.
    """

    def __init__(self, root: fx.GraphModule, aliases: Mapping[str, str], bare: bool = False) -> None:
        self.bare = bare
        self.root = root
        self.aliases = aliases
        self.graph = fx.Graph()
        self.path = ""
        self.origin = NodeRef("", "")
        self._attributes: dict[str, fx.Node] = {}
        self.unread: list[fx.Node] = []
        """Arguments of modules that a bare graph leaves out."""
        self._apart: set[fx.Node] = set()

    def attribute(self, name: str, tensor: Any, *, absolute: bool = False) -> fx.Node:
        """The one ``get_attr`` node of a parameter or buffer; ``name`` is relative to the current module path."""
        full = name if absolute or not self.path else f"{self.path}.{name}"
        full = self.aliases.get(full, full)
        node = self._attributes.get(full)
        if node is None:
            node = self._attributes[full] = self.make("get_attr", full, (), {}, full.replace(".", "_"))
            spec = ValueSpec("tensor", dtype_name(tensor.dtype), tuple(tensor.shape))
            node.meta.update(
                spec=spec, parameter=type(tensor) is nn.Parameter or isinstance(tensor, nn.Parameter), refs=[], origin=self.origin
            )
        return node

    def call(self, target: Callable[..., Any], args: tuple[Any, ...], spec: Any, kwargs: Mapping[str, Any] | None = None) -> fx.Node:
        """A ``call_function`` node with its spec and the origin of the tree node being expanded."""
        node = self.make("call_function", target, args, kwargs or {})
        node.meta.update(spec=spec, origin=self.origin, refs=[], path=self.path)
        return node

    def make(self, op: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = "") -> fx.Node:
        """A node at the end, as ``create_node`` makes it, which takes three times as long: it searches all arguments for values of a
        trace, which are none here, and each name for what could be wrong with it."""
        graph = self.graph
        name = _unique(graph._graph_namespace, name or _word(target))
        node = fx.Node(graph, name, op, target, args, kwargs)  # type: ignore[arg-type]
        graph._insert(node)
        graph._find_nodes_lookup_table.insert(node)
        graph._len += 1
        return node

    # ---------------------------------------------------------------- tree walk

    def inline(self, module: fx.GraphModule, path: str, values: list[Any] | None) -> Any:
        """Copy one GraphModule's nodes; ``values`` are the outer values of its placeholders (None: make placeholders)."""
        env: dict[fx.Node, Any] = {}
        incoming = iter(values or ())
        result: Any = None
        for node in module.graph.nodes:
            ref = NodeRef(path, node.name)
            self.path, self.origin = path, ref
            if node.op == "placeholder":
                value = self._placeholder(node) if values is None else next(incoming)
            elif node.op == "output":
                result = fx.node.map_arg(node.args[0], env.__getitem__)
                continue
            elif node.op == "get_attr":
                value = self.attribute(str(node.target), _resolve(module, str(node.target), ref))
            elif node.op == "call_module":
                value = self._module(module, node, env)
            else:
                value = self._copy(node, env)
            env[node] = value
            if isinstance(value, fx.Node):
                value.meta["refs"].append(ref)
                if self.bare and not path:
                    self._note_apart(node, value)
        return result

    def _note_apart(self, node: fx.Node, value: fx.Node) -> None:
        """Marks what was computed for a module that a bare graph leaves out: it runs on what goes into that module in its place here, whose
        sequences have other lengths than those that its spec tells."""
        if node.op == "call_module" and node.args and node.meta.get("spec") != value.meta.get("spec"):
            self._apart.add(node)
        elif any(n in self._apart for n in node.all_input_nodes):
            self._apart.add(node)
            if value.meta["refs"] == [NodeRef("", node.name)]:  # its own, and no value that is passed on
                value.meta["apart"] = True

    def _placeholder(self, node: fx.Node) -> fx.Node:
        made = self.graph.create_node("placeholder", node.name, name=node.name)
        made.meta.update(spec=node.meta.get("spec"), origin=self.origin, refs=[])
        return made

    def _copy(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node.target is operator.getitem:
            source = env[node.args[0]] if isinstance(node.args[0], fx.Node) else node.args[0]
            if isinstance(source, (tuple, list)):
                return source[node.args[1]]  # type: ignore[index]
        args = fx.node.map_arg(node.args, env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, env.__getitem__) if node.kwargs else {}
        made = self.make(node.op, node.target, args, kwargs, node.name)
        made.meta.update(spec=node.meta.get("spec"), origin=self.origin, refs=[])
        return made

    def _module(self, owner: fx.GraphModule, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        module = inside(owner, str(node.target))
        outer, origin = self.path, self.origin
        full = str(node.target) if not outer else f"{outer}.{node.target}"
        args = fx.node.map_arg(node.args, env.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, env.__getitem__) if node.kwargs else {}
        if isinstance(module, fx.GraphModule):
            values = list(args)
            if kwargs:
                names = [n.target for n in module.graph.nodes if n.op == "placeholder"]
                values += [kwargs[name] for name in names[len(args) :]]
            value = self.inline(module, full, values)
        else:
            self.path = full
            value = self._leaf(module, full, args, kwargs, node.meta.get("spec"))
        self.path, self.origin = outer, origin
        return value

    def _leaf(self, module: nn.Module, full: str, args: tuple[Any, ...], kwargs: dict[str, Any], spec: Any) -> Any:
        if self.bare and (edited := edits(module)) is not None:
            self.unread += [a for i, a in enumerate(args) if i != edited and isinstance(a, fx.Node)]
            return args[edited]
        kind = type(module)
        if hasattr(kind, "expand_flat"):
            return module.expand_flat(self, args, kwargs, spec)  # type: ignore[operator]
        expansion = _EXPANSIONS.get(kind) or next((_EXPANSIONS[k] for k in kind.__mro__ if k in _EXPANSIONS), None)
        if expansion is not None:
            return expansion(self, module, args, kwargs, spec)
        made = self.make("call_module", full, args, kwargs)
        made.meta.update(spec=spec, origin=self.origin, refs=[], module=module)
        return made

    def sweep(self) -> None:
        """Take out what only such modules read: it is no part of the model itself."""
        while self.unread:
            node = self.unread.pop()
            if node.users or node.op in ("placeholder", "output", "get_attr") or node.graph is not self.graph or node._erased:
                continue
            self.unread += node.all_input_nodes
            self.graph.erase_node(node)

    def own(self, module: nn.Module, name: str) -> fx.Node | None:
        """``get_attr`` of a module's own parameter or buffer, None where it has none."""
        tensor = module._parameters.get(name)
        if tensor is None:
            tensor = getattr(module, name, None)
        return None if tensor is None else self.attribute(name, tensor)


def _resolve(module: nn.Module, target: str, ref: NodeRef) -> Any:
    holder: Any = module
    try:
        for part in target.split("."):
            holder = getattr(holder, part)
    except AttributeError as cause:
        raise fail("S0901", f"graph node {ref.graph}::{ref.node} reads `{target}`, which its module does not have", exit_code=2) from cause
    return holder


# ---------------------------------------------------------------- nn leaves


def _linear(f: Flattener, m: Any, args: Any, kwargs: Any, spec: Any) -> Any:
    return f.call(aten.linear.default, (args[0], f.own(m, "weight"), f.own(m, "bias")), spec)


def _embedding(f: Flattener, m: Any, args: Any, kwargs: Any, spec: Any) -> Any:
    padding = -1 if m.padding_idx is None else m.padding_idx
    return f.call(aten.embedding.default, (f.own(m, "weight"), args[0], padding), spec)


def _layer_norm(f: Flattener, m: Any, args: Any, kwargs: Any, spec: Any) -> Any:
    return f.call(aten.layer_norm.default, (args[0], list(m.normalized_shape), f.own(m, "weight"), f.own(m, "bias"), m.eps), spec)


def _rms_norm(f: Flattener, m: Any, args: Any, kwargs: Any, spec: Any) -> Any:
    return f.call(aten.rms_norm.default, (args[0], list(m.normalized_shape), f.own(m, "weight"), m.eps), spec)


def _group_norm(f: Flattener, m: Any, args: Any, kwargs: Any, spec: Any) -> Any:
    return f.call(aten.group_norm.default, (args[0], m.num_groups, f.own(m, "weight"), f.own(m, "bias"), m.eps), spec)


def _batch_norm(f: Flattener, m: Any, args: Any, kwargs: Any, spec: Any) -> Any:
    affine = (f.own(m, "weight"), f.own(m, "bias"))
    running = (f.own(m, "running_mean"), f.own(m, "running_var"))
    momentum = 0.1 if m.momentum is None else m.momentum
    return f.call(aten.batch_norm.default, (args[0], *affine, *running, m.running_mean is None, momentum, m.eps, False), spec)


def _conv(f: Flattener, m: Any, args: Any, kwargs: Any, spec: Any) -> Any:
    rank = m.weight.dim() - 2
    x = args[0]
    padding = m.padding
    if m.padding_mode != "zeros":
        amounts = list(m._reversed_padding_repeated_twice)
        x = f.call(aten.pad.default, (x, amounts, m.padding_mode), _padded(x.meta.get("spec"), amounts))
        padding = (0,) * rank
    packet = getattr(aten, f"conv{rank}d")
    op, padding = (packet.padding, padding) if isinstance(padding, str) else (packet.default, list(padding))
    tail = (list(m.stride), padding, list(m.dilation), m.groups)
    return f.call(op, (x, f.own(m, "weight"), f.own(m, "bias"), *tail), spec)


def _padded(spec: Any, amounts: list[int]) -> Any:
    """A spec whose last axes grow by pairs of amounts, the last axis first."""
    if spec is None:
        return None
    shape = list(spec.shape)
    for i in range(len(amounts) // 2):
        shape[-1 - i] = shape[-1 - i] + amounts[2 * i] + amounts[2 * i + 1]
    return ValueSpec(spec.kind, spec.dtype, tuple(shape))


def _conv_transpose(f: Flattener, m: Any, args: Any, kwargs: Any, spec: Any) -> Any:
    rank = m.weight.dim() - 2
    packet = aten.conv_transpose1d.default if rank == 1 else getattr(aten, f"conv_transpose{rank}d").input
    tail = (list(m.stride), list(m.padding), list(m.output_padding), m.groups, list(m.dilation))
    return f.call(packet, (args[0], f.own(m, "weight"), f.own(m, "bias"), *tail), spec)


def _identity(f: Flattener, m: Any, args: Any, kwargs: Any, spec: Any) -> Any:
    # a node of its own, so that "after the dropout" stays a place that a reference can name
    return f.call(aten.dropout.default, (args[0], float(getattr(m, "p", 0.0)), False), spec)


def _attention(f: Flattener, m: Any, args: Any, kwargs: Any, spec: Any) -> Any:
    q, k, v, *rest = args
    mask = rest[0] if rest else kwargs.get("mask")
    more = {"scale": m.scale, "enable_gqa": m.enable_gqa}
    more = {key: value for key, value in more.items() if value}
    return f.call(aten.scaled_dot_product_attention.default, (q, k, v, mask, 0.0, m.is_causal), spec, more)


_EXPANSIONS: dict[type, Callable[..., Any]] = {
    nn.Linear: _linear,
    nn.Embedding: _embedding,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _rms_norm,
    nn.GroupNorm: _group_norm,
    nn.modules.batchnorm._BatchNorm: _batch_norm,
    nn.modules.conv._ConvTransposeNd: _conv_transpose,
    nn.modules.conv._ConvNd: _conv,
    nn.modules.dropout._DropoutNd: _identity,
    nn.Identity: _identity,
    leaves.Attention: _attention,
    leaves.DropPath: _identity,
    leaves.Jitter: _identity,
}


# ---------------------------------------------------------------- public


def flatten(root: fx.GraphModule, aliases: Mapping[str, str] | None = None, *, bare: bool = False) -> fx.Graph:
    """The flat functional graph of a tree, in linear time.

    Every node has ``meta["spec"]`` (see :class:`ValueSpec`), ``meta["origin"]`` (the :class:`NodeRef` of the tree node it
    comes from), ``meta["path"]`` on what an ``nn`` leaf became (the leaf's path) and ``meta["refs"]``: the names of its value in every GraphModule that sees it, in execution order (its
    maker, the calls that return it, the placeholders that receive it). ``get_attr`` nodes carry full parameter names,
    one node a name; with ``aliases`` (further name -> first name) tied names become their first name. ``bare`` leaves out what
    methods attached (modules with ``edits``, the argument that they pass on changed): roles are those of the model itself.
    """
    flat = Flattener(root, aliases or {}, bare)
    result = flat.inline(root, "", None)
    node = flat.graph.output(result)
    flat.sweep()
    node.meta.update(spec=None, origin=flat.origin, refs=[])
    return flat.graph


def constants(graph: fx.Graph) -> dict[str, fx.Node]:
    """Name to node of every ``get_attr`` of a flat graph."""
    return {str(node.target): node for node in graph.nodes if node.op == "get_attr"}


def specs(value: Any) -> Iterable[Any]:
    """The specs of a value that is a node or a (nested) tuple of nodes."""
    if isinstance(value, fx.Node):
        yield value.meta.get("spec")
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from specs(item)


def substitute(size: Any, value: int, cache: dict[Any, int]) -> int:
    """A size expression with ``value`` for every symbol, floored to an integer of at least zero; constants stay."""
    if isinstance(size, int):
        return size
    known = cache.get(size)
    if known is None:
        known = max(0, int(size.subs({s: value for s in size.free_symbols})))
        cache[size] = known
    return known
