"""The result of the analysis and the questions it answers: axes, leaves, holders, coupled cuts, rows of a slice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
from torch import fx

from surgery.model.dims import names
from surgery.model.dims.algebra import CAT, LEAF, ONE, PROD, Axis, Reason, factors, find, leaves_below
from surgery.model.dims.constants import Constant, Cut
from surgery.model.dims.context import Axes, Context
from surgery.model.dims.groups import Change, Group, Leaf, Member, spans
from surgery.model.dims.masks import Keep, Mask, Ranges, to_ranges
from surgery.model.dims.order import follows, has_run
from surgery.model.twins import Run


class Dims:
    """Dimension classes of one graph; see :func:`surgery.model.dims.analyse`."""

    def __init__(
        self, cx: Context, parameters: dict[str, Axes], unknown: list[tuple[fx.Node, str]], graph: fx.Graph, runs: list[Run]
    ) -> None:
        self.graph = graph
        self.runs = runs
        """The graph's nodes in order, with what is known of layers that are copies of one another."""
        self._cx = cx
        self._parameters = parameters
        self.unknown = tuple(unknown)
        """Nodes whose operator has no rule, with the operator's name."""
        self._leaves: dict[Axis, tuple[Axis, ...]] = {}
        self._public: dict[Axis, Leaf] = {}

    # -- expressions ----------------------------------------------------------------------------------------------

    def axes(self, node: fx.Node) -> Any:
        """Axes of a node's value: a tuple; a list of tuples for several values; None when it is no tensor. KeyError: not analysed."""
        return self._cx.values[node]

    def parameter(self, name: str) -> Axes:
        """Axes of a parameter or buffer. KeyError when the graph does not use it."""
        return self._parameters[name]

    @property
    def parameters(self) -> Mapping[str, Axes]:
        return self._parameters

    @property
    def integers(self) -> tuple[fx.Node, ...]:
        """The nodes that compute one size, in graph order."""
        return tuple(self._cx.integers)

    @property
    def values(self) -> Mapping[fx.Node, Any]:
        """Axes of every analysed node, as :meth:`axes` gives them."""
        return self._cx.values

    def text(self, axis: Axis, *, unique: bool = False) -> str:
        """The printed expression: ``(H*d)``, ``[F+F]``; with ``unique`` leaves print as their unique names."""
        return names.text(axis, self._names if unique else self._letters, self._names)

    def root(self, axis: Axis) -> Axis:
        """The representative of an axis: two axes are one class when their roots are one object."""
        return find(axis)

    def same(self, a: Axis, b: Axis) -> bool:
        """Whether two axes have the same structure, position by position."""
        ra, rb = find(a), find(b)
        return ra is rb or (ra.size == rb.size and ra.kind == rb.kind != LEAF and self._signature(ra) == self._signature(rb))

    def _signature(self, axis: Axis) -> str:
        return names.text(axis, self._uids, self._uids)

    @cached_property
    def _uids(self) -> dict[Axis, str]:
        return {leaf: f"#{leaf.uid}" for leaf in self._all_leaves}

    @cached_property
    def _all_leaves(self) -> tuple[Axis, ...]:
        seen: dict[Axis, None] = {}
        for axes in self._parameters.values():
            for axis in axes:
                seen.update(dict.fromkeys(self._below(axis)))
        for value in self._cx.values.values():
            for axes in value if isinstance(value, list) else (value or (),):
                for axis in axes:
                    seen.update(dict.fromkeys(self._below(axis)))
        return tuple(seen)

    @cached_property
    def _letters(self) -> dict[Axis, str]:
        return names.letters(self._cx, self._all_leaves, (a for axes in self._parameters.values() for a in axes))

    @cached_property
    def _names(self) -> dict[Axis, str]:
        letter = self._letters
        return names.numbered({leaf: letter[leaf] for leaf in self._all_leaves})

    def _below(self, axis: Axis) -> tuple[Axis, ...]:
        root = find(axis)
        got = self._leaves.get(root)
        if got is None:
            got = self._leaves[root] = tuple(leaves_below(root))
        return got

    # -- leaves ---------------------------------------------------------------------------------------------------

    def _called(self, axis: Axis) -> tuple[str, str]:
        """Name and letter: a reading aid that most leaves are never asked for."""
        return self._names[axis], self._letters[axis]

    def _leaf(self, axis: Axis) -> Leaf:
        got = self._public.get(axis)
        if got is None:
            why: Reason | None = axis.frozen
            flags = frozenset([f for f in axis.flags if f[0] != "~"])
            text, node = (None, None) if why is None else (why.text, why.node)
            got = self._public[axis] = Leaf(axis, axis.size, flags, text, node, self._called)
        return got

    def leaves(self, axis: Axis) -> tuple[Leaf, ...]:
        """The distinct leaves of an expression in order of appearance; axes of size 1 have none."""
        return tuple(self._leaf(leaf) for leaf in self._below(axis))

    def leaf(self, axis: Axis) -> Leaf | None:
        """The leaf that an axis is; None for a product, a concatenation or an axis of size 1."""
        root = find(axis)
        return self._leaf(root) if root.kind == LEAF and root is not ONE else None

    def all_leaves(self, *, stored: bool = True) -> tuple[Leaf, ...]:
        """All leaves in the order of the parameters; ``stored``: only those that a parameter or buffer holds."""
        return tuple(self._leaf(a) for a in self._all_leaves if not stored or a in self._holders)

    @cached_property
    def _holders(self) -> dict[Axis, list[tuple[str, int, Axis]]]:
        out: dict[Axis, list[tuple[str, int, Axis]]] = {}
        for name, axes in self._parameters.items():
            for i, axis in enumerate(axes):
                for leaf in self._below(axis):
                    out.setdefault(leaf, []).append((name, i, find(axis)))
        return out

    def holders(self, leaf: Leaf) -> list[tuple[str, int, Axis]]:
        """(parameter, axis number, expression) of every stored axis that contains the leaf, in graph order."""
        return list(self._holders.get(leaf.axis, ()))

    @cached_property
    def _constants_of(self) -> dict[Axis, list[Constant]]:
        out: dict[Axis, list[Constant]] = {}
        for site in self._cx.constants:
            for leaf in dict.fromkeys(x for a in site.axes for x in self._below(a)):
                out.setdefault(leaf, []).append(site)
        return out

    @property
    def constants(self) -> tuple[Constant, ...]:
        """Every registered place in the graph that depends on sizes."""
        return tuple(self._cx.constants)

    def constants_of(self, leaf: Leaf) -> tuple[Constant, ...]:
        return tuple(self._constants_of.get(leaf.axis, ()))

    def size(self, axis: Axis) -> int:
        """The traced size; a symbolic size is the prime that stands for its symbol."""
        return find(axis).size

    def symbolic(self, axis: Axis) -> bool:
        return any("dynamic" in (leaf.frozen.text if leaf.frozen else "") for leaf in self._below(axis))

    @cached_property
    def _picks(self) -> dict[Axis, int]:
        out: dict[Axis, int] = {}
        for limited, least, _ in self._cx.limits:
            for leaf in self._below(limited):
                out[leaf] = max(least, out.get(leaf, 0))
        return out

    def picks(self, axis: Axis) -> int | None:
        """How many positions of an axis a top-k takes (the most of several); None when none does."""
        return max((self._picks[leaf] for leaf in self._below(axis) if leaf in self._picks), default=None)

    # -- slices ---------------------------------------------------------------------------------------------------

    def cut_of(self, node: fx.Node) -> Cut | None:
        """What a slice, select or part of a split (its getitem) takes of its input's axis; None for other nodes."""
        return self._cx.cuts.get(node)

    def rows(self, axis: Axis, cuts: Iterable[Cut]) -> Ranges:
        """Positions of ``axis`` that survive a chain of cuts of it or of its sub-expressions.

        For the rows of a fused weight that feed one consumer: walk from the consumer back to the product, collect
        :meth:`cut_of` of the nodes on the way, evaluate on the weight's output axis; join the rows of several paths.
        LookupError when a cut is of something that the axis does not contain.
        """
        masks: dict[Axis, Mask] = {}
        for cut in cuts:
            root = find(cut.axis)
            mask = np.zeros(root.size, bool)
            mask[cut.start : cut.stop : cut.step] = True
            masks[root] = masks[root] & mask if root in masks else mask
        keep = Keep(masks)
        kept = keep.mask(axis)
        for root, mask in masks.items():
            if root not in keep.applied and not mask.all():
                raise LookupError(f"{self.text(root)} is no part of {self.text(axis)}")
        return ((0, find(axis).size),) if kept is None else to_ranges(kept)

    def slice_of(self, axis: Axis, part: Axis) -> Ranges:
        """Positions of ``axis`` that belong to ``part``: a segment (at any depth) of its concatenations, every time it occurs."""
        target = find(part)
        root = find(axis)
        if target is root:
            return ((0, root.size),)
        done: dict[Axis, Mask] = {ONE: np.zeros(1, bool)}
        stack = [root]
        while stack:
            top = stack[-1]
            if top in done:
                stack.pop()
            elif top is target:
                done[top] = np.ones(top.size, bool)
            elif top.kind == LEAF:
                done[top] = np.zeros(top.size, bool)
            else:
                parts = factors(top) if top.kind == PROD else [find(p) for p in top.parts]
                missing = [p for p in parts if p not in done]
                if missing:
                    stack.extend(missing)
                elif top.kind == CAT:
                    done[top] = np.concatenate([done[p] for p in parts])
                else:  # a factor that holds the part anywhere: its positions, whatever the other factors
                    got = np.zeros(1, bool)
                    for p in parts:
                        got = (got[:, None] | done[p][None, :]).reshape(-1)
                    if target.kind == PROD and has_run(parts, factors(target)):
                        got[:] = True
                    done[top] = got
        return to_ranges(done[root])

    def index_set(self, axis: Axis, leaf: Leaf, units: Iterable[int]) -> Ranges:
        """Positions of ``axis`` that belong to the given units of a leaf (rows of some heads in a projection)."""
        keep = np.ones(leaf.size, bool)
        keep[list(units)] = False
        mask = Keep({leaf.axis: keep}).mask(axis)
        return () if mask is None else to_ranges(~mask)

    # -- cuts -----------------------------------------------------------------------------------------------------

    def remove(self, units: Mapping[Leaf, Iterable[int]], *, ragged: Mapping[tuple[Leaf, Leaf], Mask] | None = None) -> Group:
        """Remove units of leaves: every stored axis, index and constant that changes.

        ``ragged`` maps (outer leaf, inner leaf) to a mask ``[outer, inner]`` of what stays, with equal row sums: another choice of
        inner units for each outer unit, refused unless the inner leaf always directly follows the outer one.
        """
        keeps: dict[Axis, Mask] = {}
        root: list[tuple[Leaf, tuple[int, ...]]] = []
        refusals: list[str] = []
        for leaf, gone in units.items():
            places = gone if isinstance(gone, np.ndarray) else np.fromiter(gone, np.intp)
            if len(places) and not 0 <= places.min() <= places.max() < leaf.size:
                raise IndexError(f"{leaf.name} has units 0..{leaf.size - 1}, not {tuple(sorted({*places.tolist()}))}")
            mask = np.ones(leaf.size, bool)
            mask[places] = False
            gone = tuple(np.flatnonzero(~mask).tolist())
            root.append((leaf, gone))
            keeps[leaf.axis] = mask
            if gone and not leaf.free:
                refusals.append(f"{leaf.name} is fixed: {leaf.reason}")
            elif not mask.any():
                refusals.append(f"nothing of {leaf.name} would be left")
        touched = list(keeps)
        pairs: dict[tuple[Axis, Axis], Mask] = {}
        for (outer, inner), mask in (ragged or {}).items():
            pairs[outer.axis, inner.axis] = mask
            touched += [outer.axis, inner.axis]
            gone = tuple(int(i) for i in np.flatnonzero(~mask.reshape(-1)))
            root.append((inner, gone))
            refusals += self._ragged_faults(outer, inner, mask)
        keep = Keep(keeps, pairs)
        return self._group(tuple(root), touched, keep, refusals)

    def _ragged_faults(self, outer: Leaf, inner: Leaf, mask: Mask) -> list[str]:
        sums = {int(s) for s in mask.sum(axis=1) if s}
        if len(sums) != 1:
            return [f"every unit of {outer.name} must keep the same number of {inner.name}"]
        for leaf in (outer, inner):
            if not leaf.free:
                return [f"{leaf.name} is fixed: {leaf.reason}"]
        if not mask.any(axis=1).all():
            return [f"remove whole units of {outer.name} in a cut of their own"]
        for name, i, axis in self._holders.get(inner.axis, ()):
            if not follows(axis, outer.axis, inner.axis):
                return [f"{inner.name} stands without {outer.name} in {name} axis {i}"]
        return []

    def _group(self, root: tuple[tuple[Leaf, tuple[int, ...]], ...], touched: list[Axis], keep: Keep, refusals: list[str]) -> Group:
        members: list[Member] = []
        seen: set[tuple[str, int]] = set()
        ranges: dict[int, tuple[Ranges, Ranges]] = {}
        order = {name: i for i, name in enumerate(self._parameters)}
        held = [h for leaf in dict.fromkeys(touched) for h in self._holders.get(leaf, ())]
        for name, i, axis in sorted(held, key=lambda h: (order[h[0]], h[1])):
            if (name, i) in seen:
                continue
            seen.add((name, i))
            mask = keep.mask(axis)
            if mask is not None:
                both = ranges.get(id(mask))
                if both is None:
                    both = ranges[id(mask)] = to_ranges(~mask), to_ranges(mask)
                members.append(Member(name, i, *both))
        changes: list[Change] = []
        done: set[int] = set()
        for leaf in dict.fromkeys(touched):
            for site in self._constants_of.get(leaf, ()):
                if id(site) in done:
                    continue
                done.add(id(site))
                if all(keep.size(a) == find(a).size for a in site.axes):
                    continue
                ratio = site.ratio(keep.size)
                changes.append(Change(site.node, site.path, site.kind, site.value(keep.size), (ratio.numerator, ratio.denominator), site))
        for limited, least, node in self._cx.limits:
            if keep.size(limited) < min(least, find(limited).size):
                refusals.append(f"{node.name} picks {least} of {self.text(limited)} and only {keep.size(limited)} would be left")
        flags = frozenset(f for leaf in touched for f in self._leaf(leaf).flags)
        return Group(root, tuple(members), tuple(changes), flags, "; ".join(refusals), keep, self)

    def coupled(self, parameter: str, axis: int, units: Iterable[int]) -> Group:
        """What must go when the positions ``units`` of a stored axis go.

        The positions must be whole units of leaves: then those units are removed wherever they occur. Otherwise, and on
        frozen leaves, the group carries a refusal that says which positions go together.
        """
        expression = find(self._parameters[parameter][axis])
        wanted = np.zeros(expression.size, bool)
        wanted[list(units)] = True
        chosen: dict[Leaf, Iterable[int]] = {}
        covered = np.zeros(expression.size, bool)
        for leaf, occurrence in self.occurrences(expression):
            there = occurrence >= 0
            total, asked, new = (
                np.bincount(occurrence[there & chosen_positions], minlength=leaf.size)
                for chosen_positions in (there, wanted, wanted & ~covered)
            )
            whole = (total > 0) & (asked == total) & (new > 0)
            if whole.any():
                chosen[leaf] = sorted({*chosen.get(leaf, ()), *(int(u) for u in np.flatnonzero(whole))})
                covered |= there & whole[occurrence]
        group = self.remove(chosen)
        if not chosen or (wanted & ~covered).any():
            loose = to_ranges(wanted & ~covered)
            why = f"positions {spans(loose)} of {parameter} axis {axis} = {self.text(expression)} are no whole units"
            group = Group(
                group.root, group.members, group.constants, group.flags, "; ".join(filter(None, (group.refusal, why))), group.keep, self
            )
        return group

    def occurrences(self, expression: Axis) -> list[tuple[Leaf, np.ndarray]]:
        """For each occurrence of a leaf in an expression the unit at every position (-1: another part)."""
        out: list[tuple[Leaf, np.ndarray]] = []
        expression = find(expression)
        here = np.arange(expression.size)
        if expression.kind == LEAF and expression is not ONE:
            return [(self._leaf(expression), here)]
        stack: list[tuple[Axis, np.ndarray]] = [(expression, here)]
        while stack:
            axis, index = stack.pop()
            root = find(axis)
            if root is ONE:
                continue
            if root.kind == LEAF:
                out.append((self._leaf(root), index))
            elif root.kind == CAT:
                start, todo = 0, []
                for part in map(find, root.parts):
                    inside = (index >= start) & (index < start + part.size)
                    todo.append((part, np.where(inside, index - start, -1)))
                    start += part.size
                stack.extend(reversed(todo))
            else:
                inner, todo = root.size, []
                for part in factors(root):
                    inner //= part.size
                    todo.append((part, np.where(index >= 0, index // inner % part.size, -1)))
                stack.extend(reversed(todo))
        return out
