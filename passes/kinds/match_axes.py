"""Which units of a model can change places without changing what it computes: permutations of dimension classes.

Units of a plain class (hidden units, channels, the residual stream) change places wherever the class occurs. Heads change places with all that
belongs to them; inside a head the columns of values and outputs, and where no rotary embedding couples them the rows of queries and keys,
have an order of their own for each head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import fx

from surgery.core.plan import group_roles
from surgery.core.site import Site
from surgery.model.dims import Axis, Leaf
from surgery.model.dims.algebra import CAT, LEAF, factors, find
from surgery.model.program import Program
from surgery.passes.kinds.drop_signature import leaves as signature_leaves
from surgery.passes.kinds.slice_targets import head_leaves, hidden_leaf, in_leaves, is_layer, members, out_leaves, stream_leaf

AXES = ("width", "heads", "head_dim", "ffn", "channels")
"""Words of the language, in the order in which the first sweep goes through them: what is anchored in embeddings first."""

Table = np.ndarray


@dataclass(eq=False)
class Plain:
    """The units of one class with their present order: unit ``i`` of the result is unit ``order[i]`` of the model that is moved."""

    what: str
    roles: list[str]
    leaf: Leaf
    order: Table = field(init=False)

    def __post_init__(self) -> None:
        self.order = np.arange(self.leaf.size)

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return (self.leaf,)

    @property
    def moved(self) -> int:
        return int((self.order != np.arange(self.leaf.size)).sum())


@dataclass(eq=False)
class Heads:
    """Heads in their key-value groups: ``groups`` change places whole, ``inner`` are the query heads of each group, ``value`` and ``key`` the
    columns of a head for values and for keys (None: their order is fixed). Tables have a row for each group of the result."""

    role: str
    parts: dict[str, Site]
    per_group: int
    groups: Leaf
    inner: Leaf | None
    value: Leaf | None
    key: Leaf | None
    order: Table = field(init=False)
    tables: dict[Leaf, Table] = field(init=False)

    def __post_init__(self) -> None:
        self.order = np.arange(self.groups.size)
        self.tables = {
            leaf: np.tile(np.arange(leaf.size), (self.groups.size, 1)) for leaf in (self.inner, self.value, self.key) if leaf is not None
        }

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return (self.groups, *self.tables)

    @property
    def moved(self) -> int:
        rows = self.order != np.arange(len(self.order))
        for leaf, table in self.tables.items():
            rows = rows | (table != np.arange(leaf.size)).any(axis=1)
        return int(rows.sum())


Unit = Plain | Heads


@dataclass
class Found:
    """The units that may move, and for what may not the reason by word of the language."""

    units: list[Unit]
    fixed: list[str]


def find_units(program: Program, names: Iterable[str], wanted: Sequence[str]) -> Found:
    """The units of the axes ``wanted``. ``names`` are the tensors that are merged: a class that is in any other stays."""
    return _Search(program, set(names), wanted).run()


class _Search:
    def __init__(self, program: Program, names: set[str], wanted: Sequence[str]) -> None:
        self.program, self.names, self.wanted = program, names, wanted
        self.dims = program.dims
        self.taken: set[Leaf] = set()
        self.reasons: dict[tuple[str, str], list[str]] = {}
        self.given = self._given()

    def _given(self) -> set[Leaf]:
        """Classes of the model's outputs (its cache aside): whoever reads them counts on their order."""
        found: set[Leaf] = set()
        kinds = signature_leaves(self.program.signature.out_spec)
        for node in self.dims.graph.nodes:
            if node.op != "output":
                continue
            values = node.args[0] if isinstance(node.args[0], tuple | list) else [node.args[0]]
            for value, kind in zip(values, kinds, strict=True):
                axes = self.dims.axes(value) if isinstance(value, fx.Node) and kind.kind != "cache" else None
                for axis in axes or ():
                    found.update(self.dims.leaves(axis))
        return found

    def run(self) -> Found:
        units: list[Unit] = []
        regions = [s for s in self.program.anatomy.sites if s.is_region]
        if "width" in self.wanted:
            units += self._plain("width", [(s, stream_leaf(self.program, s)) for s in regions if is_layer(s)])
        blocks = [s for s in regions if re.fullmatch(r"(attn|cross|ffn)(\[\d+\])?", s.role.rpartition(".")[2])]
        for site in blocks if {"heads", "head_dim"} & set(self.wanted) else ():
            found = self._heads(site)
            if found is not None:
                units.append(found)
        if "ffn" in self.wanted:
            units += self._plain("ffn", [(s, hidden_leaf(self.program, s)) for s in blocks])
        if "channels" in self.wanted:
            known = self.taken | {leaf for s in regions for leaf in self._of_blocks(s)}
            units += self._plain("channels", [(None, leaf) for leaf in self.dims.all_leaves() if leaf not in known and self._between(leaf)])
        fixed = [f"{what} of {', '.join(group_roles(roles)[:3])} stay: {why}" for (what, why), roles in self.reasons.items()]
        return Found(units, fixed)

    def _of_blocks(self, site: Site) -> list[Leaf]:
        """Classes that another word of the language speaks of, wanted or not."""
        found: list[Leaf | None] = [hidden_leaf(self.program, site), *head_leaves(self.program, site)]
        if is_layer(site):
            found.append(stream_leaf(self.program, site))
        parts = members(self.program, site)
        for role in ("q", "k", "v"):
            found += out_leaves(self.program, parts[role]) if role in parts else ()
        return [leaf for leaf in found if leaf is not None]

    def _why(self, leaf: Leaf) -> str:
        """Why the units of a class cannot change places; empty where they can."""
        if not leaf.free:
            return leaf.reason
        if leaf in self.given:
            return "they are in the model's output"
        other = sorted(n for n, _, _ in self.dims.holders(leaf) if self.program.aliases.get(n, n) not in self.names)
        return f"they are counted in {other[0]}, too" if other else ""

    def _plain(self, what: str, found: Sequence[tuple[Site | None, Leaf | None]]) -> list[Unit]:
        units: dict[Leaf, Plain] = {}
        for site, leaf in found:
            role = site.role if site is not None else ""
            if leaf is None or leaf.size < 2:
                continue
            if leaf in units:
                units[leaf].roles.append(role)
                continue
            if leaf in self.taken:
                continue
            why = self._why(leaf)
            if why:
                self.reasons.setdefault((what, why), []).append(role or leaf.name)
                continue
            units[leaf] = Plain(what, [role] if role else [leaf.name], leaf)
            self.taken.add(leaf)
        return list(units.values())

    def _between(self, leaf: Leaf) -> bool:
        """Whether a class is what one product gives and another takes."""
        axes = [(n, i) for n, i, _ in self.dims.holders(leaf) if len(self.dims.parameter(n)) > 1]
        return any(i == 0 for _, i in axes) and any(i > 0 for _, i in axes)

    # ------------------------------------------------------------ heads

    def _heads(self, site: Site) -> Unit | None:
        parts = members(self.program, site)
        if not {"q", "k", "v", "o"} <= parts.keys():
            return None
        groups, inner = head_leaves(self.program, site)
        if groups is None and inner is not None:  # one key-value head for all: its queries' heads change places
            found = self._plain("heads", [(site, inner)]) if "heads" in self.wanted else []
            return found[0] if found else None
        if groups is None or groups in self.taken:
            return None
        why = self._why(groups)
        if why:
            self.reasons.setdefault(("heads", why), []).append(site.role)
            return None
        if inner is not None and not self._inside(groups, inner):
            inner = None
        value = self._column(site, groups, inner, "v", "o")
        key = self._column(site, groups, inner, "k", "q")
        if "head_dim" not in self.wanted:
            value = key = None
        per_group = max(1, (site.heads or groups.size) // groups.size)
        heads = Heads(site.role, {r: parts[r] for r in "qkvo"}, per_group, groups, inner, value, key)
        self.taken.update(heads.leaves)
        return heads

    def _column(self, site: Site, groups: Leaf, inner: Leaf | None, first: str, second: str) -> Leaf | None:
        """The columns of a head that ``first`` gives and ``second`` gives or takes."""
        parts = members(self.program, site)
        mine = out_leaves(self.program, parts[first])
        other = in_leaves(self.program, parts["o"]) if second == "o" else out_leaves(self.program, parts[second])
        both = [leaf for leaf in mine if leaf in other and leaf not in (groups, inner) and leaf.size > 1]
        name = "values and outputs" if first == "v" else "queries and keys"
        if len(both) != 1:
            if "head_dim" in self.wanted:
                why = "a rotary embedding or a split couples them" if first == "k" else "they are split"
                self.reasons.setdefault((f"columns of {name}", why), []).append(site.role)
            return None
        leaf = both[0]
        why = self._why(leaf)
        allowed = {self.program.aliases.get(n, n) for s in (parts[first], parts[second]) for n in (s.weight, s.bias) if n}
        outside = sorted({self.program.aliases.get(n, n) for n, _, _ in self.dims.holders(leaf)} - allowed)
        why = why or (
            f"{outside[0]} has them, too" if outside else "" if self._inside(groups, leaf) else "they stand without their head somewhere"
        )
        if why and "head_dim" in self.wanted:
            self.reasons.setdefault((f"columns of {name}", why), []).append(site.role)
        return None if why or leaf in self.taken else leaf

    def _inside(self, outer: Leaf, inner: Leaf) -> bool:
        """Whether a class is stored only behind another one, so that each unit of that may have an order of its own."""
        return self._why(inner) == "" and all(_behind(axis, outer.axis, inner.axis) for _, _, axis in self.dims.holders(inner))


def _behind(axis: Axis, outer: Axis, inner: Axis) -> bool:
    root = find(axis)
    if root.kind == LEAF:
        return root is not find(inner)
    if root.kind == CAT:
        return all(_behind(p, outer, inner) for p in root.parts)
    seen = False
    for factor in factors(root):
        seen = seen or factor is find(outer)
        if factor is find(inner) and not seen:
            return False
        if factor.kind == CAT and not _behind(factor, outer, inner):
            return False
    return True


# ------------------------------------------------------------------ positions


def places(axis: Axis, units: Sequence[Unit], without: Unit | None = None) -> Table:
    """For every position of a stored axis the position of the model that is moved which comes there. ``without`` stays where it is."""
    plain: dict[Axis, Table] = {}
    ragged: dict[Axis, tuple[Axis, Table]] = {}
    for unit in units:
        if unit is without:
            continue
        if isinstance(unit, Plain):
            plain[find(unit.leaf.axis)] = unit.order
        else:
            plain[find(unit.groups.axis)] = unit.order
            ragged |= {find(leaf.axis): (find(unit.groups.axis), table) for leaf, table in unit.tables.items()}
    return _places(axis, plain, ragged)


def _places(axis: Axis, plain: Mapping[Axis, Table], ragged: Mapping[Axis, tuple[Axis, Table]]) -> Table:
    root = find(axis)
    if root.kind == LEAF:
        return plain[root] if root in plain else np.arange(root.size)
    if root.kind == CAT:
        out, start = [], 0
        for part in map(find, root.parts):
            out.append(_places(part, plain, ragged) + start)
            start += part.size
        return np.concatenate(out)
    take = np.zeros(1, np.int64)
    at: dict[Axis, Table] = {}
    for factor in factors(root):
        n = factor.size
        pair = ragged.get(factor)
        if pair is not None and pair[0] in at:
            index = pair[1][at[pair[0]]]
        else:
            index = np.broadcast_to(_places(factor, plain, ragged), (len(take), n))
        take = (take[:, None] * n + index).reshape(-1)
        at = {leaf: np.repeat(where, n) for leaf, where in at.items()} | {factor: np.tile(np.arange(n), len(take) // n)}
    return take


def ranges(take: Table) -> tuple[tuple[int, int], ...]:
    """Positions as half-open runs in order."""
    edges = np.flatnonzero(np.diff(take) != 1) + 1
    starts = np.concatenate(([0], edges))
    stops = np.concatenate((edges, [len(take)]))
    return tuple((int(take[a]), int(take[b - 1]) + 1) for a, b in zip(starts, stops, strict=True))
