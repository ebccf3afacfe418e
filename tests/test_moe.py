"""The block of experts against a loop over tokens, its losses against worked numbers, and the division of units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surgery.model import moe_split
from surgery.model.moe import MOST_NOTED, Layout, MoeBlock, RouterTap, load_balance, within_capacity, z_loss
from surgery.model.realise import held, realise
from surgery.model.weights import Apply
from surgery.passes import registry


class Gated(nn.Module):
    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate) * up


def block(layout: Layout) -> MoeBlock:
    torch.manual_seed(0)
    made = MoeBlock(layout, Gated() if layout.gated else nn.GELU())
    for p in made.parameters():
        nn.init.normal_(p, std=0.5)
    return made


def by_hand(made: MoeBlock, x: Tensor) -> Tensor:
    """Token by token, choice by choice."""
    layout, e = made.layout, made.experts
    p = torch.softmax(x @ made.gate.weight.t(), -1)
    order = torch.argsort(p, dim=-1, descending=True)[:, : layout.top_k]
    limit = max(1, int(layout.capacity * layout.top_k * len(x) / layout.experts)) if layout.capacity else len(x) * layout.top_k
    load = [0] * layout.experts
    out = x.new_zeros(len(x), layout.out)
    for choice in range(layout.top_k):
        for token in range(len(x)):
            expert = int(order[token, choice])
            load[expert] += 1
            if load[expert] > limit:
                continue
            chosen = p[token, order[token]]
            weight = {"mixtral": p[token, expert] / chosen.sum(), "switch": p[token, expert], "sum": torch.ones(())}[
                layout.router
            ] * layout.scale
            name = "gate_up_proj" if layout.gated else "up_proj"
            h = getattr(e, name)[expert] @ x[token]
            h = h + getattr(e, f"{name}_bias")[expert] if layout.up_bias else h
            h = made.act(*h.chunk(2)) if layout.gated else made.act(h)
            y = e.down_proj[expert] @ h
            y = y + e.down_proj_bias[expert] if layout.down_bias else y
            out[token] += weight * y
    return out


@pytest.mark.parametrize("router", ["mixtral", "switch", "sum"])
@pytest.mark.parametrize(("gated", "bias", "capacity"), [(True, False, 0.0), (False, True, 0.0), (True, True, 1.0), (False, False, 1.2)])
def test_the_block_is_a_loop_over_tokens(router: str, gated: bool, bias: bool, capacity: float) -> None:
    made = block(Layout(6, 5, 7, 4, 2, gated, bias, bias, router, 1.5, capacity))
    x = torch.randn(13, 6)
    torch.testing.assert_close(made(x), by_hand(made, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("router", ["mixtral", "switch", "sum"])
def test_the_router_learns(router: str) -> None:
    made = block(Layout(6, 6, 7, 4, 2, router=router))
    made(torch.randn(30, 6)).square().mean().backward()
    assert made.gate.weight.grad is not None and float(made.gate.weight.grad.abs().min(dim=1).values.max()) > 0
    assert all(float(g.abs().max()) > 0 for g in made.experts.up_proj.grad)  # type: ignore[union-attr]


def test_one_expert_is_the_dense_block() -> None:
    made = block(Layout(6, 6, 7, 1, 1, up_bias=True, down_bias=True, router="switch"))
    x, e = torch.randn(9, 6), made.experts
    dense = made.act(x @ e.up_proj[0].t() + e.up_proj_bias[0]) @ e.down_proj[0].t() + e.down_proj_bias[0]
    torch.testing.assert_close(made(x), dense)


def test_capacity_drops_what_comes_late() -> None:
    chosen = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0]])  # experts 0, 1, 2 of 3, four tokens, two choices each
    # int(1 * 2 * 4 / 3) = 2 places; expert 0 is full after two first choices, expert 1 has one first choice (token 3) and one second
    wanted = torch.tensor([[1, 1], [1, 0], [0, 1], [1, 0]])
    assert torch.equal(within_capacity(chosen, 3, 1.0), wanted.float())
    assert within_capacity(chosen, 3, 3 / 2).sum() == 8 and within_capacity(torch.zeros(5, 1, dtype=torch.long), 64, 1.0).sum() == 1


@pytest.mark.parametrize("tokens", [1, 7, 40, 333])
@pytest.mark.parametrize(("k", "experts", "capacity"), [(1, 4, 1.0), (2, 4, 1.2), (2, 10, 1.25), (3, 7, 2.0)])
def test_capacity_is_the_published_number(tokens: int, k: int, experts: int, capacity: float) -> None:
    """Everybody wants the same ``k`` experts: as many stay as there are places."""
    chosen = torch.arange(k).expand(tokens, k)
    assert int(within_capacity(chosen, experts, capacity).sum()) == k * min(tokens, max(1, int(capacity * k * tokens / experts)))


# ------------------------------------------------------------------ losses


def test_worked_load_balance() -> None:
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]])
    assert float(load_balance(probs, torch.topk(probs, 2).indices)) == pytest.approx(1.0875)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_uniform_routing_gives_one(k: int) -> None:
    chosen = torch.stack([(torch.arange(k) + t) % 8 for t in range(16)])
    assert float(load_balance(torch.full((16, 8), 1 / 8), chosen)) == pytest.approx(1.0)
    assert float(z_loss(torch.zeros(16, 8))) == pytest.approx(float(np.log(8)) ** 2)


def test_load_balance_is_that_of_transformers_over_the_number_of_choices() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(50, 6)
    probs = torch.softmax(logits, -1)
    theirs = load_balancing_loss_func((logits,), 6, 2)
    assert float(theirs) == pytest.approx(2 * float(load_balance(probs, torch.topk(probs, 2).indices)), rel=1e-5)


def test_the_tap_notes_each_pass_once_and_only_in_training() -> None:
    tap, logits = RouterTap(2, balance=0.5, z=0.1), torch.randn(20, 4, requires_grad=True)
    probs = torch.softmax(logits, -1)
    once = 0.5 * load_balance(probs, torch.topk(probs, 2).indices) + 0.1 * z_loss(logits)
    assert tap.eval()(logits) is logits and tap.extra_loss(tap) is None
    tap.train()
    with torch.no_grad():
        tap(logits)
    assert tap.extra_loss(tap) is None
    assert tap(logits) is logits
    tap(logits)
    found = tap.extra_loss(tap)
    assert found is not None and float(found) == pytest.approx(2 * float(once)) and tap.extra_loss(tap) is None
    found.backward()
    assert logits.grad is not None and float(logits.grad.abs().sum()) > 0
    tap(logits)
    tap.step_begin(tap, 0)
    assert tap.extra_loss(tap) is None
    with pytest.warns(UserWarning, match="not collected"):  # a loop that never asks must hear of it, and must not fill the memory
        for _ in range(MOST_NOTED + 3):
            tap(logits)
    assert len(tap.noted) == MOST_NOTED
    noisy = RouterTap(2, jitter=0.25).train()
    spread = noisy(torch.zeros(20_000, 4))
    assert float(spread.std()) == pytest.approx(0.25, rel=0.02) and noisy.extra_loss(noisy) is None


# ------------------------------------------------------------------ dividing units


def test_clusters_are_equal_and_find_what_belongs_together() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=1)
    kind = torch.arange(64) % 4
    rows = (centres[kind] + 0.05 * torch.randn(64, 16, generator=generator)) * torch.rand(64, 1, generator=generator).add(0.1)
    order = moe_split.balanced_clusters(rows, 4, seed=3)
    assert torch.equal(order.sort().values, torch.arange(64))
    parts = order.reshape(4, 16)
    assert all(len(set(kind[p].tolist())) == 1 for p in parts)
    assert torch.equal(parts, parts.sort(dim=1).values)


def test_assignment_is_near_the_best_there_is() -> None:
    from scipy.optimize import linear_sum_assignment

    likeness = np.random.default_rng(0).normal(size=(96, 6))
    owner = moe_split.assign(likeness, 16)
    assert np.bincount(owner).tolist() == [16] * 6
    rows, columns = linear_sum_assignment(-np.repeat(likeness, 16, axis=1))
    assert likeness[np.arange(96), owner].sum() >= 0.98 * likeness[rows, columns // 16].sum()


def test_a_division_is_the_same_whatever_the_threads() -> None:
    rows = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    expr = Apply((512,), "int64", "convert/moe:cluster", (held(rows),), (("parts", 8), ("seed", 5)))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(realise(expr, functions=registry.function))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)
    other = realise(
        Apply((512,), "int64", "convert/moe:shuffle", (), (("width", 512), ("parts", 8), ("seed", 5))), functions=registry.function
    )
    assert torch.equal(other.sort().values, torch.arange(512)) and not torch.equal(other, found[0])


def test_parts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="10 rows cannot be 4 equal parts"):
        moe_split.balanced_clusters(torch.randn(10, 3), 4, 0)
