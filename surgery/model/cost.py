"""What a program costs: parameters, bytes, floating-point operations. Everything from shapes; no weight is read.

A multiply-add counts as two operations. Counted are products (linear layers, matrix products, expert products by the tokens
that are routed), convolutions and attention (scores and values, without regard to masks); elementwise work, norms, softmax and
look-ups are not, as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from surgery.core.site import NodeRef, Site
from surgery.model.anatomy import ops
from surgery.model.cost_ops import Sizes, flops_of, weight_of
from surgery.model.cut_sizes import NewSizes
from surgery.model.flat import flatten
from surgery.model.program import Program
from surgery.model.walk import edited, tensors
from surgery.model.weights import Expr

# ---------------------------------------------------------------- parameters and bytes


def parameter_names(program: Program) -> tuple[str, ...]:
    """Every parameter by its first name, tied ones once, in model order."""
    found = (program.aliases.get(n, n) for n in tensors(program.graph)[0])
    return tuple(n for n in dict.fromkeys(found) if n in program.weights)


def parameters(program: Program) -> int:
    """Number of parameters, tied ones once."""
    return sum(math.prod(program.weights[n].shape) for n in parameter_names(program))


def bytes_of(program: Program, names: Sequence[str] | None = None) -> int:
    """Bytes of all parameters in their own dtypes, tied ones once; ``names`` are :func:`parameter_names`, where the caller has them."""
    return bytes_in(program.weights, parameter_names(program) if names is None else names)


def bytes_in(weights: Mapping[str, Expr], names: Sequence[str]) -> int:
    """Bytes of some weights."""
    found = [weights[n] for n in names]
    return sum([math.prod(e.shape) * getattr(torch, e.dtype).itemsize for e in found])


def idle_shares(program: Program) -> dict[str, float]:
    """For each parameter of routed experts the share that one token does not use: ``1 - top_k / experts``."""
    idle: dict[str, float] = {}
    for site in program.anatomy.sites:
        experts, top_k = site.facts.get("experts"), site.facts.get("top_k")
        if site.is_region and site.role.endswith(".experts") and isinstance(experts, int) and isinstance(top_k, int):
            idle |= dict.fromkeys(site.parameters, 1 - top_k / experts)
    return idle


def active_parameters(program: Program) -> int:
    """Parameters that one token uses: of routed experts only ``top_k`` of each block's count."""
    idle = idle_shares(program)
    return sum(round(math.prod(program.weights[n].shape) * (1 - idle.get(n, 0.0))) for n in parameter_names(program))


# ---------------------------------------------------------------- operations


@dataclass(frozen=True)
class NodeCost:
    """Operations of one node of the flat graph for one forward pass of batch 1: ``weight`` the parameter of the product, if any."""

    origin: NodeRef
    kind: str
    flops: int
    weight: str = ""


@dataclass
class Cost:
    """The operations of one forward pass of batch 1 at ``length``; per token is their sum divided by ``tokens``.

    ``tokens`` is ``length`` where some integer input has an open length (of several such inputs each has this length), else 1:
    vision and speech models are counted per sample.
    """

    length: int
    tokens: int
    nodes: list[NodeCost] = field(default_factory=list)
    sample: str = "sample"
    _graph: fx.Graph | None = field(default=None, repr=False, compare=False)
    _flat: list[fx.Node] = field(default_factory=list, repr=False, compare=False)

    @property
    def total(self) -> int:
        return sum(n.flops for n in self.nodes)

    @property
    def unit(self) -> str:
        """What the operations are divided by, in words: ``token``, or ``sample`` (``image`` where the inputs are pixels)."""
        return "token" if self.tokens > 1 else self.sample

    @property
    def at(self) -> str:
        """``" at length 128"`` where the length matters, else nothing."""
        return f" at length {self.length}" if self.tokens > 1 else ""

    @property
    def per_token(self) -> int:
        return round(self.total / self.tokens)


