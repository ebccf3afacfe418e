"""Kind ``merge``: several checkpoints of one architecture become one, tensor by tensor.

A method states what becomes of one tensor; this module finds the tensors, checks that the checkpoints fit each other (``merge_fit``) and writes
one lazy expression for each. Nothing is read while the spec is walked (a method that ranks over a whole model or looks for permutations reads in
``prepare`` and ``align``, when weights may be read); at emission a few tensors of each model are in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.core.method import Method, param
from surgery.core.site import Site
from surgery.model.flows import Parts, by_parts, gathered
from surgery.model.pieces import Operand, Pieces, by_pieces, whole
from surgery.model.program import Program
from surgery.model.weights import Apply, Update, is_float
from surgery.passes.kinds import attach
from surgery.passes.kinds.merge_finite import NotFinite, beyond, finite, is_finite, watched
from surgery.passes.kinds.merge_fit import compatible, mixed
from surgery.passes.kinds.merge_inputs import Inputs, Operands, Source, overlap
from surgery.passes.kinds.merge_math import Delta, Measured, Sparsifier, Wide, add_up, chunks, delta_of, keep_all
from surgery.passes.operation import Resolved, SiteChange


@dataclass(frozen=True)
class MergeMethod(Method):
    """Base of the methods that merge checkpoints. ``models`` is how many may be named (fewest, most); ``reads_base`` whether the program's own
    tensors enter where it is not named itself."""

    kind: ClassVar[str] = "merge"
    fold_class: ClassVar[str] = "merge"
    identity: ClassVar[str] = "changed"
    places: ClassVar[tuple[str, ...]] = ()
    needs_sites: ClassVar[bool] = False
    models: ClassVar[tuple[int, int | None]] = (1, None)
    reads_base: ClassVar[bool] = True
    spreads: ClassVar[bool] = False
    """Whether a NaN or infinite element of any model makes one of the result, so that looking at the result is enough."""
    watches: ClassVar[bool] = False
    """Whether :meth:`merge` itself looks at all that it reads for NaN and infinite elements."""
    by_pieces: ClassVar[bool] = False
    """Whether :meth:`merge` goes through its tensors chunk by chunk, so that stored ones need not be in memory."""
    adapters: ClassVar[str] = ""
    """What the method does with adapters, if it merges those (see :mod:`surgery.passes.kinds.adapter`)."""
    checkpoints: ClassVar[bool] = True
    """Whether it merges checkpoints."""

    weights: tuple[Any, ...] | None = param(
        None,
        "factors by layer in place of those behind `of`: for each model a number, a list, a table or a ramp",
        unit="by layer",
        last=True,
    )
    vocab: Literal["same", "common"] = param(
        "same", "whether checkpoints of another vocabulary are refused, or merged in the rows that all have", last=True
    )

    def check(self, weights: Sequence[float]) -> str:
        """Why these factors do not go with the method, or an empty text."""
        return ""

    def align(
        self, program: Program, op: Resolved, names: Sequence[str], operands: Mapping[str, Operands], sources: Sequence[Source]
    ) -> Mapping[str, Operands]:
        """The operands after a change that keeps what each model computes; reads through ``op.study``, says nothing while planning."""
        return operands

    @classmethod
    def together(cls, methods: Sequence[Any]) -> str:
        """Why the parameters that the layers of a statement have do not go together, or an empty text."""
        return ""

    def prepare(
        self, op: Resolved, operands: Mapping[str, Operands], sources: Sequence[Source], factors: Mapping[str, Sequence[float]]
    ) -> dict[str, tuple[Any, ...]]:
        """Facts of the whole model that a tensor's merge needs, by tensor name (``prepared`` of :meth:`merge`); reads through ``op.study``.
        ``factors`` are those of tensors whose factors are not the sources' own."""
        return {}

    def merge(self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        """The merged tensor, in float32 or in the dtype of ``base``; all tensors have one shape. Without ``reads_base`` only shape and dtype of
        ``base`` mean something. With ``by_pieces`` any of them may be :class:`~surgery.model.pieces.Pieces`, and with ``watches`` it raises
        NotFinite."""
        raise NotImplementedError

    def parts(
        self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]
    ) -> Parts | None:
        """What :meth:`merge` gives, in flat order and in parts that are not rounded yet; None where it has to be made whole."""
        return None


