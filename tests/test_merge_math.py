"""The arithmetic of merging against worked numbers, and its algebra."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.passes import registry
from surgery.passes.kinds import merge_global, merge_math, merge_sparse
from surgery.passes.kinds.merge_angles import arc, products
from surgery.passes.kinds.merge_math import chunks, delta_of
from surgery.passes.kinds.merge_sparse import Drop, Ranking, norm_ratio, ranks, top


def run(
    name: str, base: Tensor, *experts: Tensor, weights: tuple[float, ...] = (), seed: int = 0, prepared: tuple = (), **params: object
) -> Tensor:
    function = registry.function(f"merge/{name}:merged")
    return function(base, *experts, weights=weights or (1.0,) * len(experts), seed=seed, prepared=prepared, **params)


def t(*values: float) -> Tensor:
    return torch.tensor(values)


ZERO = torch.zeros(4)
TAU = t(3, -1, 0.5, 0.2), t(-1, -2, 0.6, 0.1)


def close(a: Tensor, b: Tensor, within: float = 1e-6) -> bool:
    return a.shape == b.shape and bool((a.double() - b.double()).abs().max() <= within)


def test_slerp_worked_numbers() -> None:
    assert close(run("slerp", torch.zeros(2), t(1, 0), t(0, 1), t=0.5), t(0.707107, 0.707107))
    assert close(run("slerp", torch.zeros(2), t(2, 0), t(0, 1), t=0.25), t(1.847759, 0.382683))
    v = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    w = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    assert close(run("slerp", v, v, v, t=0.3), v)
    assert torch.equal(run("slerp", v, v, w, t=0.0), v) and torch.equal(run("slerp", v, v, w, t=1.0), w)
    assert close(run("nuslerp", v, v, w, weights=(0.7, 0.3)), run("slerp", v, v, w, t=0.3), 2e-6)
    rows = run("nuslerp", v, v, w, weights=(1.0, 1.0), along="row")
    assert close(rows[2], run("slerp", v[2], v[2], w[2], t=0.5), 2e-6)
    columns = run("nuslerp", v, v, w, weights=(1.0, 1.0), along="column")
    assert close(columns[:, 3], run("slerp", v[:, 3], v[:, 3].contiguous(), w[:, 3].contiguous(), t=0.5), 2e-6)
    shifted = run("nuslerp", v, v + w, v + t(*w.flatten().tolist()).reshape(7, 5) * 2, weights=(1.0, 1.0), deltas=True)
    assert close(shifted - v, w * 1.5, 2e-6)  # colinear task vectors are interpolated linearly


def test_ties_worked_numbers() -> None:
    trimmed = {"trim": "tensor", "density": 0.5}
    assert close(run("ties", ZERO, *TAU, **trimmed), t(3, -1.5, 0, 0))
    assert close(run("ties", ZERO, *TAU, weights=(1, 0.5), elect="weighted", divide="weight", **trimmed), t(3, -1.333333, 0, 0))
    # signs before the factors, divided by the count
    assert close(run("ties", ZERO, *TAU, weights=(1, 0.5), **trimmed), t(3, -1, 0, 0))
    assert torch.equal(run("ties", ZERO, TAU[0], density=1.0, trim="tensor"), TAU[0])
    assert torch.equal(run("ties", ZERO, TAU[0], density=0.0, trim="tensor"), ZERO)


def test_what_is_rounded_when() -> None:
    """Products, then sums, then the division, each rounded by itself: the order of common tools, whose results are these bits."""
    a, b = (torch.randn(9, 7, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    assert torch.equal(run("linear", a, a, b, weights=(0.7, 0.4)), (a * 0.7).addcmul(b, torch.tensor(0.4)) / 1.1)
    base = torch.randn(9, 7, generator=torch.Generator().manual_seed(2))
    change = (a - base) * 0.7 + (b - base) * 0.4
    assert torch.equal(run("task_arithmetic", base, a, b, weights=(0.7, 0.4), scale=0.6), base + change * 0.6)


def test_a_tensor_keeps_at_least_one_entry() -> None:
    assert torch.equal(run("ties", ZERO, TAU[0], density=0.01, trim="tensor"), t(3, 0, 0, 0))
    dense = run("breadcrumbs", ZERO, TAU[0], density=0.75, gamma=0.5, per="tensor", scale=1.0)
    assert torch.equal(dense, t(0, -1, 0.5, 0.2))  # three of four are kept, so one goes and not two


def test_dare_worked_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    tau, drawn = t(1, -2, 3, -4), np.array([0, 0, 0, 1], np.uint8)
    monkeypatch.setattr(merge_sparse.Chance, "__call__", lambda self, at: drawn[at])
    assert close(run("dare", ZERO, tau, density=0.5), t(0, 0, 0, -8))
    assert close(run("dare", ZERO, tau, density=0.5, rescale="l1"), t(0, 0, 0, -10))
    assert close(run("dare", ZERO, tau, density=0.5, rescale="none"), t(0, 0, 0, -4))


def test_dare_keeps_the_mean_and_the_seed() -> None:
    tau = torch.randn(64, 32, generator=torch.Generator().manual_seed(2))
    base = torch.zeros(64, 32)
    mean = torch.stack([run("dare", base, tau, density=0.5, seed=s) for s in range(400)]).mean(0)
    assert float((mean - tau).abs().max()) < 5 * float(tau.abs().max()) / math.sqrt(400)
    assert torch.equal(run("dare", base, tau, density=0.3, seed=7), run("dare", base, tau, density=0.3, seed=7))
    assert not torch.equal(run("dare", base, tau, density=0.3, seed=7), run("dare", base, tau, density=0.3, seed=8))
    assert torch.equal(run("dare", base, tau, density=1.0), run("task_arithmetic", base, tau))
    kept = float((run("dare", base, tau, density=0.25) != 0).double().mean())
    assert abs(kept - 0.25) < 0.05
    assert torch.equal(run("darex_q", base, tau, density=0.25, q=0.25, seed=5), run("dare", base, tau, density=0.25, seed=5))
    half = run("darex_q", base, tau, density=0.25, q=0.5, seed=5)
    assert close(half * 2, run("dare", base, tau, density=0.25, seed=5), 1e-5)


def test_the_bound_chooses_q_as_worked_out() -> None:
    from surgery.passes.merge.darex_q import bounded_q

    rows = torch.tensor([[-8.0, -6.0, -9.0]])
    assert abs(bounded_q(lambda at: rows.reshape(-1)[at], (1, 3), 0.01, 0.37) - 0.532) < 1e-9


def test_breadcrumbs_and_della_worked_numbers() -> None:
    tau = t(4, -1, 2, -3)
    assert close(run("breadcrumbs", ZERO, tau, density=0.5, gamma=0.25, per="tensor", scale=1.0), t(0, 0, 2, -3))
    assert close(run("breadcrumbs", ZERO, tau, density=0.5, gamma=0.25, per="row", scale=1.0), t(0, 0, 2, -3))
    small = run("breadcrumbs", ZERO, tau, density=0.5, gamma=0.0, per="tensor", scale=1.0)
    assert close(small, t(4, 0, 0, -3))  # nothing to cut off at the top is nothing cut off
    drop = merge_sparse.RankedDrop(4, 0.5, 0.2, True, 0)
    assert close(drop.probabilities(torch.tensor([[0.1, -0.4, 0.2, 0.3]]))[0], t(0.3, 0.7, 0.433333, 0.566667))
    assert merge_sparse.RankedDrop(1, 0.5, 0.2, True, 0).probabilities(torch.ones(3, 1)).tolist() == [[0.5]] * 3
    assert merge_sparse.RankedDrop(4, 0.0, 0.0, True, 0)(tau.float(), slice(0, 4)).tolist() == [0.0] * 4  # never stays, divided by nothing
    flatter = run("della", torch.zeros(8, 16), torch.ones(8, 16), density=0.5, epsilon=0.0, seed=3, ties=False)
    assert set(flatter.unique().tolist()) <= {0.0, 2.0}


def test_model_stock_worked_numbers() -> None:
    base = torch.zeros(3)
    assert close(run("model_stock", base, t(1, 0, 0), t(0.6, 0.8, 0)), t(0.6, 0.3, 0))
    assert close(run("model_stock", base, t(1, 2, 3), t(1, 2, 3)), t(1, 2, 3))
    assert close(run("model_stock", t(5, 5, 5), t(6, 5, 5), t(5, 6, 5)), t(5, 5, 5))
    assert torch.equal(run("model_stock", t(5, 5, 5), t(6, 5, 5), t(4, 5, 5)), t(5, 5, 5))  # opposite offsets: 1 + (N - 1) c is zero
    pair = torch.stack([t(1, 0, 0), t(1, 2, 3)]), torch.stack([t(0.6, 0.8, 0), t(1, 2, 3)])
    assert close(run("model_stock", torch.zeros(2, 3), *pair, rows=True), torch.stack([t(0.6, 0.3, 0), t(1, 2, 3)]))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.integers(0, 400), st.integers(0, 5), st.booleans())
def test_the_top_is_exact_and_takes_the_first_of_equals(n: int, keep: int, seed: int, coarse: bool) -> None:
    values = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    values = values.round() if coarse else values
    before = merge_math.CHUNK
    merge_math.CHUNK = 37
    try:
        found = []
        clean = top(lambda at: values[at].clone(), (n, 1), keep)
        for at in chunks((n, 1)):
            found.append(clean(values[at].clone(), at))
    finally:
        merge_math.CHUNK = before
    order = np.argsort(-values.abs().numpy(), kind="stable")[: min(keep, n)]
    expected = torch.zeros(n)
    expected[torch.from_numpy(order)] = values[torch.from_numpy(order)]
    assert torch.equal(torch.cat(found), expected)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=9), st.integers(1, 4))
def test_ranks_order_a_row(values: list[float], rows: int) -> None:
    row = torch.tensor([values] * rows)
    place = ranks(row)
    order = sorted(range(len(values)), key=lambda i: (abs(values[i]), -i))
    assert place[0].tolist() == [order.index(i) for i in range(len(values))]
    assert torch.equal(place, place[:1].expand_as(place))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-2, 2), min_size=2, max_size=4), st.integers(0, 9))
def test_task_arithmetic_is_linear_in_its_factors(weights: list[float], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(5, 6, generator=g)
    experts = [torch.randn(5, 6, generator=g) for _ in weights]
    together = run("task_arithmetic", base, *experts, weights=tuple(weights))
    alone = sum(run("task_arithmetic", base, e, weights=(w,)) - base for e, w in zip(experts, weights, strict=True))
    assert close(together - base, alone, 1e-4)
    assert torch.equal(run("task_arithmetic", base, *experts, weights=(0.0,) * len(experts)), base)


def test_linear_is_an_average() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(9, 4, generator=g), torch.randn(9, 4, generator=g)
    assert torch.equal(run("linear", a, a, weights=(3.0,)), a)
    assert torch.equal(run("linear", a, a, b, weights=(1.0, 1.0)), run("linear", a, b, a, weights=(2.0, 2.0)))
    assert close(run("linear", a, a, b, weights=(0.5, 2.0), normalize=False), 0.5 * a + 2 * b)
    half = run("linear", a.bfloat16(), a.bfloat16(), b.bfloat16(), weights=(1.0, 3.0))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, ((a.bfloat16().float() * 0.25) + b.bfloat16().float() * 0.75).bfloat16())


def test_the_arc_meets_its_ends() -> None:
    assert arc(0.3, 0.0) == (1.0, 0.0) and arc(0.99999, 0.25) == (0.75, 0.25)
    a, b = arc(0.0, 0.5)
    assert abs(a - math.sqrt(0.5)) < 1e-12 and abs(b - math.sqrt(0.5)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_are_those_of_float64(dtype: torch.dtype) -> None:
    """Over several chunks, of vectors with a mean and nearly the same direction, where rounding would show."""
    shape = (3, merge_math.CHUNK)
    left = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 3).to(dtype)
    right = (left.float() + 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(2))).to(dtype)
    a, b = left.double().flatten(), right.double().flatten()
    for got, want in zip(products(left, right), (a @ a, b @ b, a @ b), strict=True):
        assert got == pytest.approx(float(want), rel=1e-6 if dtype.itemsize < 4 else 1e-12)
    if dtype == torch.bfloat16:  # squares that float32 cannot hold
        assert products(left * 1e20, right * 1e20)[2] == pytest.approx(
            float((left * 1e20).double().flatten() @ (right * 1e20).double().flatten())
        )


def test_the_l1_norm_comes_back() -> None:
    base, expert = torch.zeros(40, 30), torch.randn(40, 30, generator=torch.Generator().manual_seed(4))
    delta = delta_of(expert, base)
    factor = norm_ratio(delta, (40, 30), lambda: Drop(0.3, 1.0, 9))
    whole = slice(0, 1200)
    kept = Drop(0.3, factor, 9)(delta(whole), whole)
    assert abs(float(kept.abs().sum() / expert.abs().sum()) - 1) < 1e-5
    ranking = Ranking()
    ranking.count(expert.reshape(-1))
    assert ranking.total == 1200


def test_many_equal_entries_are_ranked_without_gathering_them() -> None:
    """More entries than a sample, nearly all of one magnitude: exactly the first of them stay."""
    n = 6 * merge_sparse.SAMPLE
    values = torch.ones(n)
    values[::7] = -3.0
    keep = n // 2
    clean = top(lambda at: values[at].clone(), (n, 1), keep)
    found = torch.cat([clean(values[at].clone(), at) for at in chunks((n, 1))])
    order = np.argsort(-values.abs().numpy(), kind="stable")[:keep]
    expected = torch.zeros(n)
    expected[torch.from_numpy(order)] = values[torch.from_numpy(order)]
    assert torch.equal(found, expected)
    spread = torch.randn(n, generator=torch.Generator().manual_seed(1))
    clean = top(lambda at: spread[at].clone(), (n, 1), keep)
    assert int((torch.cat([clean(spread[at].clone(), at) for at in chunks((n, 1))]) != 0).sum()) == keep


def test_what_was_drawn_for_the_norm_is_what_drops() -> None:
    """Over several chunks: the factor is that of the same draws, and the entries that stay are those of a stream drawn anew."""
    shape = (3, 2 * merge_math.CHUNK // 5)
    base, expert = torch.zeros(shape), torch.randn(shape, generator=torch.Generator().manual_seed(5))
    delta = delta_of(expert, base)
    assert len(list(chunks(shape))) > 1
    factor = norm_ratio(delta, shape, lambda: Drop(0.3, 1.0, 9))
    kept = merge_sparse.Restored(0.3, 9)
    for at in chunks(shape):
        kept.measure(delta(at), at)
    kept.settle()
    assert kept.factor == factor > 3
    again, share = Drop(0.3, kept.factor, 9), 0
    for at in chunks(shape):
        found = kept(delta(at), at).clone()
        assert torch.equal(found, again(delta(at), at))
        share += int(found.count_nonzero())
    assert abs(share / expert.numel() - 0.3) < 0.005


@pytest.mark.parametrize("digits", [12, 3, 0])
@pytest.mark.parametrize("probability", [0.0, 2**-20, 0.1, 0.25, 0.5, 0.7, 1 - 2**-13, 1.0])
def test_chance_keeps_the_share_that_it_is_asked_for(probability: float, digits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever ranges are asked for, the same entries stay, and of them the share that the probability says, up to six standard deviations;
    however many entries are left to draw their last digits by themselves."""
    monkeypatch.setattr(merge_sparse.Chance, "DIGITS", digits)
    total = 5 * merge_sparse.Chance.BLOCK + 77
    whole = merge_sparse.Chance(3, probability)(slice(0, total))
    edges = [0, 3, 77, merge_sparse.Chance.BLOCK - 1, 2 * merge_sparse.Chance.BLOCK + 64, 4 * merge_sparse.Chance.BLOCK, total]
    parts = merge_sparse.Chance(3, probability, again=True)
    for _ in range(2):
        found = np.concatenate([parts(slice(a, b)) for a, b in itertools.pairwise(edges)])
        assert np.array_equal(found, whole)
    assert set(np.unique(whole)) <= {0, 1}
    assert abs(int(whole.sum()) - probability * total) <= 6 * math.sqrt(total * probability * (1 - probability))
    other = merge_sparse.Chance(4, probability)(slice(0, total))
    both = probability * probability
    assert abs(int((whole & other).sum()) - both * total) <= 6 * math.sqrt(total * both * (1 - both))