def count(program: Program, length: int = 128, graph: fx.Graph | None = None) -> Cost:
    """Operations of every node for one forward pass of batch 1, sequences of ``length``, an empty cache.

    Open axes of floating inputs other than the batch (audio) keep the size of the trace. Modules without a
    flat form (what a method attached) are counted on meta tensors of the sizes that reach them. ``graph`` is the program's :func:`flat_graph`, where
    the caller has it: without such modules it holds all that is counted, also when the program changes.
    """
    if graph is None:
        graph = flat_graph(program)
    sizes = Sizes(program, graph, length)
    pixels = any("pixel" in str(n.target) for n in program.graph.graph.find_nodes(op="placeholder"))
    cost = Cost(length, length if sizes.sequence else 1, sample="image" if pixels else "sample", _graph=graph)
    for node in graph.nodes:
        found = flops_of(node, sizes)
        if found:
            weight = weight_of(node)
            cost.nodes.append(NodeCost(node.meta["origin"], ops.name_of(node), found, weight))
            cost._flat.append(node)
    return cost


def flat_graph(program: Program) -> fx.Graph:
    """The graph that is counted. While nothing stands on top of the model the analysis of classes has it already."""
    return flatten(program.graph, program.aliases) if edited(program.graph) else program.dims.graph


def foreseen(program: Program, counted: Cost, cut: NewSizes) -> int:
    """Operations per token or sample as a cut of dimension classes will leave a program with nothing attached, which was ``counted`` as
    it is: only what the cut touches is counted again."""
    assert counted._graph is not None
    sizes = Sizes(program, counted._graph, counted.length, cut)
    total = counted.total
    for node, entry in zip(counted._flat, counted.nodes, strict=True):
        if cut.moved(node) or any([cut.moved(n) for n in node.all_input_nodes]):
            total += flops_of(node, sizes) - entry.flops
    return round(total / counted.tokens)


def flops_per_token(program: Program, length: int = 128) -> int:
    """Operations of one forward pass of batch 1 divided by its tokens (see :class:`Cost`), rounded to an integer."""
    return count(program, length).per_token


def flops_by_site(program: Program, length: int = 128) -> dict[str, int]:
    """Operations per token of every site by role: a slice has its share of the product, a region all that is inside it."""
    cost = count(program, length)
    every = program.anatomy.sites
    table = _Attribution(program, cost)
    return {s.role: round(table.of([s]) / cost.tokens) for s in every}


def flops_of_sites(program: Program, sites: Iterable[Site], length: int = 128) -> int:
    """Operations per token of some sites together, each product once, with what is attached to them."""
    cost = count(program, length)
    return round(_Attribution(program, cost).of(list(sites)) / cost.tokens)


class _Attribution:
    """Which products belong to which site."""

    def __init__(self, program: Program, cost: Cost) -> None:
        self.program = program
        self.by_weight: dict[str, int] = {}
        self.by_origin: dict[NodeRef, int] = {}
        for node in cost.nodes:
            if node.weight:
                self.by_weight[node.weight] = self.by_weight.get(node.weight, 0) + node.flops
            else:
                self.by_origin[node.origin] = self.by_origin.get(node.origin, 0) + node.flops

    def of(self, sites: Sequence[Site]) -> float:
        shares: dict[str, dict[tuple[int, int], float]] = {}
        origins: dict[NodeRef, None] = {}
        for site in sites:
            inside = [s for s in self.program.anatomy.sites if s.role.startswith(f"{site.role}.")] if site.is_region else []
            for part in (site, *inside):
                if part.is_region:
                    origins |= dict.fromkeys(part.calls)
                    shares.setdefault("", {})
                    for name in part.parameters:
                        shares.setdefault(name, {})[0, -1] = 1.0
                elif part.weight:
                    self._share(part, shares)
            attached = [a for a in self.program.attachments if any(a.site.role == p.role for p in (site, *inside))]
            attached += [a for a in self.program.attachments if site.op == "attachment" and a.module == site.path]
            origins |= dict.fromkeys(a.node for a in attached)
        total = sum(self.by_origin.get(o, 0) for o in origins)
        return total + sum(self.by_weight.get(w, 0) * min(1.0, sum(parts.values())) for w, parts in shares.items())

    def _share(self, part: Site, shares: dict[str, dict[tuple[int, int], float]]) -> None:
        stored = self.program.weights[part.weight].shape if part.weight in self.program.weights else ()
        rows = part.rows or ((0, -1),)
        # one expert of many does its share of the rows that are routed, as far as shapes can tell
        expert = part.facts.get("expert") if part.op == "expert" and stored else None
        share, offset = (1.0, 0) if not isinstance(expert, int) else (1 / stored[0], (expert + 1) << 32)
        for start, stop in rows:
            whole = stop < 0 or not stored
            own = 1.0 if whole else (stop - start) / stored[part.out_axis]
            shares.setdefault(part.weight, {})[start + offset, stop + offset] = share * own
