"""Selectors: from ``layers[*].attn.{q, v}`` to sites, with the counts of every step. No torch.

A selector walks the tree of roles one step at a time. Each listed index, each layer of ``[*]`` and each member of a set has to
lead somewhere, unless the selector ends in ``?``; ``*`` and ``**`` only have to lead somewhere in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from surgery.core import ast
from surgery.core.diagnostics import SurgeryError, error
from surgery.core.near import near, quoted
from surgery.core.rawpaths import select_paths
from surgery.core.roles import RoleNode, role_tree, split_role
from surgery.core.selector_words import are, as_ranges, counted, general, index_text, range_text, word_of, written
from surgery.core.site import Anatomy, Site
from surgery.core.source import NOWHERE, Span
from surgery.core.spread import expand_per_layer

__all__ = ["expand_per_layer", "select", "written"]


def select(anatomy: Anatomy, selector: ast.Selector, names: Mapping[str, Sequence[Site]] | None = None) -> list[Site]:
    """The sites that a selector names, each once, in model order.

    ``names`` holds what ``@name`` stands for. A selector that ends at a region gives the region, one that ends at a group of
    roles without a site of its own (``embed``) gives the topmost sites below it, one that ends in ``**`` gives all parts below and
    the parameters there that have no role. An optional selector (``?``) may give fewer sites or none.
    Raises SurgeryError: S0301 nothing matches, S0302 some parts match nothing, S0303 an index past the end, S0304 ``layers`` of
    several stacks, S0305 a raw path that matches nothing, S0306 an unknown ``@name``.
    """
    if selector.raw is not None:
        return select_paths(anatomy, selector)
    root = role_tree(anatomy.sites)
    start: list[_Spot]
    if selector.ref is not None:
        given = (names or {}).get(selector.ref)
        if given is None:
            raise _unknown_name(selector, names or {})
        if not selector.steps:
            return list(given)
        start = [_Spot(node) for site in given if (node := _find(root, site.role)) is not None]
    else:
        start = [_Spot(root)]
    walk = _Walk(anatomy, selector, root)
    return walk.run(start)


# ---------------------------------------------------------------- the walk


@dataclass(frozen=True, eq=False)
class _Spot:
    """A place in the tree of roles; ``expert`` counts within the experts of a 3-D tensor, ``deep`` is set behind ``**``."""

    node: RoleNode
    expert: int | None = None
    deep: bool = False


@dataclass
class _Branch:
    """What has to lead somewhere: the spots that one index or set member has reached."""

    spots: list[_Spot]


@dataclass(frozen=True)
class _Miss:
    step: ast.Step | ast.SetStep
    where: str
    available: tuple[str, ...]


@dataclass
class _Walk:
    anatomy: Anatomy
    selector: ast.Selector
    root: RoleNode
    trail: list[tuple[str, int]] = field(default_factory=list)
    misses: list[_Miss] = field(default_factory=list)

    def run(self, start: list[_Spot]) -> list[Site]:
        branches = [_Branch([s]) for s in start] or [_Branch([])]
        first = True
        for step in self.selector.steps:
            before = branches
            branches = self.step(branches, step)
            text = written(step)
            self.trail.append((text if first and self.selector.ref is None else f".{text}", sum(len(b.spots) for b in branches)))
            first = False
            if not branches:
                if self.selector.optional:
                    return []
                raise self._nothing(before, step)
        if self.misses and not self.selector.optional:
            raise self._partly(branches)
        chosen: dict[str, tuple[int, int, Site]] = {}
        for branch in branches:
            for spot in branch.spots:
                for site in self._sites(spot):
                    chosen.setdefault(site.role, (self._order(site), len(chosen), site))
        found = [site for _, _, site in sorted(chosen.values(), key=lambda c: c[:2])]
        if not found and not self.selector.optional:
            raise self._nothing(branches, self.selector.steps[-1])
        return found

    def _order(self, site: Site) -> int:
        node = _find(self.root, site.role.replace(f".experts[{site.facts.get('expert')}]", ".experts"))
        return node.order if node is not None else 1 << 60

    def step(self, branches: list[_Branch], step: ast.Step | ast.SetStep) -> list[_Branch]:
        result: list[_Branch] = []
        for branch in branches:
            found = self._set(branch, step) if isinstance(step, ast.SetStep) else self._one(branch, step)
            result += found
        return result

    def _set(self, branch: _Branch, step: ast.SetStep) -> list[_Branch]:
        result: list[_Branch] = []
        for member in step.members:
            inner = [branch]
            for i, part in enumerate(member):
                if step.index is not None and i == len(member) - 1 and isinstance(part, ast.Step) and part.index is None:
                    part = replace(part, index=step.index)
                inner = self.step(inner, part)
            result += inner
        return result

    def _one(self, branch: _Branch, step: ast.Step) -> list[_Branch]:
        if step.name == "**":
            spots = [_Spot(n, s.expert, deep=True) for s in branch.spots for n in s.node.below()]
            return [_Branch(spots)] if spots else []
        if step.name == "*":
            kids = [_Spot(c, s.expert) for s in branch.spots for c in _distinct(s.node)]
            if step.index is not None and not step.index.all:
                kids = [k for k in kids if k.node.index is not None and k.node.index in _listed(step.index, 1 << 30)]
            return [_Branch(kids)] if kids else self._miss(branch, step)
        groups = [(s, s.node.named(step.name)) for s in branch.spots]
        if not any(g for _, g in groups):
            return self._miss(branch, step)
        if step.index is None:
            return [_Branch([_Spot(n, s.expert) for s, nodes in groups for n in nodes])]
        result: list[_Branch] = []
        for spot, nodes in groups:
            if nodes:
                result += self._indexed(spot, nodes, step, step.index)
        return result

    def _indexed(self, spot: _Spot, nodes: list[RoleNode], step: ast.Step, index: ast.Index) -> list[_Branch]:
        if nodes[0].index is None:
            site = nodes[0].site
            experts = site.facts.get("experts") if site is not None and step.name == "experts" else None
            if isinstance(experts, int) and not index.all:
                chosen = self._within(index, experts, step, spot, "expert")
                return [_Branch([_Spot(nodes[0], i)]) for i in chosen]
            self._within(index, 1, step, spot, "part")
            return [_Branch([_Spot(nodes[0], spot.expert)])]
        if index.all:
            return [_Branch([_Spot(n, spot.expert)]) for n in nodes]
        by_index = {n.index: n for n in nodes}
        chosen = self._within(index, len(nodes), step, spot, "layer" if step.name == "layers" else "part")
        return [_Branch([_Spot(by_index[i], spot.expert)]) for i in chosen if i in by_index]

    def _within(self, index: ast.Index, count: int, step: ast.Step, spot: _Spot, noun: str) -> list[int]:
        """The indices of ``[...]`` among ``count``; raises S0303 for one that does not exist and S0314 for a range that holds none
        (both skipped when optional)."""
        chosen = _listed(index, count)
        outside = [i for r in index.ranges for i in _ends(r, count) if not 0 <= i < count]
        if outside and not self.selector.optional:
            above = spot.node.role
            name = f"{above}.{step.name}" if above else step.name
            what = f"{name}{index_text(index)}"
            last = f"the last one is {name}[{count - 1}]" if count else ""
            raise SurgeryError(
                error(
                    "S0303", f"`{what}` goes past the end: there {are(count, noun)}", self._span(index, step),
                    f"{count} {noun}{'' if count == 1 else 's'}", notes=[n for n in (last, self._trail()) if n],
                    help=f"write an index from 0 to {count - 1}, or one from -{count} to -1 to count from the end",
                )
            )  # fmt: skip
        empty = next((r for r in index.ranges if not _listed(ast.Index(ranges=(r,)), count)), None)
        if empty is not None and not self.selector.optional:
            raise self._empty(empty, count, step, noun)
        return [i for i in chosen if 0 <= i < count]

    def _empty(self, r: ast.Range, count: int, step: ast.Step, noun: str) -> SurgeryError:
        first, last = _ends(r, count)
        counted = f" (here {first}..{last})" if r.start < 0 or (r.stop or 0) < 0 else ""
        help = f"write `{step.name}[{last}..{first}]` for the {noun}s {last} to {first}"
        return SurgeryError(
            error(
                "S0314", f"the range `{range_text(r)}`{counted} has nothing in it: it ends before it begins", self._span(r, step.index, step),
                "ranges go upwards and include both ends", help=help,
            )
        )  # fmt: skip

    def _miss(self, branch: _Branch, step: ast.Step) -> list[_Branch]:
        where = branch.spots[0].node.role if branch.spots else ""
        available = tuple(dict.fromkeys(n for s in branch.spots for n in s.node.names()))
        self.misses.append(_Miss(step, where, available))
        return []

    def _sites(self, spot: _Spot) -> list[Site]:
        if spot.expert is not None:
            return [_expert(s, spot.expert) for s in spot.node.leaves()]
        if spot.deep:
            site = spot.node.site
            if site is None:
                return []
            return [*self._roleless(site)] if site.is_region else [site]
        return spot.node.sites()

    def _roleless(self, region: Site) -> list[Site]:
        """Parameters of a region that no site has."""
        if region.layer is None or region.role.count("[") == 0 or not region.role.endswith("]"):
            return []
        known = {n for s in self.anatomy.sites if not s.is_region for n in (s.weight, s.bias)}
        inside = set(region.parameters) - known
        return [m for m in self.anatomy.modules if m.weight in inside]

    # ------------------------------------------------------------ diagnostics

    def _span(self, *nodes: ast.Node | None) -> Span:
        return next((n.span for n in (*nodes, self.selector) if n is not None and n.span is not NOWHERE), NOWHERE)

    def _trail(self) -> str:
        return "sites after each step: " + " → ".join(f"`{text}` {count}" for text, count in self.trail) if self.trail else ""

    def _nothing(self, before: list[_Branch], step: ast.Step | ast.SetStep) -> SurgeryError:
        spots = [s for b in before for s in b.spots]
        missed = next((m for m in self.misses), None)
        word = word_of(missed.step if missed is not None else step)
        if spots and spots[0].node is self.root and word == "layers":
            stacks = self._stacks()
            if stacks:
                return self._which_stack(step, stacks)
        names = list(dict.fromkeys(n for s in spots for n in s.node.names()))
        if missed is not None:
            names = list(dict.fromkeys([*missed.available, *names]))
        close = near(word, [n for n in names if n != word])
        counts = " → ".join(f"`{text}` {count}" for text, count in self.trail)
        where = f"in {counted(len(spots), spots[0].node)}" if spots and spots[0].node is not self.root else "in this model"
        help = [f"did you mean {quoted(close)}?"] if close else []
        help += self._elsewhere(word)
        if spots and spots[0].node is self.root and any(s.name.endswith("layers") for s in self.anatomy.stacks):
            called = ", ".join(f"`{s.name}` ({s.layers} layer{'' if s.layers == 1 else 's'})" for s in self.anatomy.stacks)
            help.append(f"the layers of this model are {called}")
        if not help:
            help = ["`surgery show MODEL` lists every role"]
        there = ", ".join(sorted(names)[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        return SurgeryError(
            error(
                "S0301", f"this selector matches nothing: {counts}", self._span(missed.step if missed else None, step), f"no `{word}` {where}",
                notes=[f"there is: {there}"] if names else [], help=help,
            )
        )  # fmt: skip

    def _elsewhere(self, word: str) -> list[str]:
        """Where a role of this name does exist."""
        found = list(dict.fromkeys(general(n) for n in self.root.below() if n.name == word and n.site is not None))
        return [f"`{word}` exists as {quoted(found[:4])}"] if found else []

    def _stacks(self) -> list[str]:
        return [f"`{s.name}` ({s.layers} layer{'' if s.layers == 1 else 's'})" for s in self.anatomy.stacks if s.name != "layers"]

    def _which_stack(self, step: ast.Step | ast.SetStep, stacks: list[str]) -> SurgeryError:
        staged = all(s.name.startswith("stages[") for s in self.anatomy.stacks)
        rest = (index_text(step.index) if isinstance(step, ast.Step) else "") or "[*]"
        options = ["stages[*].layers"] if staged else [s.name for s in self.anatomy.stacks][:4]
        title = "says too little" if len(stacks) > 1 else "is called otherwise here"
        count = f"{len(stacks)} stacks" if len(stacks) > 1 else "1 stack"
        return SurgeryError(
            error(
                "S0304", f"`layers` {title}: this model has {count} of layers: {', '.join(stacks)}", self._span(step), "which layers?",
                help=f"write {quoted(o + rest for o in options)}",
            )
        )  # fmt: skip

    def _partly(self, branches: list[_Branch]) -> SurgeryError:
        by_step: dict[tuple[str, int], list[_Miss]] = {}
        for miss in self.misses:
            by_step.setdefault((word_of(miss.step), id(miss.step)), []).append(miss)
        diagnostics = []
        counts = " → ".join(f"`{text}` {count}" for text, count in self.trail)
        for (word, _), misses in by_step.items():
            places = [m.where for m in misses if m.where]
            at = ", ".join(as_ranges(places)) or "the model"
            names = list(dict.fromkeys(n for m in misses for n in m.available))
            close = near(word, [n for n in names if n != word])
            help = [f"did you mean {quoted(close)}?"] if close else []
            help.append("mark the selector with `?` to take what there is")
            diagnostics.append(
                error(
                    "S0302", f"`{word}` does not exist in {at}, so this selector matches only in part: {counts}",
                    self._span(misses[0].step), f"missing in {len(misses)} of the parts it is asked of",
                    notes=[f"there is: {', '.join(sorted(names)[:12])}"] if names else [], help=help,
                )
            )  # fmt: skip
        return SurgeryError(*diagnostics)


def _distinct(node: RoleNode) -> list[RoleNode]:
    return list(node.children.values())


def _ends(r: ast.Range, count: int) -> list[int]:
    """First and last index of a range with negatives counted from the end; an open end has none."""
    first = r.start + count if r.start < 0 else r.start
    if r.stop is None:
        return [first]
    return [first, r.stop + count if r.stop < 0 else r.stop]


def _listed(index: ast.Index, count: int) -> list[int]:
    """The indices that ``[...]`` names among ``count``, in order of appearance, each once."""
    chosen: dict[int, None] = {}
    for r in index.ranges:
        first, *last = _ends(r, count)
        chosen |= dict.fromkeys(range(first, (last[0] if last else count - 1) + 1, max(1, r.step)))
    return list(chosen)


def _find(root: RoleNode, role: str) -> RoleNode | None:
    node: RoleNode | None = root
    for name, index in split_role(role):
        above = node
        node = node.children.get((name, index)) if node is not None else None
        if node is None:
            # the label of an attachment behind the role of what it is attached to
            return above if above is not root and index is None else None
    return node


def _expert(site: Site, number: int) -> Site:
    """One expert of a 3-D tensor: op ``expert``, ``facts["expert"]`` its place on the first axis."""
    role = site.role.replace(".experts.", f".experts[{number}].")
    return replace(site, role=role, op="expert", shape=(1, *site.shape[1:]), facts={**site.facts, "expert": number})


def _unknown_name(selector: ast.Selector, names: Mapping[str, Any]) -> SurgeryError:
    close = near(selector.ref or "", names)
    known = ", ".join(f"@{n}" for n in names)
    return SurgeryError(
        error(
            "S0306", f"nothing in the model is called `@{selector.ref}`", selector.span, "no statement above made it",
            notes=[f"there is: {known}"] if known else ["no statement above has made anything that is still there"],
            help=f"did you mean {quoted(f'@{c}' for c in close)}?" if close else "name what a statement makes with `as NAME`",
        )
    )  # fmt: skip
