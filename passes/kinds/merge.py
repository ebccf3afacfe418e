"""Kind ``merge``: several checkpoints of one architecture become one, tensor by tensor.

A method states what becomes of one tensor; this module finds the tensors, checks that the checkpoints fit each other and writes one
lazy expression for each. Nothing is read while the spec is walked (a method that ranks over a whole model reads in ``prepare``, when
weights may be read); at emission one tensor of each model is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.diagnostics import Sink, fail
from surgery.core.method import Method
from surgery.core.site import Site
from surgery.core.source import NOWHERE, Span
from surgery.model.program import Program
from surgery.model.weights import Apply, Expr, cast, is_float
from surgery.passes.kinds import attach
from surgery.passes.kinds.merge_math import Delta, Sparsifier, add_up, chunks, delta_of, elect, keep_all
from surgery.passes.operation import Resolved, SiteChange


@dataclass(frozen=True)
class Source:
    """One model of a merge: its weights by the names of the program, its tied names, and its factor."""

    name: str
    weights: Mapping[str, Expr]
    aliases: Mapping[str, str]
    weight: float = 1.0
    own: bool = False
    """Whether it is the program itself as the lines above left it."""
    span: Span = NOWHERE


@dataclass(frozen=True)
class Inputs:
    """What a merge statement names, in the order written, and the method of each layer where its parameters differ by layer."""

    sources: tuple[Source, ...]
    layers: tuple[tuple[Site, MergeMethod], ...] = ()


@dataclass(frozen=True)
class MergeMethod(Method):
    """Base of the methods that merge checkpoints. ``models`` is how many may be named (fewest, most)."""

    kind: ClassVar[str] = "merge"
    fold_class: ClassVar[str] = "merge"
    identity: ClassVar[str] = "changed"
    places: ClassVar[tuple[str, ...]] = ()
    needs_sites: ClassVar[bool] = False
    models: ClassVar[tuple[int, int | None]] = (1, None)

    def check(self, weights: Sequence[float]) -> str:
        """Why these factors do not go with the method, or an empty text."""
        return ""

    def prepare(self, program: Program, op: Resolved, names: Sequence[str], sources: Sequence[Source]) -> dict[str, tuple[Any, ...]]:
        """Facts of the whole model that a tensor's merge needs, by tensor name (``prepared`` of :meth:`merge`); reads through ``op.study``."""
        return {}

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        """The merged tensor, in float32 or in the dtype of ``base``; all tensors have one shape."""
        raise NotImplementedError


