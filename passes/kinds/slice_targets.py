"""What a pruning statement can take units of: for each selected part the dimension classes of its heads, groups, hidden units,
channels or experts, with the parts that share a class together as one decision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from surgery.core.plan import group_roles
from surgery.core.site import Site
from surgery.model.decouple import shared_values
from surgery.model.dims import Dims, Leaf
from surgery.model.dims.algebra import factors
from surgery.model.dims.slices import leaves_at
from surgery.model.program import Program
from surgery.passes.kinds import slice_faults as faults
from surgery.passes.operation import Resolved


@dataclass(frozen=True)
class Units:
    """The units of one part: those of the leaf ``inner``, or of the pair of ``outer`` and ``inner`` where every unit of ``outer``
    must keep as many of ``inner`` (query heads in their key-value groups), with ``same`` the same ones. ``least`` is what must stay,
    ``why`` the reason."""

    inner: Leaf
    outer: Leaf | None = None
    same: bool = False
    least: int = 1
    why: str = ""

    @property
    def key(self) -> tuple[Leaf | None, Leaf]:
        return self.outer, self.inner

    @property
    def step(self) -> int:
        """How many units go together at least: one of each group."""
        return 1 if self.outer is None else self.outer.size

    @property
    def size(self) -> int:
        return self.inner.size * self.step

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return (self.inner,) if self.outer is None else (self.outer, self.inner)


@dataclass
class Target:
    """One decision: ``units`` that the selected ``sites`` share; ``at`` are the numbers of those sites in the statement."""

    units: Units
    sites: list[Site] = field(default_factory=list)
    at: list[int] = field(default_factory=list)

    @property
    def size(self) -> int:
        return self.units.size

    @property
    def name(self) -> str:
        return ", ".join(group_roles([s.role for s in self.sites])[:3]) or "the model"


def collect(found: Sequence[tuple[int, Site, Units]]) -> list[Target]:
    """The parts with equal classes as one target each, in order."""
    targets: dict[tuple[Leaf | None, Leaf], Target] = {}
    for at, site, units in found:
        target = targets.setdefault(units.key, Target(units))
        if units.least > target.units.least:
            target.units = units
        if site.role not in [s.role for s in target.sites]:
            target.sites.append(site)
            target.at.append(at)
    return list(targets.values())


# ---------------------------------------------------------------- from what is selected to blocks


def regions(program: Program, op: Resolved, fits: Callable[[Site], bool], noun: str, what: str) -> list[tuple[int, Site]]:
    """The blocks that the selected sites are or hold, each with the number of the site that named it first.

    Raises S0440 when a selected site is no such block and holds none.
    """
    blocks = [s for s in program.anatomy.sites if s.is_region and fits(s)]
    out: dict[str, tuple[int, Site]] = {}
    without: list[Site] = []
    for at, site in enumerate(op.sites):
        inside = [b for b in blocks if _holds(site, b)] if site.op != "attachment" else []
        if not inside and site.is_region:  # a part that stands for its block, such as the experts of a feed-forward block
            inside = [b for b in blocks if b.role == site.role.rpartition(".")[0]]
        if not inside:
            without.append(site)
        for block in inside:
            out.setdefault(block.role, (at, block))
    if without:
        around = [b.role for b in blocks if any(s.role.startswith(b.role + ".") or s.weight in b.parameters for s in without)]
        raise faults.nothing_there(op, noun, what, [s.role for s in without], group_roles(around), bool(blocks))
    return list(out.values())


def _holds(site: Site, block: Site) -> bool:
    if site.role == block.role or (site.is_region and block.role.startswith(site.role + ".")):
        return True
    named = site.role.startswith('"')  # a raw path: by the modules
    return named and bool(site.path) and (block.path == site.path or block.path.startswith(site.path + "."))


def members(program: Program, region: Site) -> dict[str, Site]:
    """The parametric parts of a block by their last step: ``q``, ``up``, ``router``."""
    return {s.role.rpartition(".")[2]: s for s in program.anatomy.parts.get(region.role, ())}


# ---------------------------------------------------------------- leaves of a site


def out_leaves(program: Program, site: Site) -> dict[Leaf, None]:
    """The leaves of a site's outputs, in order of appearance; of its rows where it is a part of a stored tensor."""
    dims = program.dims
    axis = dims.parameter(program.aliases.get(site.weight, site.weight))[site.out_axis]
    if not site.rows:
        return dict.fromkeys(dims.leaves(axis))
    rows = np.concatenate([np.arange(a, b) for a, b in site.rows])
    return dict.fromkeys(leaves_at(dims, axis, rows))


def in_leaves(program: Program, site: Site) -> dict[Leaf, None]:
    dims = program.dims
    return dict.fromkeys(dims.leaves(dims.parameter(program.aliases.get(site.weight, site.weight))[site.in_axis]))


def best(leaves: Iterable[Leaf]) -> Leaf | None:
    """The leaf to cut when several would do: a free one, then the finest, then the outermost."""
    found = list(leaves)
    return min(found, key=lambda leaf: (not leaf.free, -leaf.size), default=None)


