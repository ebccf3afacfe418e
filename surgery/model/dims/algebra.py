"""Axis expressions: a leaf, a product (row-major, outermost first) or a concatenation, refined in place.

Expressions are nodes of a union-find. Unifying two axes refines both to their common structure, so every tensor and
parameter that holds one of them sees the refinement. Sizes are plain integers: symbolic sizes are replaced by large
distinct primes before they get here, so that divisibility alone decides how axes align.

An axis of size 1 is the shared :data:`ONE`. It is never unified: broadcasting says nothing about what it meets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd, prod
from typing import Any

from surgery.model.dims.moved import moved

LEAF, PROD, CAT = 0, 1, 2


class Reason:
    """Why a leaf cannot be changed: ``text`` says it, ``node`` is the graph node that did it (None for the boundary)."""

    __slots__ = ("node", "text")

    def __init__(self, text: str, node: Any = None) -> None:
        self.text = text
        self.node = node

    def __str__(self) -> str:
        return self.text if self.node is None else f"{self.text} (at {self.node.name})"

    def __repr__(self) -> str:
        return f"Reason({str(self)!r})"


class Axis:
    """One expression. Only :class:`Algebra` changes it; read it through ``find`` and ``parts_of``."""

    __slots__ = ("flags", "frozen", "kind", "parent", "parts", "size", "uid")

    def __init__(self, kind: int, size: int, parts: tuple[Axis, ...], uid: int) -> None:
        self.kind = kind
        self.parts = parts
        self.size = size
        self.parent: Axis | None = None
        self.flags: set[str] = set()
        self.frozen: Reason | None = None
        self.uid = uid

    def __repr__(self) -> str:
        return f"<axis {self.uid} size {self.size}>"


ONE = Axis(LEAF, 1, (), -1)


def find(axis: Axis) -> Axis:
    """The root of an axis (path halving)."""
    while (parent := axis.parent) is not None:
        if parent.parent is not None:
            axis.parent = parent.parent
        axis = parent
    return axis


def factors(axis: Axis) -> list[Axis]:
    """The factors of an axis outermost first, nested products opened; an axis of size 1 has none."""
    root = find(axis)
    if root.kind != PROD:
        return [] if root is ONE else [root]
    out: list[Axis] = []
    stack = [root]
    while stack:
        top = find(stack.pop())
        if top.kind == PROD:
            stack.extend(reversed(top.parts))
        elif top is not ONE:
            out.append(top)
    return out


def segments(axis: Axis) -> list[Axis]:
    """The segments of an axis in order, nested concatenations opened."""
    root = find(axis)
    if root.kind != CAT:
        return [root]
    out: list[Axis] = []
    stack = [root]
    while stack:
        top = find(stack.pop())
        if top.kind == CAT:
            stack.extend(reversed(top.parts))
        else:
            out.append(top)
    return out


def leaves_below(axis: Axis) -> list[Axis]:
    """The distinct leaves of an axis in order of appearance, :data:`ONE` left out."""
    root = find(axis)
    if root.kind == LEAF:
        return [] if root is ONE else [root]
    out: dict[int, Axis] = {}
    seen: set[int] = set()
    stack = [root]
    while stack:
        top = find(stack.pop())
        if id(top) in seen:
            continue
        seen.add(id(top))
        if top.kind == LEAF:
            if top is not ONE:
                out[id(top)] = top
        else:
            stack.extend(reversed(top.parts))
    return list(out.values())


class Algebra:
    """Builds and unifies axes. All methods are iterative; a pair of axes that cannot be aligned is frozen, never guessed."""

    def __init__(self) -> None:
        self.count = 0
        self.node: Any = None
        """The graph node under analysis: the place that a freeze names."""
        self.conflicts: list[tuple[Any, Axis, Axis]] = []

    # -- construction ---------------------------------------------------------------------------------------------

    def leaf(self, size: int) -> Axis:
        if size == 1:
            return ONE
        self.count += 1
        return Axis(LEAF, size, (), self.count)

    def frozen(self, size: int, text: str) -> Axis:
        axis = self.leaf(size)
        self.freeze(axis, text)
        return axis

    def product(self, parts: Iterable[Axis]) -> Axis:
        """The row-major product; nested products are opened, axes of size 1 dropped."""
        flat = [f for part in parts for f in factors(part)]
        if len(flat) < 2:
            return flat[0] if flat else ONE
        self.count += 1
        return Axis(PROD, prod(f.size for f in flat), tuple(flat), self.count)

    def concat(self, parts: Iterable[Axis]) -> Axis:
        """The concatenation; empty parts are dropped, nesting is kept."""
        kept = [root for part in parts if (root := find(part)).size != 0]
        if len(kept) < 2:
            return kept[0] if kept else self.leaf(0)
        self.count += 1
        return Axis(CAT, sum(p.size for p in kept), tuple(kept), self.count)

    # -- marks ----------------------------------------------------------------------------------------------------

    def mark(self, axis: Axis, flag: str) -> None:
        for leaf in leaves_below(axis):
            leaf.flags.add(flag)

    def freeze(self, axis: Axis, text: str, node: Any = None) -> None:
        """Freeze every leaf below; the first reason stays."""
        reason: Reason | None = None
        for leaf in leaves_below(axis):
            if leaf.frozen is None:
                reason = reason or Reason(text, node or self.node)
                leaf.frozen = reason

    def conflict(self, a: Axis, b: Axis) -> None:
        """Freeze both sides of a pair that does not align."""
        self.conflicts.append((self.node, a, b))
        text = f"two uses split it differently ({find(a).size} against {find(b).size})"
        self.freeze(a, text)
        self.freeze(b, text)

    # -- refinement -----------------------------------------------------------------------------------------------

    def _inherit(self, leaf: Axis, children: Iterable[Axis]) -> None:
        for child in children:
            if child is not ONE:
                child.flags |= leaf.flags
                child.frozen = child.frozen or leaf.frozen

    def split_leaf(self, leaf: Axis, outer: int) -> tuple[Axis, Axis]:
        """Turn a leaf into ``outer x rest``."""
        a, b = self.leaf(outer), self.leaf(leaf.size // outer)
        leaf.kind, leaf.parts = PROD, (a, b)
        self._inherit(leaf, (a, b))
        return a, b

    def cut(self, axis: Axis, offset: int) -> tuple[Axis, Axis] | None:
        """The parts left and right of ``offset`` (0 < offset < size); None when the structure does not allow the cut.

        Products are cut where whole trailing factors end, leaves become concatenations; a concatenation is cut in
        the segment that holds the offset.
        """
        before: list[Axis] = []  # whole segments on the left, outermost context first
        after: list[Axis] = []
        tails: list[tuple[int, int, list[Axis]]] = []  # (len(before), len(after), trailing factors) of opened products
        here, at = find(axis), offset
        result: tuple[Axis, Axis] | None = None
        while result is None:
            if here.kind == LEAF:
                a, b = self.leaf(at), self.leaf(here.size - at)
                here.kind, here.parts = CAT, (a, b)
                self._inherit(here, (a, b))
                result = (a, b)
            elif here.kind == CAT:
                start = 0
                for i, part in enumerate(here.parts):
                    part = find(part)
                    if at == start + part.size:
                        result = (self.concat(here.parts[: i + 1]), self.concat(here.parts[i + 1 :]))
                        here.parts = result  # nested in place, so that both sides are parts that a later cut can be traced to
                        break
                    if at < start + part.size:
                        before.extend(here.parts[:i])
                        after[:0] = here.parts[i + 1 :]
                        here, at = part, at - start
                        break
                    start += part.size
            else:
                chain = factors(here)
                tail = here.size // chain[0].size
                if at % tail:  # inside an inner factor that the outer ones repeat: not an interval of units
                    return None
                tails.append((len(before), len(after), chain[1:]))
                here, at = chain[0], at // tail
        left, right = result
        while True:
            depth_b, depth_a, tail_factors = tails.pop() if tails else (0, 0, [])
            if len(before) > depth_b:
                left = self.concat([*before[depth_b:], left])
                del before[depth_b:]
            if len(after) > depth_a:
                extra = len(after) - depth_a
                right = self.concat([right, *after[:extra]])
                del after[:extra]
            if not tail_factors:
                return left, right
            left = self.product([left, *tail_factors])
            right = self.product([right, *tail_factors])

    def pieces(self, axis: Axis, sizes: Sequence[int]) -> list[Axis] | None:
        """Consecutive parts of the given sizes (zero sizes give empty leaves); None when a cut is not possible."""
        out: list[Axis] = []
        rest: Axis | None = find(axis)
        for size in sizes:
            if rest is None or size == 0:
                out.append(self.leaf(0) if size == 0 else ONE)
            elif size == rest.size:
                out.append(rest)
                rest = None
            else:
                two = self.cut(rest, size)
                if two is None:
                    return None
                out.append(two[0])
                rest = find(two[1])
        return out

    # -- unification ----------------------------------------------------------------------------------------------

    def unify(self, a: Axis, b: Axis) -> bool:
        """Make two axes one; False (and frozen) when they do not align. Size-1 axes are left alone."""
        work = [(a, b)]
        fine = True
        while work:
            x, y = work.pop()
            x, y = find(x), find(y)
            if x is y or x is ONE or y is ONE:
                continue
            if x.size != y.size:
                self.conflict(x, y)
                fine = False
            elif x.kind == LEAF or y.kind == LEAF:
                if x.kind == LEAF and not (y.kind == LEAF and y.uid > x.uid):
                    x, y = y, x  # y: the leaf that goes; of two leaves the older stays
                self._merge_leaf(y, x)
            else:
                pairs = self._align(x, y)
                if pairs is None:
                    self.conflict(x, y)
                    fine = False
                else:
                    if x.kind > y.kind or (x.kind == y.kind and y.uid < x.uid):
                        x, y = y, x  # a product stays; of two alike the older, so that what is shared keeps its root
                    if find(x) is x and find(y) is y and x is not y:
                        y.parent = x
                    work.extend(pairs)
        return fine

    def _merge_leaf(self, leaf: Axis, into: Axis) -> None:
        leaf.parent = into
        if leaf.flags or leaf.frozen:
            for below in leaves_below(into):
                below.flags |= leaf.flags
                below.frozen = below.frozen or leaf.frozen

    def _align(self, x: Axis, y: Axis) -> list[tuple[Axis, Axis]] | None:
        if x.kind == PROD and y.kind == PROD:
            return self._align_products(factors(x), factors(y))
        if x.kind == CAT and y.kind == CAT:
            xs, ys = segments(x), segments(y)
            return None if moved(xs, ys) else self._align_concats(xs, ys)
        return self._align_mixed(x, y) if x.kind == PROD else self._align_mixed(y, x)

    def _align_products(self, xs: list[Axis], ys: list[Axis]) -> list[tuple[Axis, Axis]] | None:
        pairs: list[tuple[Axis, Axis]] = []
        xs, ys = xs[::-1], ys[::-1]
        while xs and ys:
            x, y = find(xs.pop()), find(ys.pop())
            if x.size == y.size:
                pairs.append((x, y))
                continue
            big, small, rest = (x, y, xs) if x.size > y.size else (y, x, ys)
            parts = self._outer(big, small.size)
            if parts is None:
                return None
            pairs.append((parts[0], small))
            rest.extend(reversed(parts[1:]))
        return pairs if not xs and not ys else None

    def _outer(self, axis: Axis, outer: int) -> list[Axis] | None:
        """An axis as factors whose first has size ``outer``; None when it is not such a product."""
        if axis.size % outer:
            return None
        if axis.kind == PROD:  # refined meanwhile
            chain = factors(axis)
            if chain[0].size == outer:
                return chain
            if chain[0].size > outer:
                opened = self._outer(chain[0], outer)
                return None if opened is None else [*opened, *chain[1:]]
            return None
        if axis.kind == LEAF:
            return list(self.split_leaf(axis, outer))
        tail = axis.size // outer
        parts = segments(axis)
        if any(p.size % tail for p in parts):
            return None
        shared = self.leaf(tail)
        heads: list[Axis] = []
        for part in parts:
            head = self.leaf(part.size // tail)
            if not self.unify(part, self.product([head, shared])):
                return None
            heads.append(head)
        return [self.concat(heads), find(shared)]

    def _align_concats(self, xs: list[Axis], ys: list[Axis]) -> list[tuple[Axis, Axis]] | None:
        pairs: list[tuple[Axis, Axis]] = []
        xs, ys = xs[::-1], ys[::-1]
        while xs and ys:
            x, y = find(xs.pop()), find(ys.pop())
            if x.size == y.size:
                pairs.append((x, y))
                continue
            big, small, rest = (x, y, xs) if x.size > y.size else (y, x, ys)
            two = self.cut(big, small.size)
            if two is None:
                return None
            pairs.append((two[0], small))
            rest.append(two[1])
        return pairs if not xs and not ys else None

    def _align_mixed(self, product: Axis, cat: Axis) -> list[tuple[Axis, Axis]] | None:
        """``prod(X, R)`` against ``cat[s1+s2+..]``: the concatenation lies in ``X`` and every segment is ``prod(x_i, R)``."""
        parts = segments(cat)
        common = 0
        for part in parts:
            common = gcd(common, part.size)
        chain = factors(product)
        index, tail = len(chain), 1
        while index > 1 and common % (tail * chain[index - 1].size) == 0:
            index -= 1
            tail *= chain[index].size
        if index > 1 and chain[index - 1].kind == LEAF:
            extra = gcd(common // tail, chain[index - 1].size)
            if 1 < extra < chain[index - 1].size:
                _, inner = self.split_leaf(chain[index - 1], chain[index - 1].size // extra)
                chain = factors(product)
                tail *= inner.size
                index = next(i for i, f in enumerate(chain) if f is inner)
        if tail == 1:
            return None
        heads = self.pieces(self.product(chain[:index]), [p.size // tail for p in parts])
        if heads is None:
            return None
        trailing = chain[index:]
        return [(part, self.product([head, *trailing])) for part, head in zip(parts, heads, strict=True)]
