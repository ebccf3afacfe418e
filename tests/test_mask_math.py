"""What `prune mask` chooses: counts, ties, the worked numbers of Wanda and SparseGPT, and SparseGPT against a reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.passes.kinds.geometry import Geometry
from surgery.passes.prune.mask import Mask, lowest, lowest_of_groups, share_of, sparsegpt

W = torch.tensor([[1, -2, 3, 0.5], [4, 0.1, -1, 2]])
X = torch.tensor([[1.0, 0, 2, 1], [1, 1, 0, 3]])


def geometry(out: int, inp: int, experts: int = 0) -> Geometry:
    return Geometry("experts" if experts else "linear", out, inp, out, experts=experts)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_exactly_the_lowest_go_and_of_equal_ones_the_first(n: int, values: int, seed: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, n))
    score = torch.randint(0, values, (3, n), generator=torch.Generator().manual_seed(seed)).float()
    drop = lowest(score, count)
    for row, gone in zip(score.tolist(), drop, strict=True):
        expected = sorted(range(n), key=lambda i: (row[i], i))[:count]
        assert sorted(gone.nonzero().flatten().tolist()) == sorted(expected)


def test_shares_are_decimal() -> None:
    assert [share_of(100, 0.29), share_of(10, 0.3), share_of(7, 0.5), share_of(768 * 768, 0.5)] == [29, 3, 3, 294912]


def test_groups_keep_n_of_m() -> None:
    drop = lowest_of_groups(torch.tensor([[3.0, 1, 2, 0, 5, 5, 5, 5]]), 2, 4)
    assert drop.tolist() == [[False, True, False, True, True, True, False, False]]


@pytest.mark.parametrize("method", [
    Mask(), Mask(ratio=0.3), Mask(ratio=0.3, per="row"), Mask(pattern="2:4"), Mask(pattern="1:8"), Mask(score="random", seed=3),
    Mask(score="wanda"), Mask(score="wanda", per="matrix", ratio=0.7), Mask(ratio=0.0),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("experts", [0, 3])
def test_drops_as_many_as_it_says(method: Mask, experts: int) -> None:
    site = geometry(7, 24, experts)
    weight = torch.randn(site.canonical, generator=torch.Generator().manual_seed(0))
    norms = torch.rand(24) + 0.1 if method.statistic else None
    drop = method.drop(site, weight, norms, None)
    assert int(drop.sum()) == method.dropped(site)
    if method.rows and method.group is None:
        assert set(drop.sum(-1).flatten().tolist()) == {share_of(24, method.share)}
    if experts and not method.rows:
        assert len(set(drop.flatten(1).sum(-1).tolist())) == 1
    if method.group:
        stay, of = method.group
        assert set((~drop).unflatten(-1, (-1, of)).sum(-1).flatten().tolist()) == {stay}


def test_what_went_before_goes_first() -> None:
    method, site = Mask(ratio=0.5), geometry(2, 4)
    gone = torch.tensor([[False, False, True, False], [True, False, False, False]])  # the two largest
    drop = method.drop(site, W, None, gone)
    assert bool(drop[gone].all()) and int(drop.sum()) == 4


def test_worked_numbers_of_wanda() -> None:
    norms = X.square().sum(0).sqrt()
    torch.testing.assert_close(norms, torch.tensor([1.414214, 1, 2, 3.162278]))
    for method in (Mask(score="wanda"), Mask(score="wanda", pattern="2:4"), Mask(pattern="2:4")):
        drop = method.drop(geometry(2, 4), W, norms if method.statistic else None, None)
        assert [row.nonzero().flatten().tolist() for row in drop] == [[0, 3], [1, 2]]


def test_wanda_on_equal_inputs_is_magnitude_by_row() -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(1))
    a = Mask(score="wanda", ratio=0.4).drop(geometry(6, 10), weight, torch.full((10,), 2.5), None)
    assert torch.equal(a, Mask(ratio=0.4, per="row").drop(geometry(6, 10), weight, None, None))


def squared_error(before: Tensor, after: Tensor, gram: Tensor) -> float:
    change = (before - after).double()
    return float((change @ gram.double() @ change.T).trace())


def test_worked_numbers_of_sparsegpt() -> None:
    """The published code drops everything up to a threshold, one entry more than its share: five of eight here."""
    gram = (X.T @ X).double()
    drop, new = sparsegpt(W, gram, lambda score, a, b: lowest(score.flatten(), 5).view(score.shape))
    assert [row.nonzero().flatten().tolist() for row in drop] == [[0, 1, 3], [0, 1]]
    torch.testing.assert_close(new, torch.tensor([[0, 0, 3.658118, 0], [0, 0, 0.304485, 3.363309]]), atol=1e-5, rtol=0)
    assert squared_error(W, new, gram) == pytest.approx(0.284639, abs=1e-5)
    assert squared_error(W, W.masked_fill(drop, 0), gram) == pytest.approx(35.310, abs=1e-3)


def obs(weight: Tensor, gram: Tensor, drop: Tensor) -> Tensor:
    """Optimal brain surgery column by column, with the inverse of what is left of the matrix computed anew each time."""
    w = weight.double().clone()
    h = gram + torch.eye(len(gram), dtype=torch.float64) * 0.01 * gram.diagonal().mean()
    for c in range(w.shape[1]):
        inverse = torch.linalg.inv(h[c:, c:])
        error = torch.where(drop[:, c], w[:, c], 0.0) / inverse[0, 0]
        w[:, c:] -= error[:, None] * inverse[0]
    return torch.where(drop, 0.0, w)


@pytest.mark.parametrize(
    "method", [Mask(score="sparsegpt"), Mask(score="sparsegpt", ratio=0.37), Mask(score="sparsegpt", pattern="2:4")], ids=str
)
@pytest.mark.parametrize("block", [4, 12, 128])
def test_sparsegpt_against_a_reference(method: Mask, block: int) -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(9, 24, generator=g)
    x = torch.randn(40, 24, generator=g).double() @ torch.randn(24, 24, generator=g).double()
    gram = x.T @ x
    if method.group:
        drop, new = sparsegpt(weight, gram, None, group=method.group, block=block)
    else:
        drop, new = sparsegpt(
            weight,
            gram,
            lambda s, a, b: lowest(s.flatten(), share_of(9 * b, method.share) - share_of(9 * a, method.share)).view(s.shape),
            block=block,
        )
    assert int(drop.sum()) == method.dropped(geometry(9, 24)) == int((new == 0).sum())
    torch.testing.assert_close(new.double(), obs(weight, gram, drop), atol=1e-5, rtol=1e-5)
    magnitude = Mask(pattern=method.pattern) if method.group else Mask(ratio=method.ratio)
    plain = weight.masked_fill(magnitude.drop(geometry(9, 24), weight, None, None), 0)
    assert squared_error(weight, new, gram) < squared_error(weight, plain, gram)
    if method.group is None and block == 128:  # all columns in one block: the lowest w^2 over what the inverse says of its column
        h = gram + torch.eye(24, dtype=torch.float64) * 0.01 * gram.diagonal().mean()
        score = weight.double() ** 2 / torch.stack([torch.linalg.inv(h[c:, c:])[0, 0] for c in range(24)])
        assert set(score.flatten().argsort()[: method.dropped(geometry(9, 24))].tolist()) == set(
            drop.flatten().nonzero().flatten().tolist()
        )


def test_sparsegpt_leaves_inputs_that_are_always_zero() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(30, 8, generator=g).double()
    x[:, 5] = 0
    weight = torch.randn(4, 8, generator=g)
    drop, new = Mask(score="sparsegpt", ratio=0.25).solve(geometry(4, 8), weight, x.T @ x, None) or pytest.fail("solves")
    assert int(drop.sum()) == 8 and bool(drop[:, 5].all())
    assert int((new == 0).sum()) == 8 and bool(torch.isfinite(new).all())
    few, kept = Mask(score="sparsegpt", ratio=0.1).solve(geometry(4, 8), weight, x.T @ x, None) or pytest.fail("solves")
    assert int(few.sum()) == 3 and int((kept == 0).sum()) == 3  # one of the four weights of the dead input stays, with its value
    assert torch.equal(kept[:, 5][~few[:, 5]], weight[:, 5][~few[:, 5]])


@pytest.mark.parametrize(("values", "part"), [
    ({"ratio": 0.5, "pattern": "2:4"}, "both say"), ({"pattern": "4:2"}, "not of the form"), ({"pattern": "0:4"}, "not of the form"),
    ({"pattern": "half"}, "not of the form"), ({"pattern": "2:4", "per": "row"}, "leave `per` out"),
    ({"score": "sparsegpt", "per": "row"}, "leave `per` out"),
])  # fmt: skip
def test_parameters_that_do_not_go_together(values: dict[str, object], part: str) -> None:
    with pytest.raises(ValueError, match=part):
        Mask(**values)
