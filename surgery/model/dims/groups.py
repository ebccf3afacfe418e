"""What the analysis hands out: leaves, and the groups of everything that goes together with units of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from surgery.model.dims.algebra import Axis
from surgery.model.dims.constants import Constant
from surgery.model.dims.masks import Keep, Ranges


@dataclass(frozen=True, repr=False)
class Leaf:
    """A class of units that live and go together.

    ``name`` is unique in the analysis and the same in every run; ``letter`` is its short form. ``flags``: ``norm`` (a normaliser's
    statistics run over it), ``softmax``, ``topk``, ``sort``, ``scan``, ``reduce:*``, ``indexed``, ``contract``, ``input``,
    ``output`` (part of the model's interface), ``state`` (an axis of a cache
    that the model takes, extends and returns), ``default_scale`` (an attention scale derived from it). ``frozen`` says why it
    cannot be cut (None: it can), ``node`` the place that decided so.
    """

    axis: Axis = field(repr=False)
    size: int = field(compare=False)
    flags: frozenset[str] = field(compare=False)
    frozen: str | None = field(compare=False)
    node: fx.Node | None = field(repr=False, compare=False)
    _names: Callable[[Axis], tuple[str, str]] = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        return self._names(self.axis)[0]

    @property
    def letter(self) -> str:
        return self._names(self.axis)[1]

    def __repr__(self) -> str:
        return f"Leaf({self.name}, size={self.size}, flags={sorted(self.flags)}, frozen={self.frozen!r})"

    @property
    def free(self) -> bool:
        return self.frozen is None

    @property
    def reason(self) -> str:
        """Why the class is fixed, with the operation and the layer that it is in."""
        if self.frozen is None or self.node is None:
            return self.frozen or ""
        graph = getattr(self.node.meta.get("origin"), "graph", "")
        return f"{self.frozen} (at {self.node.name}{' of ' + graph if graph else ''})"


@dataclass(frozen=True)
class Member:
    """One stored axis that a cut changes: the ranges that go and those that stay, in its present numbering."""

    parameter: str
    axis: int
    removed: Ranges
    kept: Ranges


@dataclass(frozen=True)
class Change:
    """A constant that a cut changes. ``value`` is new; for a symbolic entry ``ratio`` (numerator, denominator) multiplies it."""

    node: fx.Node
    path: tuple[Any, ...]
    kind: str
    value: Any
    ratio: tuple[int, int]
    site: Constant = field(repr=False)


@dataclass(frozen=True)
class Group:
    """Everything that goes with some units: ``root`` names the leaves and units, ``refusal`` why it must not be done ("": it may)."""

    root: tuple[tuple[Leaf, tuple[int, ...]], ...]
    members: tuple[Member, ...]
    constants: tuple[Change, ...]
    flags: frozenset[str]
    refusal: str
    keep: Keep = field(repr=False)
    dims: Any = field(repr=False, compare=False)
    """The analysis that made the group: what it says of nodes and axes holds for the program that was analysed."""

    def __str__(self) -> str:
        head = ", ".join(f"{leaf.name}[{_units(units)}] of {leaf.size}" for leaf, units in self.root)
        lines = [f"cut {head}" + (f" refused: {self.refusal}" if self.refusal else "")]
        for m in self.members:
            lines.append(f"  {m.parameter} axis {m.axis}: -{spans(m.removed)}")
        for c in self.constants:
            lines.append(f"  {c.node.name} {'.'.join(map(str, c.path))}: {c.value}")
        return "\n".join(lines)


def spans(ranges: Ranges) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in ranges) + "]"


def _units(units: Sequence[int]) -> str:
    return ", ".join(map(str, units))
