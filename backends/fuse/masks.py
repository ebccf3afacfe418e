"""What an attention mask does, found by running it: the subgraph that makes a mask is computed on random padding and compared.

A pattern would have to know every way in which a library spells a mask. Behaviour is the same for all: a mask either lets everything
pass, or hides later keys, or hides the keys that an input marks as padding, or both; anything else is kept as it is and added to the scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from surgery.backends.fuse.view import FuseView, aten
from surgery.model.program import ValueSpec
from surgery.model.sample import placeholders, sizes
from surgery.model.threads import one_thread

HIDES = -1e4
"""A score this low and below hides a key; one between it and zero changes the attention and is no mask."""

LONGEST = 1 << 22
"""Elements of a mask that a trial may compute."""

HEAVY = frozenset(
    {aten.linear.default, aten.matmul.default, aten.addmm.default, aten.mm.default, aten.bmm.default, aten.embedding.default,
     aten.scaled_dot_product_attention.default, aten.layer_norm.default, aten.convolution.default, aten.conv2d.default}
)  # fmt: skip
"""What no mask is made of: values with one of these behind them are scores of their own."""


LAYOUT = frozenset(
    {aten.unsqueeze.default, aten.transpose.int, aten.permute.default, aten.slice.Tensor, aten.expand.default, aten.select.int,
     aten.sym_size.int, aten.view.default, aten.reshape.default}
)  # fmt: skip
"""Numbers in these are axes and sizes."""


@dataclass(frozen=True)
class Mask:
    """``causal``: hides keys behind the query's own position, counted from the end. ``padding``: the input [batch, keys] whose zeros are
    hidden. ``plain`` is False for a mask that is something else; the reason is in ``why``."""

    plain: bool
    causal: bool = False
    padding: fx.Node | None = None
    why: str = ""


def classify(view: FuseView, node: fx.Node, memo: dict[fx.Node, Mask]) -> Mask:
    """What the mask ``node`` (bool, or numbers that are added to scores) does; asked once for each node with ``memo``."""
    if node not in memo:
        memo[node] = _classify(view, node)
    return memo[node]


def _classify(view: FuseView, node: fx.Node) -> Mask:
    above = ancestors(node)
    if any(n.op == "call_function" and n.target in HEAVY for n in above):
        return Mask(False, why="it is computed from weights or values")
    if view.rank(node) not in (2, 3, 4):
        return Mask(False, why=f"it has {view.rank(node)} axes")
    longest = max((c for n in above for c in _numbers(n)), default=0)
    table = max((n for a in above if a.op == "get_attr" for n in view.shape(a) if isinstance(n, int)), default=0)
    graph, order = subgraph(view, node, above)
    candidates: set[tuple[bool, str]] | None = None
    for inputs in trials(view, longest, table):
        if inputs is None:
            return Mask(False, why=f"it depends on the number {max(longest, table)}, too long to try")
        try:
            with one_thread(), torch.no_grad():
                found = graph(*[inputs[name] for name in order])
        except RuntimeError as exc:
            return Mask(False, why=f"it does not run by itself: {str(exc).splitlines()[0]}")
        allowed = _allowed(found)
        if allowed is None:
            return Mask(False, why="it adds numbers of its own to the scores")
        if allowed.ndim == 4 and allowed.shape[1] > 1:
            if not bool((allowed == allowed[:, :1]).all()):
                return Mask(False, why="it differs between heads")
            allowed = allowed[:, :1]
        fitting = _fitting(allowed, inputs)
        candidates = fitting if candidates is None else candidates & fitting
        if not candidates:
            return Mask(False, why="it is neither padding nor causal")
    if not candidates:
        return Mask(False, why="no inputs to try it on")
    causal, name = min(candidates, key=lambda c: (c[1] != "", c[0], c[1]))
    source = next((p for p in view.placeholders if str(p.target) == name), None)
    return Mask(True, causal, source)


def ancestors(node: fx.Node) -> list[fx.Node]:
    """The node and everything that it is computed from, in the order of the graph."""
    seen: set[fx.Node] = set()
    queue = [node]
    while queue:
        n = queue.pop()
        if n not in seen:
            seen.add(n)
            queue.extend(n.all_input_nodes)
    return [n for n in node.graph.nodes if n in seen]


def _numbers(node: fx.Node) -> Iterator[int]:
    """The whole numbers in a call's arguments: a window shows at lengths above the largest of them only."""
    if node.op != "call_function" or node.target in LAYOUT:
        return
    for value in (*node.args, *node.kwargs.values()):
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if type(item) is int and 1 < abs(item) < 1 << 40:
                yield abs(item)
            elif type(item) is float and item == int(item or 0) and 1 < abs(item) < 1 << 20 and item > HIDES:
                yield int(abs(item))


