"""Taking layers and branches out of a graph: what is bypassed, what nothing reads any more, what the call no longer takes or gives."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from surgery.core.diagnostics import fail
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model.program import Program
from surgery.passes.kinds import attach


@dataclass(frozen=True)
class Cut:
    """One bypass of a value: in graph ``graph`` the result ``index`` of ``node`` (None: the node itself) becomes ``instead``."""

    site: Site
    graph: str
    node: fx.Node
    index: int | None
    instead: fx.Node


@dataclass
class Taken:
    """What a rewrite took out, by what the erased nodes named: modules and tensors nobody names any more."""

    called: set[str] = field(default_factory=set)
    read: set[str] = field(default_factory=set)


def graphs_around(program: Program, path: str) -> list[tuple[str, fx.GraphModule]]:
    """The GraphModules that contain ``path``, the root first."""
    found = []
    for prefix in attach.prefixes(path):
        module = attach.parent_module(program, prefix) if prefix else program.graph
        if isinstance(module, fx.GraphModule):
            found.append((prefix, module))
    return found


# ------------------------------------------------------------------ where


def layer_cuts(program: Program, site: Site, span: Span) -> list[Cut]:
    """How to bypass a whole layer, at every call of it. Raises S0473 where the layer has no single input and output."""
    if site.input is None or site.output is None:
        raise fail("S0473", f"{site.role} cannot be bypassed: the graph shows no single input and output of it", span, "selected here")
    module = attach.parent_module(program, site.path) if site.path else None
    if not isinstance(module, fx.GraphModule) or site.output.graph != site.path:
        if site.input.graph != site.output.graph:
            raise fail("S0473", f"{site.role} cannot be bypassed: its input and output are in different graphs", span, "selected here")
        cut = Cut(site, site.output.graph, program.node(site.output), None, program.node(site.input))
        return [_fitting(cut, span)]
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    returned = module.graph.output_node().args[0]
    index: int | None = None
    if isinstance(returned, tuple | list):
        index = [n.name if isinstance(n, fx.Node) else "" for n in returned].index(site.output.node)
    cuts = []
    for graph, holder in graphs_around(program, site.path):
        for node in holder.graph.find_nodes(op="call_module", target=attach.relative(site.path, graph)):
            cuts.append(_fitting(Cut(site, graph, node, index, given(node, names)[site.input.node]), span))
    return cuts


def given(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a call by the names of the placeholders."""
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _fitting(cut: Cut, span: Span) -> Cut:
    spec = cut.node.meta.get("spec")
    if cut.index is not None and isinstance(spec, tuple | list):
        spec = spec[cut.index]
    before = cut.instead.meta.get("spec")
    if spec != before:
        shapes = " and ".join(_shape(s) for s in (before, spec))
        raise fail(
            "S0473", f"{cut.site.role} cannot be bypassed: it changes what passes through it, {shapes}", span, "selected here",
            help="keep layers that change the size; the layers behind them that keep it can go",
        )  # fmt: skip
    return cut


def _shape(spec: Any) -> str:
    shape = getattr(spec, "shape", None)
    return "[" + ", ".join(str(n) for n in shape) + "]" if shape is not None else "several values"


def branch_cut(program: Program, site: Site, span: Span) -> Cut:
    """How to leave out a branch beside the residual stream: the sum that it is added to becomes the rest of the sum.

    Modules that were attached behind the branch go with it. Raises S0473 where no plain sum follows.
    """
    if site.output is None:
        raise fail("S0473", f"{site.role} cannot be bypassed: the graph shows no single output of it", span, "selected here")
    end = branch_end(program, site)
    user = next(iter(end.users), None)
    rest = _rest_of_sum(user, end) if user is not None and len(end.users) == 1 else None
    if user is not None and rest is not None:
        return _fitting(Cut(site, site.output.graph, user, None, rest), span)
    raise fail(
        "S0473", f"{site.role} cannot be bypassed: it is not a branch that is added to something beside it", span, "selected here",
        help="select a whole layer, or an attention or feed-forward block with a residual connection",
    )  # fmt: skip


def branch_end(program: Program, site: Site) -> fx.Node:
    """The value of a branch behind everything that was attached to its output."""
    assert site.output is not None
    graph, node = program.module(site.output.graph), program.node(site.output)
    while len(node.users) == 1:
        user = next(iter(node.users))
        edits = getattr(graph.get_submodule(str(user.target)), "edits", None) if user.op == "call_module" else None
        if not (_moves(user, node) or (edits is not None and user.args[edits] is node)):
            break
        node = user
    return node


def _moves(user: fx.Node, node: fx.Node) -> bool:
    return user.op == "call_function" and _name(user) in ("to", "dropout", "clone", "contiguous") and user.all_input_nodes == [node]


