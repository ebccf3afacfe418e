"""Expressions made at random: trees of nodes, parts of stored tensors, selections over selections."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.model.dims.masks import to_ranges
from surgery.model.realise import Realiser, held, realise
from surgery.model.weights import (
    Add,
    Cast,
    Concat,
    Expr,
    Init,
    MatMul,
    Reshape,
    Scale,
    Select,
    Update,
    cast,
    describe,
    select,
)  # fmt: skip
from tests.test_weights_realise import stored


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parts_of_stored_tensors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any ranges on any axis of any dtype, also of tensors that start at odd offsets."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.uint8, torch.int64]))
    axis = data.draw(st.integers(0, len(shape) - 1))
    bounds = st.tuples(st.integers(0, shape[axis]), st.integers(0, shape[axis])).map(sorted).map(tuple)
    ranges = tuple(data.draw(st.lists(bounds, max_size=3)))
    value = torch.randint(0, 100, shape).to(dtype)
    path = tmp_path_factory.mktemp("p")
    w = stored(path, a=torch.ones(data.draw(st.integers(0, 9)), dtype=torch.uint8), z=value)
    pieces = [value.narrow(axis, s, e - s) for s, e in ranges]
    expected = torch.cat(pieces, axis) if pieces else value.narrow(axis, 0, 0)
    assert torch.equal(realise(Select(tuple(expected.shape), str(dtype)[6:], w["z"], axis, ranges)), expected)


def plain(expr: Expr) -> torch.Tensor:
    """Each node by itself, nothing shared, nothing in place: what the realiser must agree with."""
    match expr:
        case Select():
            pieces = [plain(expr.source).narrow(expr.axis, a, b - a) for a, b in expr.ranges]
            return torch.cat(pieces, expr.axis)
        case Concat():
            return torch.cat([plain(p) for p in expr.parts], expr.axis)
        case Reshape():
            return plain(expr.source).permute(expr.permute).reshape(expr.shape)
        case Cast():
            return plain(expr.source).to(getattr(torch, expr.dtype))
        case Scale():
            return (plain(expr.source).float() * expr.factor).to(getattr(torch, expr.dtype))
        case Add():
            return sum((plain(p).float() for p in expr.parts[1:]), plain(expr.parts[0]).float()).to(getattr(torch, expr.dtype))
        case MatMul():
            return (plain(expr.left).float() @ plain(expr.right).float()).to(getattr(torch, expr.dtype))
        case Update():
            out = plain(expr.source).clone()
            at = 0
            for a, b in expr.ranges:
                out.narrow(expr.axis, a, b - a).copy_(plain(expr.part).narrow(expr.axis, at, b - a))
                at += b - a
            return out
    return realise(expr)


def step(kind: int, a: Expr, b: Expr, dtype: str) -> Expr:
    n = a.shape[0]
    match kind:
        case 0:
            return Scale(a.shape, a.dtype, a, 0.5)
        case 1:
            return Add(a.shape, dtype, (a, b, a))
        case 2:
            return MatMul(a.shape, dtype, a, b)
        case 3:
            return Cast(a.shape, dtype, a)
        case 4:
            return Reshape(a.shape, a.dtype, a, (1, 0))
        case 5:
            return Concat(a.shape, a.dtype, (select(a, 0, ((0, 1),)), cast(select(b, 0, ((1, n),)), a.dtype)), 0)
    return Update(a.shape, a.dtype, a, cast(select(b, 1, ((0, 1),)), a.dtype), 1, ((n - 1, n),))


def grow(data: st.DataObject, leaves: list[Expr]) -> list[Expr]:
    """A few square expressions over each other, with many shared nodes."""
    made = list(leaves)
    for _ in range(data.draw(st.integers(1, 10))):
        a, b = data.draw(st.sampled_from(made)), data.draw(st.sampled_from(made))
        made.append(step(data.draw(st.integers(0, 6)), a, b, data.draw(st.sampled_from(["float32", "bfloat16"]))))
    return made


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_trees_agree_with_node_by_node_evaluation(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("t")
    leaves: list[Expr] = [
        stored(folder, a=torch.randn(3, 3, generator=generator))["a"],
        held(torch.randn(3, 3, generator=generator)),
        held(torch.randn(3, 3, generator=generator).bfloat16()),
        Init((3, 3), "float32", "normal", (0.0, 1.0), 5),
    ]
    exprs = grow(data, leaves)
    weights = {str(i): e for i, e in enumerate(exprs)}
    realiser = Realiser(weights, max_bytes=data.draw(st.sampled_from([0, 80, 1 << 20])))
    for _ in range(2):
        for name, expr in weights.items():
            assert torch.equal(realiser[name], plain(expr)), describe(expr)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_selections_over_selections_agree_with_indexing(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any axes in any order, few pieces and many, of a tensor in memory and of a stored one."""
    value = torch.arange(7 * 150 * 5.0).reshape(7, 150, 5)
    expr = held(value) if data.draw(st.booleans()) else stored(tmp_path_factory.mktemp("t"), a=value)["a"]
    for _ in range(data.draw(st.integers(2, 4))):
        axis = data.draw(st.integers(0, 2))
        size = expr.shape[axis]
        kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=torch.bool)
        if data.draw(st.booleans()):
            kept[:] = kept.sum() * 2 < size  # all or nothing of it
        runs = to_ranges(kept.numpy())
        if runs:
            expr, value = select(expr, axis, runs), value.index_select(axis, kept.nonzero().reshape(-1))
    assert torch.equal(realise(expr), value)
