"""Which elements of a parameter belong to which sites: all, the rows of a fused projection, one expert of a 3-D tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from surgery.core.site import Site
from surgery.model.program import Attachment, Program


def attached_to(program: Program, site: Site) -> list[Attachment]:
    """Attachments on the site itself or, for a region, on anything inside it."""
    inside = (site.role + ".", site.role + "[")
    return [a for a in program.attachments if a.site.role == site.role or (site.is_region and a.site.role.startswith(inside))]


def portions(program: Program, sites: Iterable[Site], known: Iterable[str]) -> dict[str, Tensor | None]:
    """For each parameter (of ``known``, by its first name) that is at a site or attached to one: None when all of it is, else a bool
    mask that broadcasts to the parameter's shape. Sites that overlap count once."""
    names = set(known)
    out: dict[str, Tensor | None] = {}
    for site in sites:
        for name, mask in _own(program, site):
            if name not in names:
                continue
            if mask is None or (name in out and out[name] is None):
                out[name] = None
            else:
                before = out.get(name)
                out[name] = mask if before is None else before | mask
        out |= {t: None for a in attached_to(program, site) for t in a.tensors if t in names}
    return out


def _own(program: Program, site: Site) -> list[tuple[str, Tensor | None]]:
    if site.is_region:
        listed: Sequence[str] = site.parameters
    else:
        listed = [n for n in (site.weight, site.bias) if n] or list(site.parameters)
    found: list[tuple[str, Tensor | None]] = []
    for given in listed:
        name = program.aliases.get(given, given)
        if name not in program.weights:
            continue
        mask = None
        if not site.is_region and given in (site.weight, site.bias):
            axis = site.out_axis if given == site.weight else -1
            mask = _mask(program.weights[name].shape, axis, site)
        found.append((name, mask))
    return found


def _mask(shape: tuple[int, ...], axis: int, site: Site) -> Tensor | None:
    """Experts are on the first axis, rows on ``axis``."""
    expert = site.facts.get("expert") if site.op == "expert" else None
    if not shape or (not site.rows and expert is None):
        return None
    axis %= len(shape)
    mask = torch.zeros([n if i in (0, axis) else 1 for i, n in enumerate(shape)], dtype=torch.bool)
    inside = mask if expert is None else mask.narrow(0, int(str(expert)), 1)
    for start, stop in site.rows or ((0, shape[axis]),):
        if axis == 0 and expert is not None:
            inside.fill_(True)  # a vector of one number for each expert
        else:
            inside.narrow(axis, start, stop - start).fill_(True)
    # rows alone say nothing about the first axis: the mask need not have it
    return mask if expert is not None or axis == 0 else mask.narrow(0, 0, 1)


def count(mask: Tensor | None, shape: tuple[int, ...]) -> int:
    """Number of elements of a parameter that a mask of :func:`portions` covers."""
    whole = math.prod(shape)
    return whole if mask is None else int(mask.sum()) * (whole // mask.numel()) if mask.numel() else 0