def _name(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return str(schema.name.rpartition("::")[2]) if schema is not None else getattr(node.target, "__name__", "")


def _rest_of_sum(user: fx.Node, node: fx.Node) -> fx.Node | None:
    if user.op != "call_function" or _name(user) != "add" or len(user.args) != 2 or user.kwargs.get("alpha", 1) != 1:
        return None
    left, right = user.args
    rest = right if left is node else left
    return rest if isinstance(rest, fx.Node) and rest is not node else None


# ------------------------------------------------------------------ what else needs it


def conflicts(graph: fx.GraphModule, cuts: Sequence[Cut], loose: set[int]) -> list[tuple[fx.Node, Cut]]:
    """Who would still need something of what is bypassed: (the node that needs it, the cut).

    ``loose`` are the places of the graph's outputs that go with a layer (its cache, its entry in a tuple by layer).
    """
    by_node = {c.node: c for c in cuts}
    found: list[tuple[fx.Node, Cut]] = []
    start = [n for i, n in enumerate(outputs_of(graph)) if isinstance(n, fx.Node) and i not in loose]
    seen = set(start)
    stack = [(n, graph.graph.output_node()) for n in start]
    while stack:
        node, reader = stack.pop()
        cut = by_node.get(node)
        if cut is not None and cut.index is None:
            inputs = [cut.instead]
        elif cut is not None:
            found.append((reader, cut))
            continue
        elif node.target is operator.getitem and node.args[0] in by_node and by_node[node.args[0]].index is not None:
            cut = by_node[node.args[0]]
            if node.args[1] != cut.index:
                found.append((reader, cut))
                continue
            inputs = [cut.instead]
        else:
            inputs = node.all_input_nodes
        for n in inputs:
            if n not in seen:
                seen.add(n)
                stack.append((n, node))
    return found


def outputs_of(graph: fx.GraphModule) -> list[Any]:
    """The flat results of a graph."""
    value = graph.graph.output_node().args[0]
    return list(value) if isinstance(value, tuple | list) else [value]


# ------------------------------------------------------------------ rewriting


def bypass(program: Program, cuts: Iterable[Cut]) -> None:
    """Let every use of what is cut read what stands in for it. Cuts are given in order of execution, so that chains resolve."""
    stands: dict[fx.Node, fx.Node] = {}
    for cut in cuts:
        instead = cut.instead
        while instead in stands:
            instead = stands[instead]
        replaced = [cut.node] if cut.index is None else [
            u for u in cut.node.users if u.target is operator.getitem and u.args[1] == cut.index
        ]  # fmt: skip
        for node in replaced:
            node.replace_all_uses_with(instead)
            stands[node] = instead


def sweep(program: Program, path: str, taken: Taken) -> bool:
    """Erase what nothing reads in one graph, placeholders aside; True when something went."""
    gm = program.module(path) if path else program.graph
    gone = False
    for node in reversed(list(gm.graph.nodes)):
        if node.op in ("output", "placeholder") or node.users or _writes_for_others(gm, node):
            continue
        if node.op == "call_module":
            taken.called.add(attach.join(path, str(node.target)))
        elif node.op == "get_attr":
            taken.read.add(attach.join(path, str(node.target)))
        gm.graph.erase_node(node)
        gone = True
    if gone:
        attach.recompile_later(gm)
    return gone


def _alias(node: fx.Node, way: str) -> fx.Node | None:
    """The value whose memory an operation's result is (``way`` read: a view; write: changed in place), None for one of its own."""
    schema = getattr(node.target, "_schema", None)
    for i, argument in enumerate(schema.arguments if node.op == "call_function" and schema is not None else ()):
        if argument.alias_info is not None and (way == "read" or argument.alias_info.is_write):
            value = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            return value if isinstance(value, fx.Node) else None
    return None


_MAKES = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Embedding)
"""Modules whose result is memory of its own."""


