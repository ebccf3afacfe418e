"""Sums over calibration data at the products that read a parameter: squares and magnitudes of each input feature."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.model.uses import Use

ROWS = 4096
"""How many rows are widened to float64 at a time."""


class Tally:
    """For one use: the sum of ``f(x)`` over real tokens, float64, and how many were summed.

    ``total`` is [in] for a linear map, [experts, in] for experts (each over the tokens that it got), [in channels, kernel ...]
    for a convolution, where each tap sums over the positions that it meets. ``f`` is the square (``power`` 2) or the magnitude (1).
    """

    def __init__(self, use: Use, shape: tuple[int, ...], power: int) -> None:
        self.use, self.shape, self.power = use, shape, power
        self.total: Tensor | None = None
        self.count: Tensor = torch.zeros((), dtype=torch.float64)

    def __call__(self, args: tuple[Any, ...], result: Any, keep_of: Callable[[int], Tensor | None]) -> None:
        """A hook of :meth:`Study.observe`'s ``calls``."""
        x, keep = args[self.use.x], keep_of(self.use.x)
        match self.use.kind:
            case "linear":
                rows = x.reshape(-1, x.shape[-1]) if keep is None else x[keep]
                self._add(self._sum(rows), torch.tensor(float(len(rows)), dtype=torch.float64))
            case "grouped":
                self._grouped(x, args[self.use.offsets], keep)
            case "stacked":
                parts = [self._sum(one.reshape(-1, one.shape[-1])) for one in x]
                self._add(torch.stack(parts), torch.tensor(float(x[0].numel() // x.shape[-1]), dtype=torch.float64))
            case "transposed":
                rows = x.movedim(1, -1).reshape(-1, x.shape[1])
                self._add(self._sum(rows), torch.tensor(float(len(rows)), dtype=torch.float64))
            case "conv":
                self._conv(x)

    def _f(self, x: Tensor) -> Tensor:
        x = x.double()
        return x.square() if self.power == 2 else x.abs()

    def _sum(self, rows: Tensor) -> Tensor:
        total = torch.zeros(rows.shape[-1], dtype=torch.float64)
        for start in range(0, len(rows), ROWS):
            total += self._f(rows[start : start + ROWS]).sum(0)
        return total

    def _add(self, part: Tensor, count: Tensor) -> None:
        self.total = part if self.total is None else self.total + part
        self.count = self.count + count

    def _grouped(self, x: Tensor, ends: Tensor, keep: Tensor | None) -> None:
        sums, counts, start = [], [], 0
        for end in ends.tolist():
            rows = x[start:end]
            rows = rows if keep is None else rows[keep[start:end]]
            sums.append(self._sum(rows))
            counts.append(float(len(rows)))
            start = end
        self._add(torch.stack(sums), torch.tensor(counts, dtype=torch.float64))

    def _conv(self, x: Tensor) -> None:
        stride, padding, dilation, _, mode = self.use.conv
        kernel = self.shape[2:]
        rank = len(kernel)
        if mode:
            x = F.pad(x, list(padding), mode)
        else:
            if padding == "same":
                sides = [(d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, dilation, strict=True)]
            else:
                sides = [(0, 0)] * rank if padding == "valid" else [(p, p) for p in padding]
            x = F.pad(x, [n for side in reversed(sides) for n in side])
        f = self._f(x)
        sizes = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
        out = torch.zeros((x.shape[1], *kernel), dtype=torch.float64)
        for taps in itertools.product(*(range(k) for k in kernel)):
            where = [slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in zip(taps, dilation, stride, sizes, strict=True)]
            out[(slice(None), *taps)] = f[(slice(None), slice(None), *where)].sum(dim=(0, *range(2, rank + 2)))
        positions = x.shape[0]
        for n in sizes:
            positions *= n
        self._add(out, torch.tensor(float(positions), dtype=torch.float64))

    # ------------------------------------------------------------ as wide as the parameter

    def spread(self, groups_of: int | None = None) -> Tensor:
        """``total`` shaped to be multiplied with the stored parameter (sizes 1 where it does not vary)."""
        assert self.total is not None
        use, rank = self.use, len(self.shape)
        if use.kind == "conv":
            return self._spread_conv()
        shape = [1] * rank
        shape[use.in_axis] = self.shape[use.in_axis]
        if use.expert_axis is None:
            return self.total.reshape(shape)
        shape[use.expert_axis] = self.shape[use.expert_axis]
        table = self.total if use.expert_axis < use.in_axis else self.total.T
        return table.reshape(shape)

    def _spread_conv(self) -> Tensor:
        assert self.total is not None
        groups = self.use.conv[3]
        if groups == 1:
            return self.total.unsqueeze(0)
        each = self.total.reshape(groups, -1, *self.total.shape[1:])
        return each.repeat_interleave(self.shape[0] // groups, 0)