def subgraph(view: FuseView, node: fx.Node, above: list[fx.Node]) -> tuple[fx.GraphModule, list[str]]:
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    order = []
    for n in sorted(above, key=lambda n: n.op != "placeholder"):
        values[n] = graph.node_copy(n, values.__getitem__)
        if n.op == "placeholder":
            order.append(str(n.target))
    graph.output(values[node])
    return fx.GraphModule(view.graph, graph), order


def trials(view: FuseView, longest: int, table: int = 0) -> Iterator[dict[str, Tensor] | None]:
    """Inputs of several sizes with masks of random zeros: such that every number in the mask is exceeded, and that a stored table with an axis of
    ``table`` is read to its end, where a window shows that no number tells of. None in the place of what is too long."""
    program = view.program
    names = [n for n, _ in placeholders(program)]
    cached = any("past_key" in n or "past_value" in n for n in names)
    generator = torch.Generator().manual_seed(5)
    shapes = [(2, 6, 0), (3, 9, 4), (2, 1, 7)] if cached else [(2, 6, 0), (3, 9, 0), (1, 5, 0)]
    long = [((1, 3, longest + 2) if cached else (1, longest + 3, 0), longest)] if longest > 4 else []
    if table > 13 and program.signature.symbols:
        long.append(((1, 3, table - 3) if cached else (1, table, 0), 0))
    for extra, exceeded in long:
        steps = max([*sizes(program, *extra).values(), 1])
        if steps * (3 if cached else steps) > LONGEST or (steps <= exceeded and not cached):
            yield None
            return
        shapes.append(extra)
    for batch, length, past in shapes:
        yield {name: _input(name, spec, sizes(program, batch, length, past), generator) for name, spec in placeholders(program)}


def _input(name: str, spec: ValueSpec, at: dict[str, int], generator: torch.Generator) -> Tensor:
    """Masks are random zeros and ones; other whole numbers are small ones, special ids among them, so that a mask that looks at them is
    seen to do so; what is no number costs no memory."""
    shape = tuple(int(n.subs({s: at[str(s)] for s in n.free_symbols})) if getattr(n, "free_symbols", None) else int(n) for n in spec.shape)
    dtype = getattr(torch, spec.dtype)
    if dtype is torch.bool or "mask" in name:
        return (torch.rand(shape, generator=generator) < 0.7).to(dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, 5, shape, generator=generator, dtype=dtype)
    return torch.zeros(1, dtype=dtype).expand(shape)


def _allowed(found: Any) -> Tensor | None:
    """Which keys a computed mask lets pass, None when its numbers say more than that."""
    if not isinstance(found, Tensor):
        return None
    if found.dtype is torch.bool:
        return found
    if not found.is_floating_point():
        return None
    passes, hides = found == 0, found <= HIDES
    return passes if bool((passes | hides).all()) else None


def _fitting(allowed: Tensor, inputs: dict[str, Tensor]) -> set[tuple[bool, str]]:
    """Every (causal, name of the padding input) that gives these positions. Queries that may look at nothing do not count: there a
    library may do anything, for what they give is not read."""
    allowed = allowed.reshape((1,) * (4 - allowed.ndim) + tuple(allowed.shape))
    batch, _, queries, keys = allowed.shape
    if queries == 1 and keys == 1:
        return {(c, n) for c in (False, True) for n in ("", *inputs)}
    later = torch.ones(queries, keys, dtype=torch.bool).triu_(keys - queries + 1)
    fits = set()
    paddings: dict[str, Tensor] = {"": torch.ones(1, 1, 1, keys, dtype=torch.bool)}
    for name, value in inputs.items():
        if value.ndim == 2 and value.shape[1] == keys and not value.is_floating_point():
            paddings[name] = (value != 0)[:, None, None, :]
    for causal in (False, True):
        for name, padding in paddings.items():
            if batch not in (1, padding.shape[0]) and padding.shape[0] != 1:
                continue
            wanted = padding & ~later if causal else padding.expand(-1, -1, queries, -1)
            matters = wanted.any(-1, keepdim=True)
            same = (allowed == wanted) | ~matters
            if bool(same.all()):
                fits.add((causal, name))
    return fits
