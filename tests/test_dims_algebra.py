"""Axis expressions: refinement, unification, cuts, masks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.model.dims.algebra import CAT, ONE, PROD, Algebra, Axis, factors, find, leaves_below, segments
from surgery.model.dims.masks import Keep, from_ranges, to_ranges


def sizes(parts: list[Axis]) -> list[int]:
    return [find(p).size for p in parts]


def test_a_view_refines_the_leaf_that_every_holder_sees():
    al = Algebra()
    row = al.leaf(24)
    heads, width = al.leaf(4), al.leaf(6)
    assert al.unify(row, al.product([heads, width]))
    assert find(row).kind == PROD and factors(row) == [heads, width]


def test_products_align_from_the_outside_by_splitting_the_bigger_factor():
    al = Algebra()
    a = al.product([al.leaf(4), al.leaf(6)])
    b = al.product([al.leaf(2), al.leaf(2), al.leaf(6)])
    assert al.unify(a, b)
    assert sizes(factors(a)) == [2, 2, 6] and factors(a) == factors(b)


def test_concatenations_are_cut_at_the_union_of_their_boundaries():
    al = Algebra()
    a = al.concat([al.leaf(3), al.leaf(5)])
    b = al.concat([al.leaf(6), al.leaf(2)])
    assert al.unify(a, b)
    assert sizes(segments(a)) == [3, 3, 2] and segments(a) == segments(b)


def test_a_sequence_that_meets_itself_moved_is_frozen_and_stays_whole():
    al = Algebra()
    rest = al.leaf(10007)
    shifted = al.concat([ONE, rest])  # one new position in front, the last one gone
    two = al.pieces(whole := al.leaf(10008), [10007, 1])
    assert two is not None and al.unify(two[0], rest)
    assert not al.unify(whole, shifted)
    assert find(rest).frozen is not None and len(segments(whole)) == 2


def test_a_product_against_a_concatenation_shares_the_inner_factor():
    al = Algebra()
    cat = al.concat([al.leaf(8), al.leaf(4)])
    product = al.product([al.leaf(6), al.leaf(2)])
    assert al.unify(cat, product)
    outer, inner = factors(product)
    assert inner.size == 2 and sizes(segments(outer)) == [4, 2]
    for unit in (0, 5):
        keep = np.ones(6, bool)
        keep[unit] = False
        whole = Keep({leaf: keep[s] for leaf, s in zip(segments(outer), (slice(0, 4), slice(4, 6)), strict=True)})
        assert to_ranges(whole.mask(cat)) == to_ranges(np.repeat(keep, 2))


def test_what_does_not_align_is_frozen_on_both_sides_and_nowhere_else():
    al = Algebra()
    a, b, other = al.product([al.leaf(4), al.leaf(9)]), al.product([al.leaf(6), al.leaf(6)]), al.leaf(4)
    assert not al.unify(a, b)
    assert all(leaf.frozen is not None for leaf in leaves_below(a) + leaves_below(b))
    assert other.frozen is None and len(al.conflicts) == 1


def test_size_one_joins_nothing():
    al = Algebra()
    a = al.leaf(5)
    assert al.leaf(1) is ONE and al.unify(a, ONE) and find(a) is a


def test_flags_and_freezing_follow_merging_and_splitting():
    al = Algebra()
    a, b = al.leaf(12), al.product([al.leaf(3), al.leaf(4)])
    al.mark(a, "norm")
    al.freeze(a, "a reason")
    al.unify(a, b)
    assert all("norm" in leaf.flags and str(leaf.frozen) == "a reason" for leaf in leaves_below(b))
    left, right = al.cut(leaves_below(b)[1], 1) or (ONE, ONE)
    assert left is ONE and right.frozen is not None and "norm" in right.flags


@pytest.mark.parametrize("offset", [4, 8])
def test_a_product_is_cut_where_whole_inner_units_end(offset):
    al = Algebra()
    axis = al.product([al.leaf(3), al.leaf(4)])
    left, right = al.cut(axis, offset) or (ONE, ONE)
    assert (left.size, right.size) == (offset, 12 - offset)
    assert find(factors(axis)[0]).kind == CAT


def test_a_cut_through_a_unit_is_refused():
    al = Algebra()
    assert al.cut(al.product([al.leaf(3), al.leaf(4)]), 6) is None


shapes = st.lists(st.sampled_from([2, 3, 4, 6]), min_size=1, max_size=3)


@st.composite
def expression(draw, al: Algebra, depth: int = 2) -> Axis:
    kind = draw(st.sampled_from(["leaf", "prod", "cat"])) if depth else "leaf"
    if kind == "leaf":
        return al.leaf(draw(st.sampled_from([2, 3, 4, 6, 8, 12])))
    parts = [draw(expression(al, depth - 1)) for _ in range(draw(st.integers(2, 3)))]
    return al.product(parts) if kind == "prod" else al.concat(parts)


def masks_by_hand(axis: Axis, keep: dict[Axis, np.ndarray]) -> np.ndarray:
    """The definition, written the slow way."""
    root = find(axis)
    if root.kind == PROD:
        out = [True]
        for part in root.parts:
            inner = masks_by_hand(part, keep)
            out = [o and bool(i) for o in out for i in inner]
        return np.array(out)
    if root.kind == CAT:
        return np.concatenate([masks_by_hand(p, keep) for p in root.parts])
    return keep.get(root, np.ones(root.size, bool))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_masks_and_sizes_agree_with_the_definition(data):
    al = Algebra()
    axis = data.draw(expression(al))
    keep = {}
    for leaf in leaves_below(axis):
        keep[leaf] = np.array(data.draw(st.lists(st.booleans(), min_size=leaf.size, max_size=leaf.size)))
    expected = masks_by_hand(axis, keep)
    got = Keep(keep)
    mask = got.mask(axis)
    assert (np.ones(axis.size, bool) if mask is None else mask).tolist() == expected.tolist()
    assert got.size(axis) == int(expected.sum())
    assert from_ranges(to_ranges(expected), axis.size).tolist() == expected.tolist()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_unified_axes_agree_position_by_position(data):
    """After unify, the same units give the same mask on both sides; what fails to align is frozen."""
    al = Algebra()
    a, b = data.draw(expression(al)), data.draw(expression(al))
    if a.size != b.size:
        a, b = al.product([a, al.leaf(b.size)]), al.concat([b] * a.size)
    if al.unify(a, b):
        for leaf in leaves_below(a):
            keep = np.ones(leaf.size, bool)
            keep[data.draw(st.integers(0, leaf.size - 1))] = False
            one = Keep({leaf: keep})
            x, y = one.mask(a), one.mask(b)
            assert (x is None) == (y is None) and (x is None or x.tolist() == y.tolist())
    else:
        assert al.conflicts
        for _, x, y in al.conflicts:
            assert all(leaf.frozen is not None for leaf in leaves_below(x) + leaves_below(y))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_cut_keeps_the_positions(data):
    al = Algebra()
    axis = data.draw(expression(al))
    offset = data.draw(st.integers(1, axis.size - 1))
    two = al.cut(axis, offset)
    if two is None:
        return
    assert [find(t).size for t in two] == [offset, axis.size - offset]
    for leaf in leaves_below(axis):
        keep = np.ones(leaf.size, bool)
        keep[0] = False
        got = Keep({leaf: keep})
        parts = [got.mask(t) for t in two]
        joined = np.concatenate([np.ones(find(t).size, bool) if m is None else m for t, m in zip(two, parts, strict=True)])
        whole = got.mask(axis)
        assert joined.tolist() == (np.ones(axis.size, bool) if whole is None else whole).tolist()
