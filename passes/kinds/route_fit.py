"""Routers that start from data: one streamed pass over the samples, in which every block's inputs are seen once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, fx

from surgery.core.site import NodeRef
from surgery.model.moe_split import balanced_clusters, unit_rows
from surgery.model.program import Program
from surgery.model.realise import held, realise
from surgery.model.retarget import retarget
from surgery.model.threads import one_thread
from surgery.model.weights import Expr
from surgery.passes.kinds.route_between import Between
from surgery.passes.kinds.route_faults import few_tokens
from surgery.passes.operation import Resolved

Read = Callable[[Expr], Tensor]
MOST = 4096
"""Tokens that centres are found among."""


class Collector(Protocol):
    """Learns from the rows ``x [tokens, inp]`` that enter a block, in float32, and gives the router's weight ``[experts, inp]``."""

    experts: int
    tokens: int

    def begin(self, act: fx.GraphModule, read: Read) -> None: ...

    def add(self, x: Tensor) -> None: ...

    def end(self) -> None:
        """The values of another block come next: weights can go."""

    def router(self) -> Tensor: ...


class Centres:
    """For copies: the centres of equal clusters of what enters the block, so that like tokens start with like experts.

    Scores are the likeness to a centre beyond that to their mean, scaled to a standard deviation of one.
    """

    def __init__(self, experts: int, seed: int) -> None:
        self.experts, self.seed, self.tokens = experts, seed, 0
        self.rows: list[Tensor] = []

    def begin(self, act: fx.GraphModule, read: Read) -> None:
        pass

    def add(self, x: Tensor) -> None:
        taken = x[: MOST - self.tokens].clone()
        self.tokens += len(taken)
        self.rows.append(taken)

    def end(self) -> None:
        pass

    def router(self) -> Tensor:
        x = torch.cat(self.rows)
        x = x[: len(x) // self.experts * self.experts]
        order = balanced_clusters(x, self.experts, self.seed)
        centres = unit_rows(x)[order].reshape(self.experts, -1, x.shape[1]).mean(1)
        return _scaled(centres - centres.mean(0), x @ (centres - centres.mean(0)).t())


class Contributions:
    """For parts of a block: the linear map that predicts, with least squares, what each part adds to the output.

    What unit ``j`` adds is ``|a_j| |W2[:, j]|`` with ``a`` the activations; a part adds the sum over its units. A ridge of a thousandth
    of the mean square keeps the map small. Sums are in float64.

    Source: the contributions are those of Luo et al., "Sparsing Law", 2024, arXiv:2411.02335, section 3.
    """

    def __init__(self, weights: Mapping[str, Expr], order: Expr, experts: int) -> None:
        self.weights, self.order, self.experts, self.tokens = weights, order, experts, 0

    def begin(self, act: fx.GraphModule, read: Read) -> None:
        self.act = copy.deepcopy(act).eval()
        retarget(self.act, dtype=torch.float32)
        wide = {k: read(e).float() for k, e in self.weights.items() if k != "down_bias"}
        self.norms = wide.pop("down").norm(dim=0)
        self.wide, self.units = wide, read(self.order)
        d = wide["up"].shape[1]
        self.square = torch.zeros(d, d, dtype=torch.float64)
        self.cross = torch.zeros(d, self.experts, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Sums for one batch."""
        roles = [r for r in ("gate", "up") if r in self.wide]
        inner = [torch.nn.functional.linear(x, self.wide[r], self.wide.get(f"{r}_bias")) for r in roles]
        each = self.act(*inner).abs() * self.norms
        parts = each[:, self.units].reshape(len(x), self.experts, -1).sum(-1).double()
        wide = x.double()
        self.square += wide.t() @ wide
        self.cross += wide.t() @ (parts - parts.mean(dim=1, keepdim=True))
        self.tokens += len(x)

    def end(self) -> None:
        self.wide, self.norms, self.weights = {}, self.norms.new_zeros(0), {}

    def router(self) -> Tensor:
        ridge = 1e-3 * self.square.diagonal().mean().clamp(min=1e-12)
        weight = torch.linalg.solve(self.square + ridge * torch.eye(len(self.square), dtype=torch.float64), self.cross).t()
        spread = ((weight @ self.square) * weight).sum(1).mean() / self.tokens  # mean square of a score
        return (weight / spread.sqrt().clamp(min=1e-12)).float()


def _scaled(weight: Tensor, scores: Tensor) -> Tensor:
    return weight / scores.std().clamp(min=1e-6)


def fit(program: Program, op: Resolved, blocks: Mapping[str, tuple[Between, Collector | None]]) -> dict[str, Expr]:
    """The router's weight of every block by its role, in the dtype of the block. Raises S0418 when there are too few tokens."""
    if not blocks or op.study is None:
        return {}
    functions = op.study.tensors.functions
    hooks = {}
    last: list[Collector] = []
    for found, collector in blocks.values():
        assert collector is not None
        hooks[NodeRef(found.graph, found.x.name)] = _hook(collector, found.act, lambda expr: realise(expr, functions=functions), last)
    op.study.observe(program, op.data, outputs=hooks, text="seeing what enters the blocks")
    routers: dict[str, Expr] = {}
    for role, (_, collector) in blocks.items():
        assert collector is not None
        if collector.tokens < collector.experts:
            raise few_tokens(op, role, collector.tokens, collector.experts)
        with one_thread():
            weight = collector.router()
        routers[role] = held(weight.to(getattr(torch, program.info.dtype)))
    return routers


def _hook(collector: Collector, act: fx.GraphModule, read: Read, last: list[Collector]) -> Callable[[Tensor, Tensor | None], None]:
    def see(value: Tensor, keep: Tensor | None) -> None:
        if collector not in last:
            for done in last:
                done.end()
            last[:] = [collector]
            collector.begin(act, read)
        rows = value.reshape(-1, value.shape[-1]) if keep is None else value[keep]
        collector.add(rows.float())

    return see
