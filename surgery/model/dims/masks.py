"""What stays of an axis when units of leaves go: index masks and sizes of expressions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from surgery.model.dims.algebra import CAT, LEAF, ONE, PROD, Axis, factors, find

Ranges: TypeAlias = tuple[tuple[int, int], ...]
Mask: TypeAlias = np.ndarray


def to_ranges(mask: Mask) -> Ranges:
    """Half-open ranges of the true positions."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(np.int8), [0])))).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def from_ranges(ranges: Iterable[tuple[int, int]], size: int) -> Mask:
    mask = np.zeros(size, dtype=bool)
    for start, stop in ranges:
        mask[start:stop] = True
    return mask


class Keep:
    """Masks of expressions, given which units of some sub-expressions stay.

    ``masks`` maps roots to boolean arrays: of leaves, or of whole sub-expressions (a slice taken of them). ``ragged`` maps a pair
    (outer leaf, inner leaf) to a mask ``[outer, inner]`` with equal row sums among the rows that stay: the inner units that stay
    may differ from one outer unit to the next, which is sound where the inner leaf always directly follows the outer one.
    """

    def __init__(self, masks: Mapping[Axis, Mask], ragged: Mapping[tuple[Axis, Axis], Mask] | None = None) -> None:
        self.masks = {find(a): m for a, m in masks.items()}
        self.ragged = {(find(a), find(b)): m for (a, b), m in (ragged or {}).items()}
        self.applied: set[Axis] = set()
        """The roots of ``masks`` that an evaluated expression contained."""
        self._runs = [(factors(a), m, a) for a, m in self.masks.items() if a.kind == PROD]
        self._mask: dict[Axis, Mask | None] = {}
        self._size: dict[Axis, int] = {}

    def mask(self, axis: Axis) -> Mask | None:
        """True where a position stays; None when all do. Only for axes of stored sizes: a symbolic size stands as a large prime."""
        root = find(axis)
        if root in self._mask:
            return self._mask[root]
        stack = [root]
        while stack:
            top = stack[-1]
            if top in self._mask:
                stack.pop()
                continue
            parts = [] if top.kind == LEAF else factors(top) if top.kind == PROD else [find(p) for p in top.parts]
            missing = [p for p in parts if p not in self._mask]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            own = self.masks.get(top)
            if own is not None:
                self.applied.add(top)
            if top.kind == PROD:
                got = self._product(parts)
            elif top.kind == CAT:
                masks = [self._mask[p] for p in parts]
                got = None
                if any(m is not None for m in masks):
                    got = np.concatenate([np.ones(p.size, bool) if m is None else m for p, m in zip(parts, masks, strict=True)])
            else:
                got = None
            self._mask[top] = own if got is None else got if own is None else got & own
        return self._mask[root]

    def _product(self, parts: Sequence[Axis]) -> Mask | None:
        masks: list[Mask | None] = []
        i = 0
        while i < len(parts):
            pair = self.ragged.get((parts[i], parts[i + 1])) if i + 1 < len(parts) else None
            if pair is not None:
                masks.append(pair.reshape(-1))
                i += 2
                continue
            run = next((r for r in self._runs if 1 < len(r[0]) < len(parts) and list(parts[i : i + len(r[0])]) == r[0]), None)
            if run is not None:
                self.applied.add(run[2])
                inner = self._product(run[0])
                masks.append(run[1] if inner is None else run[1] & inner)
                i += len(run[0])
                continue
            own = self._mask.get(parts[i])
            masks.append(np.ones(parts[i].size, bool) if own is None else own)
            i += 1
        if all(m is None or m.all() for m in masks):
            return None
        out = np.ones(1, bool)
        for m in masks:
            assert m is not None
            out = (out[:, None] & m[None, :]).reshape(-1)
        return out

    def size(self, axis: Axis) -> int:
        """The size that is left; sizes of untouched symbolic axes stay the primes that stand for them."""
        root = find(axis)
        if root in self._size:
            return self._size[root]
        if root.kind == LEAF:
            size = self._leaf_size(root)
        elif root.kind == PROD:
            size, i, parts = 1, 0, factors(root)
            while i < len(parts):
                pair = self.ragged.get((parts[i], parts[i + 1])) if i + 1 < len(parts) else None
                size *= int(pair.sum()) if pair is not None else self.size(parts[i])
                i += 1 if pair is None else 2
        else:
            size = sum(self.size(p) for p in root.parts)
        self._size[root] = size
        return size

    def _leaf_size(self, leaf: Axis) -> int:
        if leaf is ONE:
            return 1
        own = self.masks.get(leaf)
        if own is not None:
            return int(own.sum())
        for (outer, inner), pair in self.ragged.items():
            if leaf is inner:
                return int(pair.sum(axis=1).max(initial=0))
            if leaf is outer:
                return int(pair.any(axis=1).sum())
        return leaf.size
