"""Putting a captured block of experts in the place of dense products, and clearing away what it replaces."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx, nn

from surgery.model.capture import capture_module
from surgery.model.moe import Layout, MoeBlock, RouterTap
from surgery.model.program import Origin, Program, ValueSpec
from surgery.passes.kinds import attach
from surgery.passes.kinds.route_between import Between

aten = torch.ops.aten
TOKENS = 24
"""Example number of tokens while capturing; no size of a block is fixed by it."""


class Blocks:
    """Captured blocks; equal ones are captured once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Layout, str], fx.GraphModule] = {}

    def get(self, layout: Layout, act: fx.GraphModule) -> fx.GraphModule:
        """The graph ``x [tokens, inp] -> ([tokens, out],)`` of a block with this function between its projections."""
        rates = [m.p for m in act.modules() if isinstance(m, nn.Dropout)]
        key = (layout, f"{act.code} {rates}")
        found = self._known.get(key)
        if found is None:
            with torch.device("meta"):
                block = MoeBlock(layout, act)
                x = torch.empty(TOKENS, layout.inp)
            found = self._known[key] = capture_module(block, (x,), dynamic={"x": {0: "tokens"}}).graph
        return found


def splice(program: Program, found: Between, block: fx.GraphModule, path: str, tap: dict[str, float], top_k: int, origin: Origin) -> None:
    """Copies the block's nodes in front of ``found.down`` and gives its uses the block's result; its modules come to stand at ``path``."""
    gm = program.module(found.graph)
    local = attach.relative(path, found.graph)
    assert local is not None
    _place(program, block, path)
    rank = len(found.x.meta["spec"].shape)
    with gm.graph.inserting_before(found.down):
        x = found.x if rank == 2 else _reshaped(gm, found.x, [-1, found.x.meta["spec"].shape[-1]])
        tokens = x.meta["spec"].shape[0]
        table: dict[fx.Node, Any] = {}
        for node in block.graph.nodes:
            if node.op == "placeholder":
                table[node] = x
            elif node.op == "output":
                result = table[node.args[0][0]]
            else:
                target = attach.join(local, node.target) if node.op in ("get_attr", "call_module") else node.target
                args, kwargs = fx.map_arg(node.args, table.__getitem__), fx.map_arg(node.kwargs, table.__getitem__)
                name = f"{local}.{node.target}".replace(".", "_") if node.op in ("get_attr", "call_module") else node.name
                made = gm.graph.create_node(node.op, target, args, kwargs, name=name)
                made.meta["spec"] = _respec(node.meta["spec"], tokens)
                program.journal.record(attach.node_ref(found.graph, made), origin)
                table[node] = made
                if node.op == "call_module" and node.target == "gate" and any(tap.values()):
                    table[node] = _tapped(program, gm, made, path, local, tap, top_k)
        if rank != 2:
            result = _reshaped(gm, result, [*_sizes(gm, found.x), -1], found.down.meta["spec"])
    found.down.replace_all_uses_with(result)
    attach.recompile_later(gm)


def _tapped(program: Program, gm: fx.GraphModule, scores: fx.Node, path: str, local: str, tap: dict[str, float], top_k: int) -> fx.Node:
    program.graph.add_submodule(f"{path}.tap", RouterTap(top_k, **tap))
    node = gm.graph.create_node("call_module", f"{local}.tap", (scores,), name=f"{local}.tap".replace(".", "_"))
    node.meta["spec"] = scores.meta["spec"]
    return node


def _place(program: Program, block: fx.GraphModule, path: str) -> None:
    for name, child in block.named_children():
        program.graph.add_submodule(attach.join(path, name), copy.deepcopy(child))


def _respec(spec: Any, tokens: Any) -> Any:
    """A spec of the block with the surrounding graph's number of tokens in place of its own."""
    if isinstance(spec, tuple):
        return tuple(_respec(s, tokens) for s in spec)
    assert isinstance(spec, ValueSpec)
    own = sympy.Symbol("s0", integer=True, positive=True)

    def size(n: Any) -> Any:
        new = n.xreplace({own: sympy.sympify(tokens)}) if hasattr(n, "xreplace") else n
        return int(new) if getattr(new, "is_Integer", False) else new

    return replace(spec, shape=tuple(size(n) for n in spec.shape))


def _reshaped(gm: fx.GraphModule, x: fx.Node, sizes: list[Any], spec: Any = None) -> fx.Node:
    node = gm.graph.call_function(aten.reshape.default, (x, sizes))
    if spec is None:
        old = x.meta["spec"]
        spec = replace(old, shape=(math.prod(old.shape[:-1]), old.shape[-1]))
    node.meta["spec"] = spec
    return node


def _sizes(gm: fx.GraphModule, x: fx.Node) -> list[Any]:
    """The leading sizes of a value: numbers, or nodes that read them."""
    found: list[Any] = []
    for axis, n in enumerate(x.meta["spec"].shape[:-1]):
        if isinstance(n, int):
            found.append(n)
            continue
        node = gm.graph.call_function(aten.sym_size.int, (x, axis))
        node.meta["spec"] = ValueSpec("int", "", (n,))
        found.append(node)
    return found


# ------------------------------------------------------------------ clearing


def clear(program: Program, found: Between, names: Sequence[str]) -> int:
    """Erases the dense nodes and forgets tensors and modules that nothing uses any more; the number of parameters that went."""
    gm = program.module(found.graph)
    stale = [found.down, *_behind(found)]
    targets = set()
    for node in sorted(stale, reverse=True):
        if not node.users:
            if node.op == "call_module":
                targets.add(attach.join(found.graph, str(node.target)))
            gm.graph.erase_node(node)
    removed = 0
    for name in names:
        if _read(program, name):
            continue
        owner, _, leaf = name.rpartition(".")
        if not _shared(program, name):  # else the tensor lives on under another name
            removed += math.prod(program.weights[name].shape)
        delattr(program.module(owner), leaf)
        attach.drop_tensor(program, name)
    for path in sorted({*targets, *(n.rpartition(".")[0] for n in names)}, key=len, reverse=True):
        _drop_empty(program, path)
    return removed


def _behind(found: Between) -> list[fx.Node]:
    """What only the dense block may have needed: the nodes within, the weights they read and the sizes they used."""
    near = {n for node in (found.down, *found.inner) for n in node.all_input_nodes}
    return [n for n in dict.fromkeys([*found.inner, *near]) if n is not found.x and n is not found.down and n.op != "placeholder"]


def _shared(program: Program, name: str) -> bool:
    return name in program.aliases or name in program.aliases.values()


def _read(program: Program, name: str) -> bool:
    """Whether a node of a graph around a tensor still uses it."""
    parts = name.split(".")
    for n in range(len(parts)):
        gm = program.module(".".join(parts[:n]))
        if isinstance(gm, fx.GraphModule):
            tail = parts[n:]
            if gm.graph.find_nodes(op="get_attr", target=".".join(tail)) or gm.graph.find_nodes(
                op="call_module", target=".".join(tail[:-1])
            ):
                return True
    return False


def _drop_empty(program: Program, path: str) -> None:
    """Removes a leaf module without tensors and calls, and what holds nothing else."""
    while path:
        try:
            module = program.module(path)
        except AttributeError:
            return
        if isinstance(module, fx.GraphModule) or any(True for _ in module.children()) or _read(program, f"{path}.weight"):
            return
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            return
        parent, _, leaf = path.rpartition(".")
        delattr(program.module(parent), leaf)
        path = parent
