"""The anatomy after a cut, from the one before: nothing gets another role where units go, only sizes change.

Where that is not plain (an axis of one unit would be left, which the analysis takes for none; a size that is no product of whole
classes; grouped convolutions), nothing is carried and the anatomy is found anew when it is asked for.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from surgery.core.site import Anatomy, Late, Measure, Site
from surgery.model.dims import Dims, Keep
from surgery.model.dims.masks import from_ranges, to_ranges

COUNTS = ("heads", "kv_heads", "head_dim")


def carried(anatomy: Anatomy, dims: Dims, keep: Keep) -> Anatomy | None:
    """The anatomy of the program that a cut leaves; None when it has to be found anew. ``dims`` and ``anatomy`` are of the program
    before the cut, ``keep`` is what stays of the former's axes. The result equals what :func:`find_anatomy` finds."""
    roots = [*keep.masks, *(axis for pair in keep.ragged for axis in pair)]
    if any(keep.size(axis) < 2 for axis in roots):
        return None
    work = _Carry(dims, keep, anatomy.measures)
    known = {s.weight for s in anatomy.sites}
    if any(len(axes) > 2 and name not in known and work.sizes(name) for name, axes in dims.parameters.items()):
        return None  # it may be a grouped convolution that has no role
    sites = work.sites(anatomy.sites)
    if sites is None:
        return None
    modules = Late(lambda: work.sites(anatomy.modules) or ())
    return replace(anatomy, sites=sites, modules=modules)


class _Carry:
    def __init__(self, dims: Dims, keep: Keep, measures: dict[str, dict[str, Measure]]) -> None:
        self.dims = dims
        self.keep = keep
        self.measures = measures
        self._stored: dict[str, tuple[int, ...] | None] = {}

    def sites(self, sites: Any) -> tuple[Site, ...] | None:
        """The sites with their new sizes; None where one of them does not follow."""
        made: dict[str, Site] = {}
        for site in sites:
            if not site.is_region:
                part = self._part(site)
                if part is None:
                    return None
                made[site.role] = part
        out: list[Site] = []
        around = ""
        counts: dict[str, int] = {}
        for site in sites:
            if site.is_region:
                if site.role in self.measures:
                    around, counts = f"{site.role}.", self._counts(self.measures[site.role])
                elif site.heads is not None or site.kv_heads is not None:
                    return None
                found = self._region(site, made, counts if f"{site.role}." == around else {})
                if found is None:
                    return None
            else:
                found = made[site.role]
                if counts and (found.heads, found.kv_heads, found.head_dim) != (None, None, None) and site.role.startswith(around):
                    found = _changed(found, {n: counts[n] for n in COUNTS if n in counts})
            out.append(found)
        return tuple(out)

    def _counts(self, measures: dict[str, Measure]) -> dict[str, int]:
        """The new sizes of one attention block."""
        found = {}
        for name, (parameter, axis, at) in measures.items():
            leaves = self.dims.leaves(self.dims.parameter(parameter)[axis])
            found[name] = prod(self.keep.size(leaves[i].axis) for i in at)
        return found

    def _region(self, site: Site, made: dict[str, Site], counts: dict[str, int]) -> Site | None:
        facts: dict[str, object] = {}
        if "value_dim" in counts and (counts["value_dim"] != counts.get("head_dim")) != ("value_dim" in site.facts):
            return None  # the two were equal and are told apart now, or the other way round
        if "value_dim" in site.facts:
            facts["value_dim"] = counts.get("value_dim")
        if "width" in site.facts:
            up = made.get(f"{site.role}.up") or made.get(f"{site.role}.experts.up")
            if up is None:
                return None
            facts["width"] = up.shape[1] if up.op == "experts" else up.shape[0]
            if "experts" in site.facts:
                facts["experts"] = up.shape[0]
        changed = {n: counts[n] for n in COUNTS if n in counts}
        if any(site.facts[n] != value for n, value in facts.items()):
            changed["facts"] = {**site.facts, **facts}  # type: ignore[assignment]
        return _changed(site, changed)

    def _part(self, site: Site) -> Site | None:
        """A site of one stored tensor; None where its new sizes do not follow from the tensor's."""
        new = self.sizes(site.weight)
        if new is None:
            return site
        if site.op == "conv" and site.facts.get("groups", 1) != 1:
            return None
        if site.op == "embedding":
            return replace(site, shape=tuple(reversed(new)))
        if site.op in ("norm", "param", "bias"):
            return replace(site, shape=new)
        width, rows = new[site.out_axis], site.rows
        if rows:
            rows = self._rows(site)
            width = sum(b - a for a, b in rows)
            rows = () if width == new[site.out_axis] else rows
        if site.op == "experts":
            facts = site.facts if new[0] == site.facts.get("experts") else {**site.facts, "experts": new[0]}
            return replace(site, shape=(new[0], width, new[site.in_axis]), rows=rows, facts=facts)
        return replace(site, shape=(width, new[site.in_axis], *site.shape[2:]), rows=rows)

    def _rows(self, site: Site) -> tuple[tuple[int, int], ...]:
        axis = self.dims.parameter(site.weight)[site.out_axis]
        mask = self.keep.mask(axis)
        if mask is None:
            return site.rows
        own = from_ranges(site.rows, len(mask))
        return to_ranges(own[mask])

    def sizes(self, weight: str) -> tuple[int, ...] | None:
        """The new shape of a tensor; None where it stays as it is."""
        if weight not in self._stored:
            axes = self.dims.parameters.get(weight, ())
            new = tuple([self.keep.size(a) for a in axes])
            self._stored[weight] = None if new == tuple([a.size for a in axes]) else new
        return self._stored[weight]


def _changed(site: Site, fields: dict[str, Any]) -> Site:
    """The site itself where nothing is new."""
    new = {n: v for n, v in fields.items() if n == "facts" or getattr(site, n) != v}
    return replace(site, **new) if new else site
