"""Heat maps of a report: which heads and units of each layer are left, how many experts there are and how they are used."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch

from surgery.core.site import Site
from surgery.model import past
from surgery.model.data import Samples
from surgery.model.program import Program
from surgery.model.running import is_small
from surgery.model.sample import placeholders, sample_inputs
from surgery.model.study import Study

BINS = 48
"""Cells of a strip: a block with more hidden units has several in one cell."""

CELL, GAP, LEFT = 13, 2, 190


def kept_units(program: Program, site: Site, ancestors: Mapping[str, past.Ancestor]) -> np.ndarray | None:
    """For a projection, which of the outputs that it first had are left (bool, in their first order); None where that cannot be told.

    A slice of a fused projection answers for itself only when nothing of the fused tensor was cut, since its first rows are not on record.
    """
    found = ancestors.get(site.weight)
    if found is None or found.why:
        return None
    mask = found.kept[site.out_axis] if found.kept else None
    if site.rows:
        return np.ones(site.shape[0], bool) if mask is None else None
    return np.ones(found.shape[site.out_axis], bool) if mask is None else mask


def strip(label: str, shares: Sequence[float], text: str, y: int, says: Callable[[int], str], width: int = CELL) -> str:
    """One row of cells; a cell is as dark as its share, and says in words what it is."""
    out = [f"<text x=0 y={y + CELL - 3}>{escape(label)}</text>"]
    for i, share in enumerate(shares):
        x = LEFT + i * (width + GAP)
        fill = "none" if share <= 0 else "#2457a6"
        out.append(
            f"<g><title>{escape(says(i))}</title><rect x={x} y={y} width={width} height={CELL} rx=2 fill='{fill}' "
            f"fill-opacity={0.15 + 0.75 * min(share, 1.0):.2f} class=edge /></g>"
        )
    out.append(f"<text x={LEFT + len(shares) * (width + GAP) + 8} y={y + CELL - 3}>{escape(text)}</text>")
    return "".join(out)


def _figure(title: str, note: str, rows: Sequence[Callable[[int], str]], cells: int, width: int = CELL) -> str:
    if not rows:
        return ""
    wide, high = LEFT + cells * (width + GAP) + 420, len(rows) * (CELL + 5) + 4
    drawn = "".join(row(4 + i * (CELL + 5)) for i, row in enumerate(rows))
    return (
        f"<h2>{escape(title)}</h2><p class=soft>{escape(note)}</p>"
        f"<div class=scroll><svg width={wide} height={high} role=img aria-label='{escape(title)}'>{drawn}</svg></div>"
    )


def heads(program: Program, base: Program) -> str:
    """A cell for each query head that a layer first had: full where the head is left, empty where it went."""
    ancestors = past.first(program)
    sites = {s.role: s for s in program.anatomy.sites}
    rows, most, cut = [], 0, False
    for region in program.anatomy.sites:
        query = sites.get(f"{region.role}.q")
        if not region.is_region or query is None or not region.heads or not query.head_dim:
            continue
        kept, width = kept_units(program, query, ancestors), query.head_dim
        groups = f", {region.kv_heads} key and value heads" if region.kv_heads not in (None, region.heads) else ""
        if kept is not None and len(kept) % width == 0:
            left: np.ndarray = np.any(kept.reshape(-1, width), axis=1, keepdims=True)[:, 0]
            shares, text = [float(x) for x in left], f"{int(left.sum())} of {len(left)} heads{groups}"
        else:
            shares, text = [1.0] * region.heads, f"{region.heads} heads{groups}"
        cut |= min(shares) == 0 or len(shares) != region.heads
        most = max(most, len(shares))
        role = region.role

        def row(y: int, role: str = role, shares: list[float] = shares, text: str = text) -> str:
            return strip(role, shares, text, y, lambda i: f"{role}: head {i} is {'left' if shares[i] else 'gone'}")

        rows.append(row)
    changed = cut or [s.heads for s in base.anatomy.sites if s.is_region] != [s.heads for s in program.anatomy.sites if s.is_region]
    note = "A cell for each query head that the layer first had; an empty one was removed."
    return _figure("Heads", note, rows, most) if changed else ""


def widths(program: Program, base: Program) -> str:
    """The share of each run of hidden units that is left in every feed-forward block."""
    ancestors = past.first(program)
    rows, most, before = [], 0, {s.role: s.shape for s in base.anatomy.sites if s.role.endswith(".up")}
    changed = False
    for site in program.anatomy.sites:
        if not site.role.endswith(".up") or not site.weight or len(site.shape) != 2 or ".experts[" in site.role:
            continue
        kept = kept_units(program, site, ancestors)
        if kept is None:
            kept = np.ones(site.shape[0], bool)
        parts: list[np.ndarray] = list(np.array_split(kept, min(BINS, len(kept))))
        shares, bounds = [float(p.mean()) for p in parts], np.cumsum([0, *map(len, parts)])
        changed |= not kept.all() or before.get(site.role) != site.shape
        most = max(most, len(shares))
        role, text = site.role, f"{site.shape[0]:,} of {len(kept):,} units"

        def row(y: int, role: str = role, shares: list[float] = shares, text: str = text, at: Any = bounds) -> str:
            return strip(role, shares, text, y, lambda i: f"{role}: {shares[i]:.0%} of units {at[i]} to {at[i + 1] - 1} are left", width=7)

        rows.append(row)
    note = "Each cell is a run of the hidden units that the block first had: the darker, the more of them are left."
    return _figure("Feed-forward width", note, rows, most, width=7) if changed else ""


def experts(program: Program, tensors: Any) -> str:
    """How often each expert is among a token's first ``top_k``, on random tokens; only where the model is small enough to run at once."""
    routers = [s for s in program.anatomy.sites if s.role.endswith(".router") and s.calls]
    if not routers:
        return ""
    use = _use(program, routers, tensors) if is_small(program) else {}
    rows, most = [], 0
    for site in routers:
        count, top_k = site.shape[0], int(str(site.facts.get("top_k") or _top_k(program, site) or 1))
        share = use.get(site.role)
        role = site.role.removesuffix(".router")
        shares = [1.0 / count] * count if share is None else share
        text = f"{count} experts, {top_k} for a token" + ("" if share is None else f"; {min(share):.0%} to {max(share):.0%} of the choices")
        top = max(shares)
        most = max(most, count)

        def row(
            y: int, role: str = role, shares: list[float] = shares, text: str = text, top: float = top, known: bool = share is not None
        ) -> str:
            says = lambda i: f"{role}: expert {i}" + (f" takes {shares[i]:.1%} of the choices" if known else "")  # noqa: E731
            return strip(role, [s / top for s in shares], text, y, says)

        rows.append(row)
    note = "A cell for each expert: the darker, the more often it is chosen, measured on random tokens with the weights as compiled."
    return _figure("Experts", note if use else "A cell for each expert.", rows, most)