@dataclass(frozen=True)
class TaskMethod(MergeMethod):
    """Base of the methods on task vectors, ``theta_0 + scale * fuse(sparsify(theta_i - theta_0))``: ``theta_0`` is the model as the lines
    above left it."""

    def sparsify(self, delta: Delta, shape: Sequence[int], model: int, seed: int, prepared: tuple[Any, ...]) -> Sparsifier:
        """What becomes of the task vector of model number ``model``."""
        return keep_all

    def fuse(self, parts: Sequence[Tensor], weights: Sequence[float], prepared: tuple[Any, ...]) -> Tensor:
        """One change from the sparsified ones."""
        return add_up(parts, weights)

    def merge(self, base: Tensor, experts: Sequence[Tensor], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        deltas = [delta_of(e, base) for e in experts]
        cleaners = [
            self.sparsify(d, tuple(base.shape), i, attach.seed_of(seed, str(i)), prepared) for i, d in enumerate(deltas)
        ]  # fmt: skip
        scale = float(getattr(self, "scale", 1.0))
        out, flat = torch.empty_like(base), base.reshape(-1)
        into = out.view(-1)
        for at in chunks(base.shape):
            parts = [clean(d(at), at) for clean, d in zip(cleaners, deltas, strict=True)]
            change = self.fuse(parts, weights, prepared)
            into[at] = flat[at].to(torch.float32).add(change, alpha=scale)
        return out


@dataclass(frozen=True)
class Election:
    """How sign election is done; see :func:`surgery.passes.kinds.merge_math.elect`."""

    weighted: bool
    by_weight: bool

    def fuse(self, parts: Sequence[Tensor], weights: Sequence[float], zero: float = 1.0) -> Tensor:
        return elect(parts, weights, weighted=self.weighted, by_weight=self.by_weight, zero=zero)


def merged(cls: type[MergeMethod], base: Tensor, *experts: Tensor, weights: Any, seed: int, prepared: Any = (), **params: Any) -> Tensor:
    """The function ``merge/NAME:merged`` of expressions, in the dtype of ``base``."""
    method = cls(**params)
    made = method.merge(base.contiguous(), [e.contiguous() for e in experts], list(weights), seed, tuple(prepared))
    return made.to(base.dtype)


# ------------------------------------------------------------------ the pass


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Writes the merge's expressions. ``op.data`` holds the :class:`Inputs`.

    Raises S0774 (models that do not fit each other), S0775 (factors), S0776 (number of models).
    """
    assert isinstance(op.data, Inputs)
    sources = op.data.sources
    method = op.method
    assert isinstance(method, MergeMethod)
    fewest, most = method.models
    if len(sources) < fewest or (most is not None and len(sources) > most):
        wanted = f"{fewest}" if most == fewest else f"at least {fewest}" if most is None else f"{fewest} to {most}"
        raise fail(
            "S0776", f"merge {op.name} takes {wanted} models, {len(sources)} are named", op.origin.span, "named here",
            help="name them behind `of`; the model of the spec is the base and need not be named",
        )  # fmt: skip
    weights = [s.weight for s in sources]
    if why := method.check(weights):
        raise fail("S0775", f"merge {op.name}: {why}", op.origin.span, "these factors", help="change the factors behind `of`")
    names = _chosen(program, op.sites)
    _compatible(program, names, sources, op)
    by_layer = {program.aliases.get(n, n): m for site, m in op.data.layers for n in site.parameters}
    methods = {name: by_layer.get(name, method) for name in names}
    prepared = method.prepare(program, op, names, sources)
    changes: list[SiteChange] = []
    base = {name: program.weights[name] for name in names}
    for name in names:
        own = methods[name]
        params = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in own.params().items() if k != "seed")
        more = (("weights", tuple(weights)), ("seed", attach.seed_of(op.seed, op.name, name)))
        ready = (("prepared", prepared[name]),) if name in prepared else ()
        args = (base[name], *(cast(_of(s, name, base), base[name].dtype) for s in sources))
        program.weights[name] = Apply(base[name].shape, base[name].dtype, f"merge/{own.name}:merged", args, (*params, *more, *ready))
        program.journal.record(name, op.origin)
    per_site = _sites(program, op.sites)
    for site, inside in per_site:
        there = [n for n in inside if n in base]
        if there:
            changes.append(SiteChange(site, "", note=f"{len(there)} tensor{'' if len(there) == 1 else 's'} merged"))
    return changes


def _of(source: Source, name: str, base: Mapping[str, Expr]) -> Expr:
    return base[name] if source.own else source.weights[source.aliases.get(name, name)]


def _chosen(program: Program, sites: Sequence[Site]) -> list[str]:
    """The floating parameters (tied ones once) and stored floating buffers of the sites; of the whole model without sites."""
    wanted: set[str] | None = None
    if sites:
        wanted = {program.aliases.get(n, n) for s in sites for n in (s.weight, s.bias, *s.parameters) if n}
    added = {t for a in program.attachments for t in a.tensors}
    floating = [n for n in attach.base_parameters(program) if is_float(program.weights[n].dtype)]
    buffers = {
        program.aliases.get(n, n)
        for n, b in program.graph.named_buffers()
        if b.is_floating_point() and n.endswith(("running_mean", "running_var"))
    }
    names = [*floating, *(n for n in program.weights if n in buffers)]
    return [n for n in names if n not in added and (wanted is None or n in wanted)]


def _compatible(program: Program, names: Sequence[str], sources: Sequence[Source], op: Resolved) -> None:
    """Every source has every tensor in the program's shape, and ties what the program ties."""
    sink = Sink()
    for source in sources:
        if source.own:
            continue
        span = source.span if source.span.end else op.origin.span
        missing = [n for n in names if source.aliases.get(n, n) not in source.weights]
        if missing:
            sink.error(
                "S0774", f"{source.name} has no `{missing[0]}`" + (f" and {len(missing) - 1} tensors more" if len(missing) > 1 else ""), span,
                "merged here", help="merge checkpoints of one architecture, before the lines that change its structure",
            )  # fmt: skip
            continue
        other = [(n, source.weights[source.aliases.get(n, n)].shape, program.weights[n].shape) for n in names]
        wrong = [o for o in other if o[1] != o[2]]
        if wrong:
            name, theirs, ours = wrong[0]
            more = f"; {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
            sink.error(
                "S0774", f"`{name}` is {list(theirs)} in {source.name} and {list(ours)} here{more}", span, "merged here",
                help="merge checkpoints of one shape and vocabulary, before the lines that change the structure",
            )  # fmt: skip
            continue
        for alias, first in program.aliases.items():
            if first in names and alias in source.weights and source.weights[alias].identity != source.weights[first].identity:
                sink.error(
                    "S0774", f"`{alias}` and `{first}` are one tensor here and two in {source.name}", span, "merged here",
                    help="merge checkpoints that both tie or both do not tie their embeddings",
                )  # fmt: skip
                break
    sink.raise_if_failed()


def _sites(program: Program, sites: Sequence[Site]) -> list[tuple[str, list[str]]]:
    if not sites:
        return [("", list(program.weights))]
    return [(s.role, [program.aliases.get(n, n) for n in (s.weight, s.bias, *s.parameters) if n]) for s in sites]
