"""The classes of a layer that stands many times: read off one of its calls, stamped for the others.

What a walk over a run of nodes makes depends on nothing but the axes that come in. So where a walk left those as it found them, and a twin of
the run (:mod:`surgery.model.twins`) is given the very same, its walk would do the same over again with axes of its own: these are made at
once, each with the number that it would have had. Placeholders that no other run reads (the cache of a layer) count as a part of the run. The
first calls of a layer do change what comes in, as the stream becomes an axis that is normalised; they are walked, as is all that has no twin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from surgery.model.dims.algebra import ONE, Axis, Reason, find
from surgery.model.dims.constants import Constant, Cut
from surgery.model.dims.context import Axes, Context
from surgery.model.twins import Run, outside, pairs


class Stamper:
    """Remembers walked runs, and stamps their twins into the context of one analysis."""

    def __init__(self, cx: Context, parameters: dict[str, Axes], aliases: Mapping[str, str], unknown: list[tuple[fx.Node, str]]) -> None:
        self.cx = cx
        self.parameters = parameters
        self.aliases = aliases
        self.unknown = unknown
        self.walked: dict[tuple[object, ...], list[_Walk]] = {}

    def start(self, run: Run) -> _Walk:
        """To be called before a run is walked."""
        return _Walk(self.cx, run, len(self.unknown))

    def end(self, walk: _Walk) -> None:
        """To be called after it: the run is kept for its twins where it left what came in as it was."""
        if len(self.unknown) == walk.unknown and walk.unchanged():
            walk.keep()
            self.walked.setdefault(walk.run.key, []).append(walk)
            walk.run.kind = walk.run

    def stamp(self, run: Run) -> bool:
        """Whether the classes of ``run`` follow from those of a twin, which they then have done."""
        for walk in self.walked.get(run.key, ()):
            found = pairs(walk.run, run)
            if found is not None and walk.fits(found) and walk.unchanged():
                walk.copy(run, found, self)
                run.kind = walk.run
                run.outer = {found[n]: None for n in walk.run.outer}
                return True
        return False


class _Walk:
    """One walked run: what came in, and what was made."""

    def __init__(self, cx: Context, run: Run, unknown: int) -> None:
        self.cx = cx
        self.run = run
        self.unknown = unknown
        own = set(run.nodes)
        self.private = {
            n: cx.values[n] for n in outside(run) if n.op == "placeholder" and all(u in own or u.op == "output" for u in n.users)
        }
        self.lent = [n for n in run.outer if n not in self.private]
        self.own_before = {a for axes in self.private.values() for a in axes or () if a is not ONE}
        self.given = {n: _untouched(axes) for n, axes in self.private.items()}
        self.state: list[tuple[Axis, int, tuple[Axis, ...], int, Reason | None]] = []
        self._note([*self.lent])
        self.marks = (cx.algebra.count, len(cx.constants), len(cx.integers), len(cx.limits), len(cx.inner), len(cx.algebra.conflicts))
        self.domains = len(cx.domains), len(cx.item_domains)

    def _note(self, nodes: list[fx.Node]) -> None:
        """The state of every axis that comes in."""
        stack = [find(a) for n in nodes for a in _axes(self.cx.values[n])]
        stack += [find(self.cx.domains[n]) for n in nodes if n in self.cx.domains]
        seen: set[Axis] = set()
        while stack:
            axis = stack.pop()
            if axis in seen or axis is ONE:
                continue
            seen.add(axis)
            self.state.append((axis, axis.kind, axis.parts, len(axis.flags), axis.frozen))
            stack += [find(p) for p in axis.parts]

    def unchanged(self) -> bool:
        """What came in is as it was before the walk."""
        for axis, kind, parts, flags, why in self.state:
            if axis.parent is not None or axis.kind != kind or len(axis.flags) != flags or axis.frozen is not why:
                return False
            if axis.parts is not parts and list(map(find, axis.parts)) != list(map(find, parts)):
                return False
        return True

    def fits(self, found: dict[fx.Node, fx.Node]) -> bool:
        """A twin is given the same axes; what is read by it alone here is read by it alone there."""
        values, domains = self.cx.values, self.cx.domains
        own = set(list(found.values())[: len(self.run.nodes)])
        for node in self.private:
            twin = found[node]
            if twin.op != "placeholder" or not all(u in own or u.op == "output" for u in twin.users):
                return False
            if self.given[node] != _untouched(values[twin]):
                return False
        for node in self.lent:
            twin = found[node]
            if twin is node:
                continue
            left, right = _axes(values[node]), _axes(values[twin])
            if len(left) != len(right) or any(find(a) is not find(b) for a, b in zip(left, right, strict=True)):
                return False
            if node in domains or twin in domains or node in self.windowed or twin in self.windowed:
                return False
        return True

    # ---------------------------------------------------------------- what was made

    def keep(self) -> None:
        """Notes what the walk made, as it is now: later runs may change it."""
        cx, run = self.cx, self.run
        count, constants, integers, limits, inner, conflicts = self.marks
        self.made = cx.algebra.count - count
        nodes = [*self.private, *run.nodes]
        self.values = [(n, cx.values[n], cx.specs.get(n)) for n in nodes]
        self.constants = cx.constants[constants:]
        self.integers = cx.integers[integers:]
        self.limits = cx.limits[limits:]
        self.inner = cx.inner[inner:]
        self.conflicts = cx.algebra.conflicts[conflicts:]
        self.cuts = [(n, cx.cuts[n]) for n in run.nodes if n in cx.cuts]
        self.own_domains = [(n, cx.domains[n]) for n in run.nodes if n in cx.domains] if len(cx.domains) > self.domains[0] else []
        self.inside = inside = {*nodes}
        self.items = [(k, a) for k, a in cx.item_domains.items() if k[0] in inside] if len(cx.item_domains) > self.domains[1] else []
        self.windows = [(k, v) for k, v in cx.windows.items() if k[0] in inside]
        self.windowed = {k[0] for k in cx.windows if k[0] not in inside}
        self.axes: list[tuple[Axis, Axis | None, int, int, tuple[Axis, ...], tuple[str, ...], Reason | None]] = []
        self._order: dict[Axis, None] = {}
        for _, value, _ in self.values:
            self._visit(_axes(value))
        for constant in self.constants:
            self._visit(constant.axes)
        self._visit([c.axis for _, c in self.cuts])
        self._visit([a for _, a in (*self.own_domains, *self.items)])
        self._visit([a for a, *_ in self.limits] + self.inner + [a for _, x, y in self.conflicts for a in (x, y)])

    def _is_own(self, axis: Axis) -> bool:
        return axis.uid > self.marks[0] or axis in self.own_before

    def _visit(self, axes: Any) -> None:
        """Lists the run's own axes, parts first; one that became a part of another class stands for it."""
        stack = [a for a in axes if self._is_own(a) and a not in self._order]
        while stack:
            axis = stack[-1]
            if axis in self._order:
                stack.pop()
                continue
            root = find(axis)
            needs = [root] if root is not axis else [find(p) for p in axis.parts]
            missing = [a for a in needs if self._is_own(a) and a not in self._order]
            if missing:
                stack += missing
                continue
            stack.pop()
            self._order[axis] = None
            self.axes.append((axis, None if root is axis else root, axis.kind, axis.size, tuple(needs), tuple(axis.flags), axis.frozen))

    def copy(self, run: Run, found: dict[fx.Node, fx.Node], stamper: Stamper) -> None:
        """Gives a twin what the walk of it would have made."""
        cx = self.cx
        shift = cx.algebra.count - self.marks[0]
        cx.algebra.count += self.made
        new: dict[Axis, Axis] = {}
        for node in self.lent:
            if (twin := found[node]) is not node:
                new.update(zip(_axes(cx.values[node]), _axes(cx.values[twin]), strict=True))
        numbers = {a: b.uid for n, axes in self.private.items() for a, b in zip(_axes(axes), _axes(cx.values[found[n]]), strict=True)}
        reasons: dict[Reason, Reason] = {}
        get = new.get
        for axis, root, kind, size, parts, flags, why in self.axes:
            made = new[axis] = Axis(kind, size, (), numbers.get(axis, axis.uid + shift))
            if root is not None:
                made.kind, made.parent = 0, get(root, root)
                continue
            made.parts = tuple([get(p, p) for p in parts])
            made.flags.update(flags)
            if why is not None:
                made.frozen = reasons.get(why)
                if made.frozen is None:
                    made.frozen = reasons[why] = Reason(why.text, found[why.node]) if why.node in self.inside else why
        same: dict[int, Any] = {id(None): None}
        for node, value, shape in self.values:
            twin = found[node]
            if shape is not None:
                cx.specs[twin] = shape
            if id(value) not in same:
                whole = type(value) is list
                same[id(value)] = [tuple([get(a, a) for a in axes]) for axes in value] if whole else tuple([get(a, a) for a in value])
            cx.values[twin] = same[id(value)]
            if twin.op == "get_attr":
                name = str(twin.target)
                stamper.parameters[stamper.aliases.get(name, name)] = cx.values[twin]
        cx.constants += [Constant(found[c.node], c.path, c.kind, tuple([get(a, a) for a in c.axes]), c.data) for c in self.constants]
        for node, cut in self.cuts:
            cx.cuts[found[node]] = Cut(get(cut.axis, cut.axis), cut.start, cut.stop, cut.step)
        cx.integers += [found[n] for n in self.integers]
        cx.limits += [(get(a, a), least, found[n]) for a, least, n in self.limits]
        cx.inner += [get(a, a) for a in self.inner]
        cx.algebra.conflicts += [(found[n], get(a, a), get(b, b)) for n, a, b in self.conflicts]
        cx.domains.update({found[n]: get(a, a) for n, a in self.own_domains})
        cx.item_domains.update({(found[n], i): get(a, a) for (n, i), a in self.items})
        cx.windows.update({(found[n], *rest): v for (n, *rest), v in self.windows})  # type: ignore[misc]


def _untouched(value: Any) -> list[tuple[bool, set[str], str]]:
    """What distinguishes the axes of a placeholder that nothing has read so far."""
    return [(a is ONE, set(a.flags), "" if a.frozen is None else a.frozen.text) for a in _axes(value)]


def _axes(value: Any) -> list[Axis]:
    return [a for axes in value for a in axes] if type(value) is list else list(value or ())
