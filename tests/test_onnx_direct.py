"""Graphs that write into values become exported programs without a trace where nobody could tell, and only there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from surgery.backends.fuse.flatten import flatten_live
from surgery.backends.onnx_direct import assembled
from surgery.model.live import Tensors, live_root
from surgery.opening import capture
from surgery.passes import registry


class Writes(nn.Module):
    """A product, and something that is done with its result."""

    def __init__(self, act: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.act(self.first(x), x))  # type: ignore[no-any-return]


def normalised(x: Tensor, given: Tensor) -> Tensor:
    best, _ = x.topk(6, -1)
    best /= best.abs().sum(-1, keepdim=True)
    return best


def read_before(x: Tensor, given: Tensor) -> Tensor:
    top = x.amax(-1, keepdim=True)
    return x.sub_(top).exp_()


def read_after(x: Tensor, given: Tensor) -> Tensor:
    y = x.mul(2)
    z = y.unsqueeze(0)
    y.exp_()
    return y + z[0]


def through_a_view(x: Tensor, given: Tensor) -> Tensor:
    y = x.mul(2)
    turned = y.transpose(0, 1)
    y.exp_()
    return turned.transpose(0, 1)


def into_the_input(x: Tensor, given: Tensor) -> Tensor:
    return x + given.mul_(2).sum()


def program_of(act: Callable[[Tensor, Tensor], Tensor]) -> tuple[object, nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Writes(act).eval(), torch.randn(5, 4)
    made = capture(model, (x.clone(),))
    flat = flatten_live(made, live_root(made, Tensors(registry.function)))
    return assembled(flat, (x,), lambda: pytest.fail("traced")), model, x


@pytest.mark.parametrize("act", [normalised, read_before])
def test_what_nobody_can_tell_is_not_traced(act: Callable[[Tensor, Tensor], Tensor]) -> None:
    found, model, x = program_of(act)
    assert found is not None
    assert not any(n.target._schema.is_mutable for n in found.graph.nodes if isinstance(n.target, torch._ops.OpOverload))  # type: ignore[attr-defined]
    torch.testing.assert_close(found.module()(x.clone()), (model(x.clone()),), rtol=0, atol=1e-6)  # type: ignore[attr-defined]


@pytest.mark.parametrize("act", [read_after, through_a_view, into_the_input])
def test_what_is_read_in_another_way_is_traced(act: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert program_of(act)[0] is None
