"""Kind ``route``: a dense feed-forward block becomes a router and experts.

A method of this kind says how many experts there are, how they are made of the dense block's weights and what the router starts from; this
module owns the graph: the block is captured from :class:`surgery.model.moe.MoeBlock` and stands where the dense products stood.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import ClassVar

from torch import fx

from surgery.core.method import Method
from surgery.core.site import Site
from surgery.model.moe import Layout
from surgery.model.program import Gone, Program
from surgery.model.weights import Expr, Reshape, Select
from surgery.passes.kinds import attach, route_faults
from surgery.passes.kinds.calls import calls_of, weight_of
from surgery.passes.kinds.route_between import Between, NotPlainError, between
from surgery.passes.kinds.route_claims import same_as_dense
from surgery.passes.kinds.route_fit import Collector, fit
from surgery.passes.kinds.route_splice import Blocks, clear, splice
from surgery.passes.operation import Resolved, SiteChange

PARTS = ("up", "gate", "down")


@dataclass(frozen=True)
class Dense:
    """A dense block: ``width`` units between ``inp`` and ``out`` features. ``weights`` are canonical expressions: ``up`` and ``gate``
    ``[width, inp]``, ``down [out, width]``, and ``up_bias``, ``gate_bias [width]``, ``down_bias [out]`` where it has them."""

    inp: int
    out: int
    width: int
    gated: bool
    weights: Mapping[str, Expr] = field(compare=False)

    @property
    def size(self) -> int:
        """Its parameters."""
        return sum(math.prod(e.shape) for e in self.weights.values())


@dataclass(frozen=True)
class RouteMethod(Method):
    """Base of the methods that make experts of a dense block. Fields ``experts`` and ``top_k`` are per layer, ``capacity`` is one for all."""

    kind: ClassVar[str] = "route"

    @property
    def wants_data(self) -> bool:
        """Cannot do without the data of a statement; methods answer by their parameters."""
        return False

    @property
    def reads_data(self) -> bool:
        """Looks at the data of a statement that names some."""
        return False

    def layout(self, dense: Dense) -> Layout:
        """Sizes and routing of the block. Raises ValueError when the dense block cannot be divided so."""
        raise NotImplementedError

    def tensors(self, dense: Dense, layout: Layout, seed: int) -> dict[str, Expr]:
        """An expression for every tensor of ``layout.shapes``."""
        raise NotImplementedError

    def collector(self, dense: Dense, layout: Layout, seed: int) -> Collector | None:
        """What makes the router's weight from the values that enter the block, for a statement with data; None: it needs none."""
        return None

    def tap(self) -> dict[str, float]:
        """``balance``, ``z`` and ``jitter`` of the router in training; none of them: nothing is added."""
        return {}

    def note(self, dense: Dense, layout: Layout) -> str:
        """A remark about a block for the plan."""
        return f"in each block {layout.experts} experts of {layout.width} units, {layout.top_k} for a token"


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Convert every selected block. Raises S0409 to S0419 where that cannot be done; nothing was changed then."""
    route_faults.check(program, op)
    exact = all(m.identity == "exact" for m in op.methods)
    before = program.copy() if exact and op.study is not None else None
    work = [_study(program, op, site, method) for site, method in zip(op.sites, op.methods, strict=True)]
    twins = _twins(op, work)
    routers = fit(program, op, {w.site.role: (w.found, w.collector) for w in work if w.collector is not None and w.site.role not in twins})
    blocks = Blocks()
    changes = [_convert(program, op, w, blocks, twins.get(w.site.role, ""), routers.get(w.site.role)) for w in work]
    program.named[op.name] = tuple(dict.fromkeys((*program.named.get(op.name, ()), *(s.role for s in op.sites))))
    program.touch()
    route_faults.converted(program, op)
    unchanged = "unchanged" if exact else "changes by design"
    op.tell(f"output at init: {unchanged}; folds: none")
    if op.statement is not None and op.statement.using:
        op.tell(f"routers start from what enters the blocks on `{op.statement.using}`")
    if before is not None:
        op.claim(same_as_dense(before, program.copy(), op.origin.span))
    return changes


@dataclass(frozen=True)
class _Work:
    """What is known of one block before anything is changed; ``path`` is where its modules will stand."""

    site: Site
    method: RouteMethod
    parts: dict[str, Site]
    found: Between
    dense: Dense
    layout: Layout
    path: str
    seed: int
    collector: Collector | None
    names: tuple[str, ...]
    """The tensors of the dense block, as its own calls have them: shared ones have a name per use."""


def _study(program: Program, op: Resolved, site: Site, method: Method) -> _Work:
    assert isinstance(method, RouteMethod)
    parts = parts_of(program, site)
    try:
        found = between(program, parts)
    except NotPlainError as exc:
        raise route_faults.not_plain(op, site, str(exc)) from exc
    dense = dense_of(program, parts)
    try:
        layout = method.layout(dense)
    except ValueError as exc:
        raise route_faults.indivisible(op, site, method, dense.width) from exc
    names = tuple(dict.fromkeys(n for part in parts.values() for n in own_names(program, part)))
    path = _place(program, names, found.graph)
    seed = attach.seed_of(op.seed, op.name, path)
    collector = method.collector(dense, layout, seed) if op.study is not None and op.data is not None else None
    return _Work(site, method, parts, found, dense, layout, path, seed, collector, names)


def _twins(op: Resolved, work: list[_Work]) -> dict[str, str]:
    """For every block whose weights an earlier one of the statement has, too: the path of that one."""
    first: dict[tuple[int, ...], _Work] = {}
    found: dict[str, str] = {}
    for w in work:
        known = first.setdefault(tuple(id(e) for e in _stored(w.dense)), w)
        if known is w:
            continue
        if known.layout != w.layout:
            raise route_faults.unequal(op, w.site, known.site)
        found[w.site.role] = known.path
    return found


def _stored(dense: Dense) -> list[Expr]:
    """The stored tensors behind the canonical ones."""
    out = []
    for expr in dense.weights.values():
        while isinstance(expr, Select | Reshape):
            expr = expr.source
        out.append(expr)
    return out


def parts_of(program: Program, site: Site) -> dict[str, Site]:
    """The projections of a feed-forward region by their role within it."""
    sites = {s.role: s for s in program.anatomy.sites}
    return {role: sites[f"{site.role}.{role}"] for role in PARTS if f"{site.role}.{role}" in sites}


def dense_of(program: Program, parts: Mapping[str, Site]) -> Dense:
    """The block's weights in canonical form."""
    weights: dict[str, Expr] = {}
    for role, part in parts.items():
        weights[role] = _canonical(program, part)
        bias = program.weights.get(program.aliases.get(part.bias, part.bias))
        if bias is not None:
            rows = part.rows
            weights[f"{role}_bias"] = Select((sum(b - a for a, b in rows),), bias.dtype, bias, 0, rows) if rows else bias
    width, inp = weights["up"].shape
    return Dense(inp, weights["down"].shape[0], width, "gate" in parts, weights)


