"""The layers of a stack as a chain in the root graph: finding it, and writing another chain in its place.

A layer is called once, its input is what the layer in front of it gives, and everything else that it takes is computed without the layers:
masks, rotary tables, its own entries of the cache. Where the graph is otherwise the chain is refused; nothing is guessed.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from surgery.core.diagnostics import fail
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model.program import Program
from surgery.passes.kinds import attach
from surgery.passes.kinds.drop_extract import is_layer
from surgery.passes.kinds.drop_graph import given, layer_cuts, outputs_of
from surgery.passes.kinds.drop_signature import leaves

Tree = dict[str, Any]


@dataclass(frozen=True)
class Link:
    """One layer of a chain: its site, its call in the root, which of its placeholders takes the hidden state and which of its results gives
    it (None: the only one), the placeholders that take a part of the layer's cache, and the results that go into one."""

    site: Site
    call: fx.Node
    hidden: str
    result: int | None
    cache_in: dict[str, int]
    cache_out: dict[int, int]
    shared: dict[str, fx.Node]


class Chain:
    """The layers of one stack of a program, in order. Raises S0799 where they are no chain."""

    def __init__(self, program: Program, stack: str, span: Span, name: str) -> None:
        self.program, self.stack, self.span, self.name = program, stack, span, name
        self.sites = sorted((s for s in program.anatomy.sites if is_layer(s) and s.stack == stack), key=lambda s: s.layer or 0)
        self.container = next(s.path for s in program.anatomy.stacks if s.name == stack)
        graph = program.graph.graph
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.holders = [n for n in graph.nodes if n.op == "placeholder"]
        self.inputs = leaves(program.signature.in_spec)
        self.outputs = leaves(program.signature.out_spec)
        self.keys: dict[fx.Node, str] = {}
        calls = {c.node for s in self.sites for c in layer_cuts(program, s, span) if c.graph == ""}
        self.behind = _behind(graph, calls)
        self.links = [self._link(i, s) for i, s in enumerate(self.sites)]
        self.begin = self._hidden_of(0)
        for i in range(1, len(self.links)):
            if self._hidden_of(i) not in self.ends(i - 1):
                raise self._refuse(self.sites[i], f"its input is not what {self.sites[i - 1].role} gives")
        for i, link in enumerate(self.links):
            self._only_chained(i, link)

    def _refuse(self, site: Site, why: str) -> Exception:
        return fail(
            "S0799", f"{site.role} of {self.name} cannot be stacked: {why}", self.span, "stacked here",
            help="stack layers that pass one hidden state from each to the next",
        )  # fmt: skip

    # ------------------------------------------------------------ finding

    def _link(self, at: int, site: Site) -> Link:
        if site.path != f"{self.container}.{at}":
            raise self._refuse(site, f"it is no element `{at}` of a list of layers")
        cuts = layer_cuts(self.program, site, self.span)
        if len(cuts) != 1 or cuts[0].graph:
            raise self._refuse(site, "the model runs it several times" if len(cuts) > 1 else "the root graph does not call it")
        cut = cuts[0]
        module = attach.parent_module(self.program, site.path)
        if not isinstance(module, fx.GraphModule) or site.input is None or cut.node.op != "call_module":
            raise self._refuse(site, "it is no module of its own")
        names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
        args = given(cut.node, names)
        cache: dict[str, int] = {}
        shared: dict[str, fx.Node] = {}
        for name, value in args.items():
            if name == site.input.node:
                continue
            if not isinstance(value, fx.Node):
                raise self._refuse(site, f"its argument `{name}` is a constant")
            leaf = self.inputs[self.holders.index(value)] if value in self.holders else None
            if leaf is not None and leaf.kind == "cache":
                if leaf.slot != at:
                    raise self._refuse(site, f"it reads the cache of layer {leaf.slot}")
                cache[name] = leaf.part
            elif value in self.behind:
                raise self._refuse(site, f"its argument `{name}` is computed by another layer")
            else:
                shared[name] = value
        return Link(site, cut.node, site.input.node, cut.index, cache, self._caches(at, cut.node), shared)

    def _caches(self, at: int, call: fx.Node) -> dict[int, int]:
        """Result of the layer to the part of the cache that it is."""
        found: dict[int, int] = {}
        for i, value in enumerate(outputs_of(self.program.graph)):
            if self.outputs[i].kind == "item":
                raise self._refuse(self.sites[at], "the model gives a value of each layer back")
            if self.outputs[i].kind == "cache" and isinstance(value, fx.Node):
                maker = value.args[0] if value.target is operator.getitem else value
                if maker is call:
                    if self.outputs[i].slot != at:
                        raise self._refuse(self.sites[at], f"it writes the cache of layer {self.outputs[i].slot}")
                    found[int(value.args[1]) if value is not maker else -1] = self.outputs[i].part  # type: ignore[arg-type]
        return found

    def _hidden_of(self, i: int) -> fx.Node:
        link = self.links[i]
        module = self.program.module(link.site.path)
        value = given(link.call, [n.name for n in module.graph.nodes if n.op == "placeholder"])[link.hidden]
        assert isinstance(value, fx.Node)
        return value

    def ends(self, i: int) -> list[fx.Node]:
        """The nodes that are the hidden state behind layer ``i``."""
        link = self.links[i]
        if link.result is None:
            return [link.call]
        return [u for u in link.call.users if u.target is operator.getitem and u.args[1] == link.result]

    def _only_chained(self, i: int, link: Link) -> None:
        """Everything that a layer gives goes to the next one, into the cache, or (of the last) to what is behind the layers."""
        end = self.program.graph.graph.output_node()
        last = i == len(self.links) - 1
        for user in [link.call] if link.result is None else list(link.call.users):
            index = None if user is link.call else user.args[1]
            readers = set(user.users)
            if index == link.result:
                others = readers - ({self.links[i + 1].call} if not last else readers)
                what = "its hidden state"
            else:
                others = readers - ({end} if index in link.cache_out else set())
                what = "something else that it computes"
            if others:
                raise self._refuse(link.site, f"{sorted(n.name for n in others)[0]} reads {what}")

    # ------------------------------------------------------------ equal values of two programs

    def key(self, node: fx.Node) -> str:
        """What a value in front of the layers is, whatever the program calls its nodes: equal keys are equal computations."""
        for n in _upwards(node, self.keys):
            parts: list[Any] = [n.op, str(n.target)]
            if n.op not in ("placeholder", "get_attr"):
                parts += [_plain(n.args, self.keys), _plain(n.kwargs, self.keys)]
            self.keys[n] = hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()
        return self.keys[node]

    # ------------------------------------------------------------ writing

    def rewrite(self, plan: Sequence[tuple[Chain, int]]) -> None:
        """Put calls of ``container.0`` to ``container.N-1`` in the place of the chain; ``plan[i]`` is the chain and the number of the layer
        whose arguments call ``i`` takes. The modules are the caller's work. Raises S0799 before anything changes."""
        graph = self.program.graph.graph
        known: dict[str, fx.Node] = {}
        for link in self.links:
            known |= {self.key(n): n for n in link.shared.values()}
        for chain, j in plan:
            self._fits(chain, chain.links[j], known)
        first = self.links[0].call
        for node in list(graph.nodes):
            if node not in self.behind and node.op not in ("placeholder", "output") and self.order[node] > self.order[first]:
                first.prepend(node)
        slots = {(leaf.part, leaf.slot): n for n, leaf in zip(self.holders, self.inputs, strict=True) if leaf.kind == "cache"}
        slots = self._placeholders(plan, slots)
        hidden = self.begin
        made: dict[tuple[int, int], fx.Node] = {}
        names = _FreeNames(graph)
        anchor = min((u for n in self.ends(len(self.links) - 1) for u in n.users), key=lambda n: self.order.get(n, 1 << 60))
        for i, (chain, j) in enumerate(plan):
            link = chain.links[j]
            module = chain.program.module(link.site.path)
            values = []
            for p in (n for n in module.graph.nodes if n.op == "placeholder"):
                if p.name == link.hidden:
                    values.append(hidden)
                elif p.name in link.cache_in:
                    values.append(slots[link.cache_in[p.name], i])
                elif p.name in link.shared:
                    values.append(known[chain.key(link.shared[p.name])])
            with graph.inserting_before(anchor):
                call = graph.create_node("call_module", f"{self.container}.{i}", tuple(values), name=names(f"{self.container}_{i}"))
                call.meta["spec"] = link.call.meta["spec"]
                hidden = call
                if link.result is not None:
                    hidden = self._item(graph, call, link.result, names)
                    for index, part in link.cache_out.items():
                        made[part, i] = self._item(graph, call, index, names)
        for end in self.ends(len(self.links) - 1):
            end.replace_all_uses_with(hidden)
        self._outputs(plan, made)
        for link in reversed(self.links):
            for user in list(link.call.users):
                graph.erase_node(user)
            graph.erase_node(link.call)
        attach.recompile_later(self.program.graph)

    def _fits(self, chain: Chain, link: Link, known: dict[str, fx.Node]) -> None:
        mine = self.links[0].call.meta["spec"]
        for (what, a), (_, b) in zip(self._ends_of(self.links[0], mine), chain._ends_of(link, link.call.meta["spec"]), strict=True):
            if a != b:
                raise chain._refuse(link.site, f"it {what} {_shape(b)}, the layers here {_shape(a)}")
        for name, node in link.shared.items():
            if chain.key(node) not in known:
                raise chain._refuse(link.site, f"its argument `{name}` is computed in another way than for any layer here")
        if sorted(link.cache_in.values()) != sorted(self.links[0].cache_in.values()):
            raise chain._refuse(link.site, "it has another cache than the layers here")

    def _ends_of(self, link: Link, spec: Any) -> list[tuple[str, Any]]:
        at = self.links.index(link)
        after = spec if link.result is None else spec[link.result]
        return [("takes", self._hidden_of(at).meta["spec"]), ("gives", after)]

    def _item(self, graph: fx.Graph, call: fx.Node, index: int, names: _FreeNames) -> fx.Node:
        node = graph.create_node("call_function", operator.getitem, (call, index), name=names("getitem"))
        node.meta["spec"] = call.meta["spec"][index]
        return node

    def _placeholders(self, plan: Sequence[tuple[Chain, int]], slots: dict[tuple[int, int], fx.Node]) -> dict[tuple[int, int], fx.Node]:
        """Cache inputs for every layer of the result, in the order of the signature; those of layers that are no more go."""
        if not slots:
            return {}
        graph = self.program.graph.graph
        parts = sorted({part for part, _ in slots})
        out: dict[tuple[int, int], fx.Node] = {}
        for part in parts:
            before = slots[part, len(self.links) - 1]
            for i in range(len(plan)):
                if (part, i) in slots:
                    out[part, i] = slots[part, i]
                    continue
                name = re.sub(r"\d+$", str(i), slots[part, 0].name)
                with graph.inserting_after(before):
                    node = graph.create_node("placeholder", name, name=name)
                out[part, i] = before = node
        own = {n: leaf for n, leaf in zip(self.holders, self.inputs, strict=True)}
        for part in parts:
            for i, (chain, j) in enumerate(plan):
                at = next(k for k, leaf in enumerate(chain.inputs) if leaf.kind == "cache" and (leaf.part, leaf.slot) == (part, j))
                out[part, i].meta["spec"] = chain.holders[at].meta["spec"]
        for node, leaf in own.items():
            if leaf.kind == "cache" and leaf.slot >= len(plan):
                node.replace_all_uses_with(out[leaf.part, 0])  # only sizes are read of it, which all layers share
        self.program.signature = replace(
            self.program.signature, in_spec=_deeper(self.program.signature.in_spec, len(self.links), len(plan)),
            symbols={k: (_held(out, own, n), axis, size) for k, (n, axis, size) in self.program.signature.symbols.items()},
        )  # fmt: skip
        for node, leaf in own.items():
            if leaf.kind == "cache" and leaf.slot >= len(plan):
                graph.erase_node(node)
        return out

    def _outputs(self, plan: Sequence[tuple[Chain, int]], made: dict[tuple[int, int], fx.Node]) -> None:
        end = self.program.graph.graph.output_node()
        values = outputs_of(self.program.graph)
        if not isinstance(end.args[0], tuple | list):
            return
        out: list[Any] = []
        for value, leaf in zip(values, self.outputs, strict=True):
            if leaf.kind != "cache":
                out.append(value)
            elif leaf.slot == 0:
                out += [made[leaf.part, i] for i in range(len(plan))]
        end.args = (tuple(out),)
        if "spec" in end.meta:
            end.meta["spec"] = tuple(n.meta["spec"] if isinstance(n, fx.Node) else None for n in out)
        self.program.signature = replace(
            self.program.signature, out_spec=_deeper(self.program.signature.out_spec, len(self.links), len(plan))
        )