def _writes_for_others(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an operation changes memory in place that something else than views of it, or further writing into it, reads."""
    root = _alias(node, "write")
    if root is None:
        return False
    while (before := _alias(root, "read")) is not None:
        root = before
    own = root.op == "call_function" or (root.op == "call_module" and isinstance(gm.get_submodule(str(root.target)), _MAKES))
    if not own:
        return True
    known, stack = {root}, [root]
    while stack:
        for user in stack.pop().users:
            if user in known:
                continue
            if _alias(user, "read") not in known:
                return True
            known.add(user)
            stack.append(user)
    return False


def trim(program: Program, path: str) -> None:
    """Take the placeholders that a called graph no longer reads out of it and out of its calls."""
    gm = program.module(path)
    holders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    idle = [n for n in holders if not n.users]
    if not idle:
        return
    names = [n.name for n in holders]
    for graph, holder in graphs_around(program, path):
        for node in holder.graph.find_nodes(op="call_module", target=attach.relative(path, graph)):
            values = given(node, names)
            node.args = tuple(values[n.name] for n in holders if n.users)
            node.kwargs = {}
            attach.recompile_later(holder)
    for n in idle:
        gm.graph.erase_node(n)
    attach.recompile_later(gm)


def narrow(program: Program, path: str, dropped: set[int]) -> None:
    """Let a called graph return less: its results at the places ``dropped``, which nothing reads, go; a single one left is bare."""
    gm = program.module(path)
    end = gm.graph.output_node()
    old = outputs_of(gm)
    kept = [i for i in range(len(old)) if i not in dropped]
    specs = end.meta.get("spec")
    end.args = (old[kept[0]],) if len(kept) == 1 else (tuple(old[i] for i in kept),)
    if isinstance(specs, tuple | list):
        end.meta["spec"] = specs[kept[0]] if len(kept) == 1 else tuple(specs[i] for i in kept)
    for graph, holder in graphs_around(program, path):
        for node in holder.graph.find_nodes(op="call_module", target=attach.relative(path, graph)):
            own = node.meta["spec"]
            node.meta["spec"] = own[kept[0]] if len(kept) == 1 else tuple(own[i] for i in kept)
            for user in list(node.users):
                if int(user.args[1]) in dropped:  # type: ignore[arg-type]
                    holder.graph.erase_node(user)
                elif len(kept) == 1:
                    user.replace_all_uses_with(node)
                    holder.graph.erase_node(user)
                else:
                    user.args = (node, kept.index(int(user.args[1])))  # type: ignore[arg-type]
            attach.recompile_later(holder)
    attach.recompile_later(gm)


# ------------------------------------------------------------------ modules and tensors


def remove_module(program: Program, path: str) -> dict[str, int]:
    """Take a module with all its tensors out of the tree; parameters that go with it and their elements (tied ones that stay: none)."""
    module = attach.parent_module(program, path)
    if module is None:
        return {}
    names = [
        attach.join(path, n) for n, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    ]
    parent, _, leaf = path.rpartition(".")
    sizes = {attach.join(path, n): p.numel() for n, p in module.named_parameters(remove_duplicate=False)}
    delattr(program.module(parent), leaf)
    program.attachments[:] = [a for a in program.attachments if not attach.inside(a.module, path)]
    return forget(program, names, sizes)


def forget(program: Program, names: Iterable[str], sizes: dict[str, int]) -> dict[str, int]:
    """Drop the expressions of tensors that are gone from the tree; the elements of parameters that nothing holds any more."""
    removed: dict[str, int] = {}
    for name in names:
        first = program.aliases.get(name, name)
        if first not in program.weights:
            continue
        others = [k for k, v in program.aliases.items() if v == first and k != name] + ([first] if first != name else [])
        attach.drop_tensor(program, name)
        program.journal.entries.pop(name, None)
        if not others and name in sizes:
            removed[name] = sizes[name]
    return removed


def remove_unread(program: Program, taken: Taken) -> dict[str, int]:
    """Modules and tensors that only erased nodes named."""
    named = set()
    for path, gm in _graphs(program):
        for node in gm.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                named.add(attach.join(path, str(node.target)))
    removed: dict[str, int] = {}
    for path in sorted(taken.called - named):
        if not any(n.startswith(path + ".") for n in named):
            removed |= remove_module(program, path)
    for name in sorted(taken.read - named):
        owner, _, leaf = name.rpartition(".")
        module = attach.parent_module(program, owner) if owner else program.graph
        tensor = getattr(module, leaf, None) if module is not None else None
        if tensor is None or not (leaf in module._parameters or len(graphs_around(program, name)) > 1):
            continue  # a table that the root shares out (rotary frequencies) is no part of what was taken out
        sizes = {name: tensor.numel()} if leaf in module._parameters else {}
        delattr(module, leaf)
        removed |= forget(program, [name], sizes)
    _remove_empty(program, {*taken.called, *taken.read})
    return removed


def _graphs(program: Program) -> list[tuple[str, fx.GraphModule]]:
    return [(p, m) for p, m in program.graph.named_modules() if isinstance(m, fx.GraphModule)]


def _remove_empty(program: Program, names: Iterable[str]) -> None:
    """Scopes that held only what is gone."""
    for name in sorted(names, key=len, reverse=True):
        parent = name.rpartition(".")[0]
        while parent:
            module = attach.parent_module(program, parent)
            if module is not None:
                own = [*module._modules, *module._parameters, *module._buffers]
                if own or isinstance(module, fx.GraphModule):
                    break
                owner, _, leaf = parent.rpartition(".")
                delattr(program.module(owner), leaf)
            parent = parent.rpartition(".")[0]
