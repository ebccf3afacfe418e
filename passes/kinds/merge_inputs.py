"""What a merge statement works on: its models, their factors, and the expressions of each tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from surgery.core.site import Site
from surgery.core.source import NOWHERE, Span
from surgery.model.program import Program
from surgery.model.weights import Expr, select

if TYPE_CHECKING:
    from surgery.passes.kinds.merge import MergeMethod


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
    program: Program | None = field(default=None, compare=False, repr=False)
    """The whole model, of sources that are not the program itself."""

    def expr(self, name: str, base: Mapping[str, Expr]) -> Expr:
        """Its tensor of a name; ``base`` are the program's own."""
        return base[name] if self.own else self.weights[self.aliases.get(name, name)]


@dataclass(frozen=True)
class Inputs:
    """What a merge statement names, in the order written; the method of each layer where its parameters differ by layer, and the factors of
    each layer where the statement gives them by layer."""

    sources: tuple[Source, ...]
    layers: tuple[tuple[Site, MergeMethod], ...] = ()
    factors: tuple[tuple[Site, tuple[float, ...]], ...] = ()


@dataclass(frozen=True)
class Operands:
    """The expressions of one tensor: the program's own, and that of each source in order."""

    base: Expr
    experts: tuple[Expr, ...]


def overlap(base: Expr, experts: Sequence[Expr], rows: int | None) -> Operands:
    """The operands of one tensor, cut to the first ``rows`` rows (None: whole)."""
    if rows is None:
        return Operands(base, tuple(experts))
    return Operands(select(base, 0, ((0, rows),)), tuple(select(e, 0, ((0, rows),)) for e in experts))