def test_one_widened_chunk_serves_all_models_and_the_result() -> None:
    base = torch.randn(4, merge_math.CHUNK // 2, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    wide = merge_math.Wide(base)
    first, second = chunks(base.shape)
    assert wide(first).data_ptr() == wide(first).data_ptr() and torch.equal(wide(first), base[:2].flatten().float())
    assert torch.equal(wide(second), base[2:].flatten().float()) and torch.equal(wide(first), base[:2].flatten().float())
    assert torch.equal(delta_of(base * 3, wide)(second), (base * 3)[2:].flatten().float() - base[2:].flatten().float())


@pytest.mark.parametrize("zero", [1.0, -1.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 2.0, -0.25), (1.0, 3.0, 2.0)])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("divide", ["count", "weight", "none"])
def test_elections_are_those_of_the_definition(zero: float, weights: tuple[float, ...], weighted: bool, divide: str) -> None:
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randint(-2, 3, (400,), generator=generator).float() for _ in weights]
    got = merge_math.elect(
        [p.clone() for p in parts], weights, weighted=weighted, by_weight=divide == "weight", zero=zero, mean=divide != "none"
    )
    scaled = [p * w for p, w in zip(parts, weights, strict=True)]
    voting = scaled if weighted else parts
    for i in range(400):
        total = sum(float(p[i]) for p in voting)
        sign = math.copysign(1, total) if total else zero
        agree = [k for k, p in enumerate(voting) if float(p[i]) * sign > 0]
        value = sum(float(scaled[k][i]) for k in agree)
        count = sum(weights[k] for k in agree) if divide == "weight" else len(agree) if divide == "count" else 1.0
        assert float(got[i]) == pytest.approx(value / (count or 1), abs=1e-6), i