def _top_k(program: Program, site: Site) -> int | None:
    region = next((s for s in program.anatomy.sites if s.is_region and site.role == f"{s.role}.router"), None)
    found = region.facts.get("top_k") if region is not None else None
    return int(str(found)) if found else None


def _use(program: Program, routers: Sequence[Site], tensors: Any) -> dict[str, list[float]]:
    """The share of all choices that falls on each expert, by router."""
    flat = dict(
        zip((name for name, _ in placeholders(program)), sample_inputs(program, batch=4, length=64, seed=11, padding=False), strict=True)
    )
    own = {name: value for name, value in flat.items() if "mask" not in name and "past" not in name and value.shape[:1] == (4,)}
    samples = Samples([{name: value[i] for name, value in own.items()} for i in range(4)], batch=4)
    counts: dict[str, np.ndarray] = {}

    def watch(site: Site) -> Callable[[torch.Tensor, Any], None]:
        top_k = int(str(site.facts.get("top_k") or _top_k(program, site) or 1))

        def see(scores: torch.Tensor, keep: Any) -> None:
            chosen = scores.reshape(-1, site.shape[0]).topk(min(top_k, site.shape[0]), dim=-1).indices
            counts[site.role] = counts.get(site.role, 0) + np.bincount(chosen.flatten().numpy(), minlength=site.shape[0])

        return see

    Study(tensors).observe(program, samples, outputs={s.calls[0]: watch(s) for s in routers}, text="counting the use of experts")
    return {role: [float(x) / max(1, int(c.sum())) for x in c] for role, c in counts.items() if math.isfinite(float(c.sum()))}