@dataclass(frozen=True)
class TaskMethod(MergeMethod):
    """Base of the methods on task vectors, ``theta_0 + scale * fuse(sparsify(theta_i - theta_0))``: ``theta_0`` is the model as the lines
    above left it."""

    watches: ClassVar[bool] = True
    by_pieces: ClassVar[bool] = True

    @classmethod
    def together(cls, methods: Sequence[Any]) -> str:
        if all(getattr(m, "density", 1) == 0 for m in methods):
            return "`density = 0%` keeps nothing of any model, so that nothing would be merged"
        return ""

    def sparsify(self, delta: Delta, shape: Sequence[int], model: int, seed: int, prepared: tuple[Any, ...]) -> Sparsifier:
        """What becomes of the task vector of model number ``model``."""
        return keep_all

    def fuse(self, parts: Sequence[Tensor], weights: Sequence[float], prepared: tuple[Any, ...]) -> Tensor:
        """One change from the sparsified ones; the parts may be used up."""
        return add_up(parts, weights, reuse=True)

    def merge(self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Tensor:
        return gathered(self._chunks(base, experts, weights, seed, prepared), base.shape, base.dtype)

    def parts(
        self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]
    ) -> Parts | None:
        own = type(self).merge is TaskMethod.merge
        return self._chunks(base, experts, weights, seed, prepared) if own else None

    def _chunks(self, base: Operand, experts: Sequence[Operand], weights: Sequence[float], seed: int, prepared: tuple[Any, ...]) -> Parts:
        start = Wide(base)
        deltas = [delta_of(e, start) for e in experts]
        cleaners = [
            self.sparsify(d, tuple(base.shape), i, attach.seed_of(seed, str(i)), prepared) for i, d in enumerate(deltas)
        ]  # fmt: skip
        measured = [(clean, d) for clean, d in zip(cleaners, deltas, strict=True) if isinstance(clean, Measured)]
        if measured:
            for at in chunks(base.shape):
                for clean, d in measured:
                    clean.measure(d(at), at)
            for clean, _ in measured:
                clean.settle()
        scale = float(getattr(self, "scale", 1.0))
        for at in chunks(base.shape):
            parts = [clean(watched(d(at)), at) for clean, d in zip(cleaners, deltas, strict=True)]
            change = self.fuse(parts, weights, prepared)
            if scale != 1:
                change.mul_(scale)
            yield change.add_(start(at))


def _given(cls: type[MergeMethod], tensors: Sequence[Operand], dtype: str) -> list[Operand]:
    """What a method is given: the base and one of each model."""
    given: list[Operand] = [t if isinstance(t, Pieces) and cls.by_pieces else whole(t).contiguous() for t in tensors]
    if not cls.reads_base and dtype:
        given.insert(0, torch.empty(given[0].shape, dtype=getattr(torch, dtype)))
    return given


def _parts(
    cls: type[MergeMethod], *tensors: Operand, weights: Any, seed: int, prepared: Any = (), tensor: str = "", of: Sequence[str] = (),
    dtype: str = "", **params: Any,
) -> Parts | None:  # fmt: skip
    """What :func:`merged` gives, in parts; what is not finite is found as the parts come, and told by :func:`merged`."""
    given = _given(cls, tensors, dtype)
    parts = cls(**params).parts(given[0], given[1:], list(weights), seed, tuple(prepared))
    if parts is None:
        return None
    if not cls.spreads and not cls.watches:
        _all_finite(list(zip(given[len(given) - len(tensors) :], of, strict=False)), tensor)

    def tell() -> None:
        merged(cls, *tensors, weights=weights, seed=seed, prepared=prepared, tensor=tensor, of=of, dtype=dtype, **params)

    return _looked_at(parts, given[0].dtype, tell) if of else parts


def _looked_at(parts: Parts, dtype: torch.dtype, tell: Callable[[], None]) -> Parts:
    """Parts rounded to ``dtype``; calls ``tell``, which raises, where one is not finite then."""
    place = torch.empty(0, dtype=dtype)
    try:
        for part in parts:
            if place.numel() < part.numel():
                place = torch.empty(part.numel(), dtype=dtype)
            rounded = place[: part.numel()].copy_(part.view(-1))
            if not is_finite(rounded):
                raise NotFinite
            yield rounded
    except NotFinite:
        tell()
        raise


@by_pieces
@by_parts(_parts)
def merged(
    cls: type[MergeMethod], *tensors: Operand, weights: Any, seed: int, prepared: Any = (), tensor: str = "", of: Sequence[str] = (),
    dtype: str = "", **params: Any,
) -> Tensor:  # fmt: skip
    """The function ``merge/NAME:merged`` of expressions. ``tensors`` are the base's, where the method reads it, and one of each model.

    ``tensor`` and ``of`` are the names of the tensor and of its models, for messages, ``dtype`` that of the result where there is no base.
    Raises S0798 for NaN or infinite elements.
    """
    method = cls(**params)
    given = _given(cls, tensors, dtype)
    sources = list(zip(given[len(given) - len(tensors) :], of, strict=False))
    if not cls.spreads and not cls.watches:
        _all_finite(sources, tensor)
    try:
        made = method.merge(given[0], given[1:], list(weights), seed, tuple(prepared)).to(given[0].dtype)
    except NotFinite:
        _all_finite(sources, tensor)
        raise beyond(tensor, dtype or given[0].dtype) from None
    if of and not is_finite(made):
        _all_finite(sources, tensor)
        finite(made, tensor, "")
    return made