def sparse(seed: int, moved: int = 900, shape: tuple[int, int] = (5, 9001)) -> Tensor:
    """A task vector most of whose entries did not change."""
    generator = torch.Generator().manual_seed(seed)
    tau = torch.zeros(math.prod(shape))
    tau[torch.randperm(tau.numel(), generator=generator)[:moved]] = torch.randn(moved, generator=generator)
    return tau.view(shape)


@pytest.mark.parametrize("keep", [1, 300, 899, 900, 901, 20000])
def test_entries_that_did_not_change_are_not_ranked(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_sparse, "Ranking", lambda: pytest.fail("two more passes"))
    tau = sparse(1)
    delta = delta_of(tau, torch.zeros(tau.shape))
    clean = top(delta, tau.shape, keep)
    found = torch.cat([clean(delta(at), at).clone() for at in chunks(tau.shape)])
    order = tau.flatten().abs().argsort(descending=True, stable=True)[: min(keep, 900)]
    assert int(found.count_nonzero()) == min(keep, 900) and torch.equal(found[order], tau.flatten()[order])


@pytest.mark.parametrize("held", [merge_global.HELD, 10])
@pytest.mark.parametrize("keep", [5, 1000, 1800, 30000])
def test_a_threshold_of_the_whole_model_ignores_what_did_not_change(keep: int, held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors, two models, one of which hardly moved; with little room the same thresholds are counted."""
    monkeypatch.setattr(merge_global, "HELD", held)
    experts = [[sparse(1), sparse(2)], [sparse(3), torch.randn(5, 9001, generator=torch.Generator().manual_seed(4))]]

    def walk() -> Iterator[tuple[str, Tensor, list[Tensor]]]:
        for i in range(2):
            yield str(i), torch.zeros(5, 9001), [e[i] for e in experts]

    found = merge_global._thresholds(walk, 2, keep, 2 * 5 * 9001)
    for mine, (key, ties) in zip(experts, found, strict=True):
        clean = merge_sparse.Top(key, ties)
        left = torch.cat([clean(t.flatten().clone(), slice(0, t.numel())) for t in mine])
        every = torch.cat([t.flatten() for t in mine])
        moved = min(keep, int(every.count_nonzero()))
        order = every.abs().argsort(descending=True, stable=True)[:moved]
        assert int(left.count_nonzero()) == moved and torch.equal(left[order], every[order])