def _canonical(program: Program, part: Site) -> Expr:
    expr = program.weights[program.aliases.get(part.weight, part.weight)]
    if part.rows:
        shape = list(expr.shape)
        shape[part.out_axis] = sum(b - a for a, b in part.rows)
        expr = Select(tuple(shape), expr.dtype, expr, part.out_axis, part.rows)
    return Reshape((expr.shape[1], expr.shape[0]), expr.dtype, expr, (1, 0)) if part.out_axis == 1 else expr


def _convert(program: Program, op: Resolved, w: _Work, blocks: Blocks, twin: str, router: Expr | None) -> SiteChange:
    frozen = all(program.aliases.get(n, n) in program.frozen for n in w.names)
    made = {} if twin else w.method.tensors(w.dense, w.layout, w.seed)
    if router is not None:
        made["gate.weight"] = router
    splice(program, w.found, blocks.get(w.layout, w.found.act), w.path, w.method.tap(), w.layout.top_k, op.origin)
    own = _own(program, op, w, made, frozen, twin)
    removed = clear(program, w.found, w.names)
    for role, part in w.parts.items():
        program.gone[f"{w.site.role}.{role}"] = Gone(part, op.origin, "replaced by experts", f"@{op.name}.experts[*]")
    net = sum(math.prod(program.weights[n].shape) for n in own if n not in program.aliases) - removed
    trainable = sum(math.prod(w.layout.shapes[n[len(w.path) + 1 :]]) for n in own if program.aliases.get(n, n) not in program.frozen)
    note = w.method.note(w.dense, w.layout) + (f", shared with {twin}" if twin else "")
    shapes = (w.dense.width,), (w.layout.experts, w.layout.width)
    return SiteChange(w.site.role, w.path, (), *shapes, max(net, 0), max(-net, 0), trainable, note)


def own_names(program: Program, part: Site) -> list[str]:
    """The names under which a projection's call reads its weight and bias."""
    ((graph, node),) = calls_of(program, part)
    if node.op == "call_module":
        module = program.module(graph).get_submodule(str(node.target))
        return [attach.join(graph, str(node.target), n) for n, _ in module.named_parameters(recurse=False)]
    weight = weight_of(graph, node)
    reads = [n for n in node.all_input_nodes if n.op == "get_attr" and attach.join(graph, str(n.target)) != weight]
    return [weight, *(attach.join(graph, str(n.target)) for n in reads)]


def _place(program: Program, names: tuple[str, ...], graph: str) -> str:
    """Where the block's modules stand: at the module that holds all projections, else beside them under the layer."""
    above = [n.split(".")[:-2] for n in names]
    path = ".".join(words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*above, strict=False)))
    inside = attach.relative(path, graph)
    if not inside or isinstance(program.module(path), fx.GraphModule):
        return attach.join(graph, attach.free_name(program.module(graph), "moe"))
    taken = attach.parent_module(program, path)
    return (
        path if not any(hasattr(taken, n) for n in ("gate", "experts", "act", "tap")) else attach.join(path, attach.free_name(taken, "moe"))
    )


def _own(program: Program, op: Resolved, w: _Work, made: Mapping[str, Expr], frozen: bool, twin: str) -> list[str]:
    """Expressions, freezing and history of the new tensors; those of a twin are the twin's own.

    Experts are frozen like the block that they are made of. The router is new: it trains unless a `freeze` named the whole block.
    """
    explicit = all((o := program.journal.of(program.aliases.get(n, n))) and o[-1].verb == "freeze" for n in w.names)
    own = []
    for name in w.layout.shapes:
        full = attach.join(w.path, name)
        own.append(full)
        if twin:
            first = program.aliases.get(f"{twin}.{name}", f"{twin}.{name}")
            owner, _, leaf = full.rpartition(".")
            setattr(program.module(owner), leaf, program.graph.get_parameter(first))
            program.aliases[full] = first
            continue
        program.weights[full] = made[name]
        if explicit if name == "gate.weight" else frozen:
            program.frozen.add(full)
        program.journal.fold(full, *(o for n in w.names for o in program.journal.of(n)), op.origin)
    return own