def _all_finite(sources: Sequence[tuple[Operand, str]], tensor: str) -> None:
    for value, who in sources:
        finite(value, tensor, who)


# ------------------------------------------------------------------ the pass


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Writes the merge's expressions. ``op.data`` holds the :class:`Inputs`.

    Raises S0774 (shapes), S0775 (factors), S0776 (number of models), S0778 (vocabularies), S0796 (ties), S0797 (missing tensors).
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
    weights_of = {program.aliases.get(n, n): w for site, w in op.data.factors for n in site.parameters}
    outside = op.data.factors[0][1] if op.data.factors else tuple(s.weight for s in sources)
    for weights in dict.fromkeys([outside, *weights_of.values()]):
        if why := method.check(weights):
            shown = f" ({', '.join(f'{w:g}' for w in weights)})" if op.data.factors else ""
            raise fail("S0775", f"merge {op.name}: {why}{shown}", op.origin.span, "these factors", help="change the factors behind `of`")
    names = _chosen(program, op.sites)
    rows = compatible(program, names, sources, op, method.vocab == "common")
    base = {name: program.weights[name] for name in names}
    operands: Mapping[str, Operands] = {n: overlap(base[n], [s.expr(n, base) for s in sources], rows.get(n)) for n in names}
    for line in mixed(program, operands, sources):
        op.tell(line)
    operands = method.align(program, op, names, operands, sources)
    by_layer = {program.aliases.get(n, n): m for site, m in op.data.layers for n in site.parameters}
    prepared = method.prepare(op, operands, sources, {n: weights_of.get(n, outside) for n in names} if op.data.factors else {})
    for name in names:
        own = by_layer.get(name, method)
        params = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in own.params().items() if k not in NOT_PASSED)
        of = (*(("the model",) if own.reads_base else ()), *(s.name for s in sources))
        more: tuple[tuple[str, Any], ...] = (
            ("weights", weights_of.get(name, outside)), ("seed", attach.seed_of(op.seed, op.name, name)), ("tensor", name), ("of", of),
        )  # fmt: skip
        ready = (("prepared", prepared[name]),) if name in prepared else ()
        kind = () if own.reads_base else (("dtype", base[name].dtype),)
        mine = operands[name]
        args = (mine.base, *mine.experts) if own.reads_base else mine.experts
        made = Apply(mine.base.shape, base[name].dtype, f"merge/{own.name}:merged", args, (*params, *more, *ready, *kind))
        program.weights[name] = (
            made if name not in rows else Update(base[name].shape, base[name].dtype, base[name], made, 0, ((0, rows[name]),))
        )
        program.journal.record(name, op.origin)
    changes: list[SiteChange] = []
    for site, inside in _sites(program, op.sites):
        there = [n for n in inside if n in base]
        if there:
            changes.append(SiteChange(site, "", note=f"{len(there)} tensor{'' if len(there) == 1 else 's'} merged"))
    return changes


NOT_PASSED = ("seed", "weights", "vocab")
"""Parameters that the pass itself acts on."""


def _chosen(program: Program, sites: Sequence[Site]) -> list[str]:
    """The floating parameters (tied ones once) and stored floating buffers of the sites; of the whole model without sites."""
    wanted: set[str] | None = None
    if sites:
        wanted = {program.aliases.get(n, n) for s in sites for n in (s.weight, s.bias, *s.parameters) if n}
    added = {t for a in program.attachments for t in a.tensors}
    floating = [n for n in attach.base_parameters(program) if is_float(program.weights[n].dtype)]
    held = {
        program.aliases.get(n, n)
        for n, b in program.graph.named_buffers()
        if b.is_floating_point() and n.endswith(("running_mean", "running_var"))
    }
    names = [*floating, *(n for n in program.weights if n in held)]
    return [n for n in names if n not in added and (wanted is None or n in wanted)]


def _sites(program: Program, sites: Sequence[Site]) -> list[tuple[str, list[str]]]:
    if not sites:
        return [("", list(program.weights))]
    return [(s.role, [program.aliases.get(n, n) for n in (s.weight, s.bias, *s.parameters) if n]) for s in sites]
