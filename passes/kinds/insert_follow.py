"""How keys and values that stand in front of others follow a cut of heads: the tables of a head go with it, those of the others stay.

A table is ``[heads, entries, width]`` by key heads; the values that it stands in front of have ``heads repeat`` heads, where ``repeat`` query heads
read one. A key head goes when all of its query heads go, and groups that lose some of theirs must lose equally many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from surgery.model.cut_attached import Around, Follow, Kept
from surgery.model.dims.masks import Mask

Calls = Sequence[tuple[tuple[Any, ...], Around]]
"""The arguments of every call of a module, with what stays around it."""


@dataclass(frozen=True)
class Left:
    """What stays of a table: which key heads and which features (None: all), and how many query heads read each head from now on."""

    heads: Mask | None
    width: Mask | None
    repeat: int


def left_of(kept: tuple[Mask | None, ...], heads: int, repeat: int, width: int) -> Left | str:
    """``kept`` is of a value ``[batch, heads repeat, length, width]``; a text says why a table cannot follow it."""
    if len(kept) != 4:
        return "what the values around it lose is not known"
    if kept[0] is not None or kept[2] is not None:
        return "the values around it lose entries, not heads"
    if kept[3] is not None and len(kept[3]) != width:
        return "the values around it have another width than its tables"
    if kept[1] is None:
        return Left(None, kept[3], repeat)
    if len(kept[1]) != heads * repeat:
        return f"the values around it have {len(kept[1])} heads, and its tables are for {heads * repeat}"
    grid = np.asarray(kept[1], bool).reshape(heads, repeat)
    stay = grid.any(1)
    counts = grid[stay].sum(1)
    if not len(counts):
        return "no head is left"
    if (counts != counts[0]).any():
        return "key heads would be left with different numbers of query heads"
    return Left(None if bool(np.all(stay)) else np.asarray(stay), kept[3], int(counts[0]))


def of_calls(calls: Calls, roles: Sequence[int], heads: int, repeat: int, width: Sequence[int]) -> dict[int, Left] | str:
    """What stays of the table of each role, from the calls ``(value, role, ...)``; one that loses nothing is not asked about."""
    found: dict[int, Left] = {}
    for args, around in calls:
        role = args[1]
        if role not in roles:
            continue
        left = left_of(around.inputs[0], heads, repeat, width[roles.index(role)])
        if isinstance(left, str):
            return left
        before = found.setdefault(role, left)
        if not _same(before.heads, left.heads) or not _same(before.width, left.width) or before.repeat != left.repeat:
            return "it is called at several places that lose different heads"
    if len({x.repeat for x in found.values()}) > 1 or any(not _same(x.heads, y.heads) for x in found.values() for y in found.values()):
        return "keys and values around it lose different heads"
    return found


def _same(a: Mask | None, b: Mask | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b))


def count(mask: Mask | None, size: int) -> int:
    """How many of ``size`` stay."""
    return size if mask is None else int(np.count_nonzero(mask))


def follow_memory(module: Any, calls: Calls, key: int, value: int) -> Follow | str:
    """A module that stands at the core of an attention, with its calls on keys (role ``key``) and on values."""
    site = module.site
    left = of_calls(calls, (key, value), site.heads, site.repeat, (site.key, site.value))
    if isinstance(left, str):
        return left
    keys, values = left[key], left[value]
    stay: Mapping[str, Kept] | str = (
        {"keys": (keys.heads, None, keys.width), "values": (values.heads, None, values.width)}
        if module.stored
        else module.method.follow(site, keys.heads, keys.width, values.width)
    )
    if isinstance(stay, str):
        return stay
    sizes = {"heads": count(keys.heads, site.heads), "key": count(keys.width, site.key), "value": count(values.width, site.value)}
    return Follow(replace(site, repeat=keys.repeat, **sizes), stay)


def follow_past(module: Any, calls: Calls, roles: Sequence[int], join: int, embed: int) -> Follow | str:
    """A module of virtual tokens at the root of a causal model: stored tables lose the heads of the part of the past that they stand in front of;
    embeddings that a pass starts from lose features, and what the pass computes follows by itself. ``roles`` are the calls that stand on
    a past, of which ``join`` has a table (its number is the third argument), ``embed`` the one on embeddings."""
    shapes = list(module.stored)
    tensors: dict[str, tuple[Mask | None, ...]] = {}
    width: Mask | None = None
    for args, around in calls:
        kept = around.inputs[0]
        if not any(m is not None for m in kept):
            continue
        if args[1] == embed:
            if len(kept) != 3 or kept[0] is not None or kept[1] is not None:
                return "the embeddings lose something else than features"
            width = kept[2]
        elif args[1] not in roles or len(kept) != 4:
            return "the values around it lose something else than heads"
        elif args[1] == join and shapes:
            heads, entries, size = shapes[args[2]]
            left = left_of(kept, heads, 1, size)
            if isinstance(left, str):
                return left
            tensors[f"table_{args[2]}"] = (left.heads, None, left.width)
            shapes[args[2]] = (count(left.heads, heads), entries, count(left.width, size))
    if width is None:
        return Follow(module.site, tensors, attributes={"stored": tuple(shapes)})
    specs = module.method.tensors(module.site)
    if any(s.shape[-1] != module.site for s in specs):
        return "its tensors do not have the features of the embeddings"
    own = {} if shapes else {s.name: (*(None,) * (len(s.shape) - 1), width) for s in specs}
    return Follow(count(width, module.site), {**tensors, **own}, attributes={"stored": tuple(shapes)})