class _FreeNames:
    """Names for new nodes that no node has."""

    def __init__(self, graph: fx.Graph) -> None:
        self.taken = {n.name for n in graph.nodes}

    def __call__(self, wanted: str) -> str:
        base = re.sub(r"\W", "_", wanted)
        name, count = base, 0
        while name in self.taken:
            count += 1
            name = f"{base}_{count}"
        self.taken.add(name)
        return name


def _behind(graph: fx.Graph, calls: set[fx.Node]) -> set[fx.Node]:
    """Everything that is computed from a layer, the layers included."""
    found = set(calls)
    for node in graph.nodes:
        if any(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _upwards(node: fx.Node, done: dict[fx.Node, str]) -> list[fx.Node]:
    """The value and what it is made of that has no key yet, inputs first."""
    out: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [(node, False)]
    while stack:
        top, ready = stack.pop()
        if top in done or (top in seen and not ready):
            continue
        if ready:
            out.append(top)
        else:
            seen.add(top)
            stack.append((top, True))
            stack += [(n, False) for n in top.all_input_nodes]
    return out


def _plain(value: Any, keys: dict[fx.Node, str]) -> Any:
    if isinstance(value, fx.Node):
        return {"node": keys[value]}
    if isinstance(value, tuple | list):
        return [_plain(v, keys) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v, keys) for k, v in value.items()}
    if isinstance(value, slice):
        return {"slice": [_plain(v, keys) for v in (value.start, value.stop, value.step)]}
    return str(value)


def _deeper(tree: Tree, before: int, after: int) -> Tree:
    """The tree with caches of ``after`` layers for those of ``before``."""
    if tree["type"] == "cache":
        return {**tree, "layers": after} if tree["layers"] == before else tree
    if "items" in tree:
        return {**tree, "items": [_deeper(item, before, after) for item in tree["items"]]}
    return tree


def _held(out: dict[tuple[int, int], fx.Node], own: dict[fx.Node, Any], name: str) -> str:
    """The input that gives a symbol its value: another layer's cache where its own is gone."""
    gone = next((leaf for n, leaf in own.items() if str(n.target) == name and leaf.kind == "cache"), None)
    if gone is None or (gone.part, gone.slot) in out:
        return name
    return str(out[gone.part, 0].target)


def _shape(spec: Any) -> str:
    shape = getattr(spec, "shape", None)
    return "[" + ", ".join(str(n) for n in shape) + "]" if shape is not None else "several values"
