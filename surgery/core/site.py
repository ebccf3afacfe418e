"""Sites: the parts of a model that a selector can name, found from the graph's dataflow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple


class NodeRef(NamedTuple):
    """A node of the program's graph tree: the path of the GraphModule that holds it ("" is the root) and its name."""

    graph: str
    node: str


Measure = tuple[str, int, tuple[int, ...]]
"""A size as the product of dimension classes: a tensor, one of its axes, and which of this axis's classes, by position."""


@dataclass(frozen=True)
class Site:
    """One part of the model under one role.

    ``role`` is the full selector that names exactly this site (``layers[3].attn.q``). ``op`` says what it is:
    ``linear``, ``conv1d`` (a linear stored transposed, ``[in, out]``), ``conv``, ``embedding``, ``experts`` (a 3-D tensor
    ``[experts, ., .]``), ``norm``, ``bias`` (a table added to scores), ``param`` (any other parameter) or ``region``
    (a layer, an attention block, a feed-forward block, a stack).

    For a parametric site ``weight`` and ``bias`` are parameter names in the program's weights, ``out_axis``/``in_axis`` the
    axes of the stored weight, ``rows`` half-open ranges on ``out_axis`` when the site is a slice of the stored tensor (empty:
    the whole tensor) and ``shape`` the logical ``(out, in)`` of the site, kernel sizes following for convolutions and the
    number of experts in front for expert tensors. For a region, ``parameters`` are all parameter names inside,
    ``input`` the value that enters it and ``output`` the value that leaves it (of a sublayer: before the residual addition,
    after its dropout if it has one; ``norm_output`` is the value after the following norm for post-norm blocks, else None).
    """

    role: str
    op: str
    path: str
    weight: str = ""
    bias: str = ""
    rows: tuple[tuple[int, int], ...] = ()
    out_axis: int = 0
    in_axis: int = 1
    shape: tuple[int, ...] = ()
    dtype: str = ""
    stack: str = ""
    layer: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    tied_to: str = ""
    parameters: tuple[str, ...] = ()
    calls: tuple[NodeRef, ...] = ()
    input: NodeRef | None = None
    output: NodeRef | None = None
    residual: NodeRef | None = None
    norm_output: NodeRef | None = None
    facts: dict[str, object] = field(default_factory=dict, compare=False, hash=False)
    """Further facts for passes and ``show``: activation, causal, cross, kv_of (the block whose keys and values are read), stride, groups,
    experts, top_k, gated ..."""

    @property
    def is_region(self) -> bool:
        return self.op == "region"


@dataclass(frozen=True)
class Unresolved:
    """A part that the analysis could not give a role; ``show`` lists it."""

    path: str
    why: str


@dataclass(frozen=True)
class Stack:
    """Repeated layers: ``name`` is how a selector spells it (``layers``, ``encoder.layers``, ``stages[0].layers``)."""

    name: str
    layers: int
    path: str = ""


class Late(Sequence[Site]):
    """Sites that are found when somebody first asks for them."""

    def __init__(self, find: Callable[[], Sequence[Site]]) -> None:
        self._find = find

    @cached_property
    def _found(self) -> tuple[Site, ...]:
        return tuple(self._find())

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, at: Any) -> Any:
        return self._found[at]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._found == tuple(other)

    def __hash__(self) -> int:
        return hash(self._found)


@dataclass(frozen=True)
class Anatomy:
    """All sites of a program in model order, its stacks, and what has no role.

    ``modules`` are sites of whole modules and bare parameters whatever their role, for selectors that are raw paths: the role
    of each is its path in quotes.
    """

    sites: tuple[Site, ...]
    stacks: tuple[Stack, ...]
    unresolved: tuple[Unresolved, ...] = ()
    modules: Sequence[Site] = ()
    measures: dict[str, dict[str, Measure]] = field(default_factory=dict, compare=False, repr=False)
    """For each attention block, by role, where its numbers of heads and its widths are found in a stored tensor."""

    @cached_property
    def parts(self) -> dict[str, list[Site]]:
        """The sites of stored tensors below each region and group of roles, in model order, by the role above them."""
        found: dict[str, list[Site]] = {}
        for site in self.sites:
            if site.is_region or not site.weight:
                continue
            at = site.role.find(".")
            while at >= 0:
                found.setdefault(site.role[:at], []).append(site)
                at = site.role.find(".", at + 1)
        return found
