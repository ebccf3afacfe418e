"""The product of sorted rows: values, gradients, sizes and types that torch's own operation refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from surgery.model.grouped import grouped_mm


def reference(x: Tensor, weight: Tensor, offsets: list[int]) -> Tensor:
    rows = torch.repeat_interleave(torch.arange(len(offsets)), torch.diff(torch.tensor([0, *offsets])))
    out = torch.einsum("ni,nio->no", x[: len(rows)], weight[rows])
    return torch.cat([out, x.new_zeros(len(x) - len(rows), weight.shape[-1])])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(8, 16), (7, 5)])
def test_values_and_gradients(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    torch.manual_seed(0)
    inner, outer = sizes
    x = torch.randn(9, inner, dtype=dtype, requires_grad=True)
    weight = torch.randn(3, outer, inner, dtype=dtype, requires_grad=True)
    offsets = [4, 4, 7]  # one group is empty, two rows belong to none
    made = grouped_mm(x, weight.transpose(-2, -1), torch.tensor(offsets, dtype=torch.int32))
    wanted = reference(x, weight.transpose(-2, -1), offsets)
    torch.testing.assert_close(made, wanted)
    up = torch.randn_like(wanted)
    for got, want in zip(torch.autograd.grad(made, (x, weight), up), torch.autograd.grad(wanted, (x, weight), up), strict=True):
        torch.testing.assert_close(got, want)
    made = grouped_mm(x, weight.transpose(-2, -1), torch.tensor(offsets, dtype=torch.int32))
    made.sum().backward()  # the gradient has no strides of its own
    assert weight.grad is not None and not weight.grad[1].any() and weight.grad[0].any()


def test_gives_the_bits_of_torch() -> None:
    x, weight = torch.randn(10, 32), torch.randn(3, 64, 32)
    offsets = torch.tensor([3, 3, 10], dtype=torch.int32)
    assert torch.equal(grouped_mm(x, weight.transpose(-2, -1), offsets), torch._grouped_mm(x, weight.transpose(-2, -1), offs=offsets))