def head_leaves(program: Program, region: Site) -> tuple[Leaf | None, Leaf | None]:
    """The key-value groups and the query heads in each group of an attention block, None where there is one.

    Heads are what queries and the output projection's inputs have in common and what the products of attention run over side by
    side; groups are the part of it that keys or values have, too. A block without grouping has its heads as groups, one with a single
    group (multi-query) has none. Of a block that reads another one's keys and values these are the other's.
    """
    parts = members(program, region)
    lender = region.facts.get("kv_of")
    if lender:
        parts = {**members(program, next(s for s in program.anatomy.sites if s.role == lender)), **parts}
    if region.facts.get("mixer"):
        return mixer_heads(program, region)
    if "q" not in parts or "o" not in parts:
        return None, None
    query, output = out_leaves(program, parts["q"]), in_leaves(program, parts["o"])
    shared: dict[Leaf, None] = {}
    for role in ("k", "v"):
        if role in parts:
            shared |= out_leaves(program, parts[role])
    both = [leaf for leaf in query if leaf in output and "~batch" in leaf.axis.flags]
    groups = best(leaf for leaf in both if leaf in shared)
    return groups, best(leaf for leaf in both if leaf not in shared)


def mixer_heads(program: Program, region: Site) -> tuple[Leaf | None, Leaf | None]:
    """Groups and heads in each group of a mixer, as :func:`head_leaves` gives those of attention.

    What a mixer's last projection takes are heads by their width, the heads grouped where several share what they read and write their
    states with. A mixer of independent channels has no heads.
    """
    parts = members(program, region)
    if "out" not in parts:
        return None, None
    dims, site = program.dims, parts["out"]
    axes = [dims.leaf(f) for f in factors(dims.parameter(program.aliases.get(site.weight, site.weight))[site.in_axis])]
    if None in axes or not 2 <= len(axes) <= 3:
        return None, None
    return axes[0], axes[1] if len(axes) == 3 else None


def hidden_leaf(program: Program, region: Site) -> Leaf | None:
    """The hidden units of a feed-forward block: what its first projection gives and its last takes."""
    parts = members(program, region)
    if "up" not in parts or "down" not in parts:
        return None
    inner = in_leaves(program, parts["down"])
    return best(leaf for leaf in out_leaves(program, parts["up"]) if leaf in inner)


def expert_leaves(program: Program, region: Site) -> tuple[Leaf | None, Leaf | None]:
    """Groups and experts in each group of a feed-forward block whose experts are one stored tensor each. There are groups where the router
    chooses among groups first (DeepSeek-V3, arXiv:2412.19437, section 2.1.2)."""
    down = members(program, region).get("down")
    if down is None or down.op != "experts":
        return None, None
    dims = program.dims
    axes = [dims.leaf(f) for f in factors(dims.parameter(program.aliases.get(down.weight, down.weight))[0])]
    if None in axes or not 1 <= len(axes) <= 2:
        return None, None
    return (axes[0], axes[1]) if len(axes) == 2 else (None, axes[0])


def stream_leaf(program: Program, region: Site) -> Leaf | None:
    """The channels of the stream that a layer adds to: what its last projection or convolution gives."""
    inside = members(program, region)
    written = [s for role, s in inside.items() if role in ("o", "down", "out")]
    if not written:
        written = [s for role, s in inside.items() if role.startswith(("conv[", "proj[")) and s.op in ("conv", "linear")][-1:]
    for site in written:
        found = best(out_leaves(program, site))
        if found is not None:
            return found
    return None


def is_layer(site: Site) -> bool:
    return site.is_region and site.layer is not None and site.role == f"{site.stack}[{site.layer}]"


def paired(program: Program, groups: Leaf, inner: Leaf) -> Units:
    """Query heads in their groups; the same ones of each group where something holds them without their group."""
    keep = np.ones((groups.size, inner.size), bool)
    keep[:, -1] = False
    loose = program.dims.remove({}, ragged={(groups, inner): keep}).refusal if inner.size > 1 else ""
    return Units(inner, groups, same=bool(loose))


def tensors(dims: Dims, target: Target) -> list[str]:
    """The stored tensors that hold the target's units, in graph order."""
    names: dict[str, None] = {}
    for leaf in target.units.leaves:
        names |= dict.fromkeys(name for name, _, _ in dims.holders(leaf))
    return list(names)


def outside(role: str, region: str) -> bool:
    """Whether a block is the held-back region or within it."""
    return role == region or role.startswith((region + ".", region + "["))


def same_everywhere(
    program: Program, op: Resolved, targets: Sequence[Target], fits: Callable[[Site], bool],
    find: Callable[[Program, Site], Units | None], kept: set[str], noun: str, alone: bool = False,
) -> None:  # fmt: skip
    """Raises S0445 when a block outside of the statement, or one that it holds back, has units of a target. ``alone`` says
    that the method could make the blocks independent, where they only share a value."""
    # of heads in groups only the inner class is cut: another block may read the same keys and values and keep its own query heads
    owner = {t.units.inner: t for t in targets}
    own = {s.role for t in targets for s in t.sites}
    others: dict[int, list[str]] = {}
    for site in program.anatomy.sites:
        if not site.is_region or site.role in own or not fits(site):
            continue
        units = find(program, site)
        for leaf in units.leaves if units is not None else ():
            if leaf in owner:
                roles = others.setdefault(targets.index(owner[leaf]), [])
                if site.role not in roles:
                    roles.append(site.role)
    for number, roles in others.items():
        target = targets[number]
        apart = alone and any(shared_values(program, leaf) for leaf in target.units.leaves)
        raise faults.half_selected(op, program, noun, target, roles, tensors(program.dims, target), bool(kept & set(roles)), apart)
