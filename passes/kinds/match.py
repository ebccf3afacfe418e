"""Weight matching: the order of a model's units in which its weights lie closest to another model's.

Coordinate descent as in Ainsworth et al., "Git Re-Basin", 2023, arXiv:2209.04836, section 3.2: for one set of units at a time, with all others held, the
assignment that maximises the inner product of the two models' weights. The tensors of one set are read one after another and only sums of
products are kept: ``n x n`` numbers for a set of ``n`` units, so the memory is two tensors and that matrix. Everything runs on one thread in a
fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.model.dims import Dims, Leaf
from surgery.model.threads import one_thread
from surgery.passes.kinds.match_axes import AXES, Heads, Plain, Table, Unit, places

SVD_BUDGET = 4e11
"""Multiplications that singular values may cost, about half a minute; beyond that the alignment of singular vectors is not told."""

Read = Callable[[str], Tensor]


@dataclass
class Matching:
    """``first`` reads the model that stays, ``second`` the one that is moved, both by the names of ``dims``. ``names`` are the tensors of both."""

    dims: Dims
    aliases: Mapping[str, str]
    names: Sequence[str]
    first: Read
    second: Read
    units: Sequence[Unit]
    sweeps: int
    seed: int
    progress: Callable[[int, int], None]
    done: int = field(default=0)
    gains: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Sweeps until no set of units improves. The first goes from what is anchored outside of the layers inwards, the others in a random order."""
        generator = np.random.default_rng(self.seed)
        order = sorted(range(len(self.units)), key=lambda i: AXES.index(_word(self.units[i])))
        with one_thread(), torch.no_grad():
            for sweep in range(self.sweeps):
                better = False
                for step, i in enumerate(order):
                    self.progress(sweep * len(order) + step, self.sweeps * len(order))
                    unit = self.units[i]
                    better |= self._plain(unit) if isinstance(unit, Plain) else self._heads(unit)
                self.done = sweep + 1
                if not better:
                    break
                order = list(generator.permutation(len(self.units)))

    def moved(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the second model in the present order."""
        for axis, expression in enumerate(self.dims.parameter(name)):
            take = places(expression, self.units)
            if (take != np.arange(len(take))).any():
                value = value.index_select(axis, torch.from_numpy(take))
        return value

    # ------------------------------------------------------------ one set of units

    def _sides(self, name: str, axis: int, unit: Unit) -> tuple[Tensor, Tensor]:
        """Both models' tensor as ``[positions of the axis, rest]``; the second in the present order but for ``unit`` on this axis."""
        a, b = (read(name).to(torch.float32) for read in (self.first, self.second))
        for at, expression in enumerate(self.dims.parameter(name)):
            take = places(expression, self.units, unit if at == axis else None)
            if (take != np.arange(len(take))).any():
                b = b.index_select(at, torch.from_numpy(take))
        size = a.shape[axis]
        return a.movedim(axis, 0).reshape(size, -1), b.movedim(axis, 0).reshape(size, -1)

    def _plain(self, unit: Plain) -> bool:
        n = unit.leaf.size
        total = torch.zeros(n, n, dtype=torch.float64)
        for name, axis, expression in self.dims.holders(unit.leaf):
            a, b = self._sides(name, axis, unit)
            for leaf, where in self.dims.occurrences(expression):
                if leaf == unit.leaf:
                    rows = torch.from_numpy(_by_unit(where, n))
                    total += a[rows].reshape(n, -1) @ b[rows].reshape(n, -1).T
        before = float(total[torch.arange(n), torch.from_numpy(unit.order)].sum())
        rows, columns = assign(total.numpy())
        after = float(total[torch.from_numpy(rows), torch.from_numpy(columns)].sum())
        if not after > before + 1e-12 * max(1.0, abs(before)):
            return False
        unit.order = np.asarray(columns)
        return True

    def _heads(self, unit: Heads) -> bool:
        products = _Products(self, unit)
        g = unit.groups.size
        values = np.zeros((g, g))
        inner: dict[tuple[int, int], dict[Leaf, Table]] = {}
        for i in range(g):
            for j in range(g):
                values[i, j], inner[i, j] = products.best(i, j)
        held = {leaf: table.copy() for leaf, table in unit.tables.items()}
        before = sum(products.value(i, int(unit.order[i]), {leaf: t[i] for leaf, t in held.items()}) for i in range(g))
        rows, columns = assign(values)
        after = float(values[rows, columns].sum())
        if not after > before + 1e-9 * max(1.0, abs(before)):
            return False
        unit.order = np.asarray(columns)
        for i in range(g):
            for leaf, table in inner[i, int(columns[i])].items():
                unit.tables[leaf][i] = table
        return True

    # ------------------------------------------------------------ what it came to

    def distance(self, moved: bool) -> float:
        """The L2 distance of the two models over the tensors that units move."""
        total = 0.0
        for name in self._touched():
            b = self.second(name)
            b = self.moved(name, b) if moved else b
            total += float((self.first(name).double() - b.double()).square().sum())
        return math.sqrt(total)

    def _touched(self) -> list[str]:
        held = {name for u in self.units for leaf in u.leaves for name, _, _ in self.dims.holders(leaf)}
        return [n for n in self.names if n in held]

    def alignment(self) -> tuple[float, float] | None:
        """``R = sum <Wa, Wb> / sum sum_i s_i(Wa) s_i(Wb)`` over the matrices, before and after: 1 where all singular vectors coincide. None
        where the singular values would take too long."""
        names = [n for n in self._touched() if self.first(n).dim() > 1]
        sizes = [_matrix(self.first(n)).shape for n in names]
        if not names or sum(2 * m * n * min(m, n) for m, n in sizes) > SVD_BUDGET:
            return None
        before = after = whole = 0.0
        with one_thread():
            for name in names:
                a, b = _matrix(self.first(name).double()), self.second(name).double()
                before += float((a * _matrix(b)).sum())
                after += float((a * _matrix(self.moved(name, b))).sum())
                whole += float((torch.linalg.svdvals(a) * torch.linalg.svdvals(_matrix(b))).sum())
        return (before / whole, after / whole) if whole else None


class _Products:
    """Inner products of the columns of every two heads of the two models: what an order inside a pair of heads is worth."""

    def __init__(self, matching: Matching, unit: Heads) -> None:
        self.unit = unit
        self.r = unit.per_group
        g = unit.groups.size
        self.sums: dict[str, np.ndarray] = {}
        for role, site in unit.parts.items():
            heads = g * (self.r if role in "qo" else 1)
            for name, axis in ((site.weight, site.in_axis if role == "o" else site.out_axis), ("" if role == "o" else site.bias, 0)):
                first = matching.aliases.get(name, name)
                if not first:
                    continue
                a, b = matching._sides(first, axis, unit)
                rows = torch.from_numpy(np.concatenate([np.arange(x, y) for x, y in site.rows or ((0, len(a)),)]))
                found = (a[rows] @ b[rows].T).double().numpy()
                d = len(rows) // heads
                found = found.reshape(g, heads // g, d, g, heads // g, d).transpose(0, 3, 1, 4, 2, 5)  # groups, heads in them, columns
                self.sums[role] = self.sums[role] + found if role in self.sums else found

    def _pairs(self, role: str, i: int, j: int, heads: Table) -> np.ndarray | float:
        """Products of the columns of group ``i`` of the first with those of ``j`` of the second, summed over their heads in an order."""
        if role not in self.sums:
            return 0.0
        block = self.sums[role][i, j]
        if block.shape[0] == 1:
            return np.asarray(block[0, 0])
        return np.asarray(block[np.arange(self.r), heads].sum(0))

    def value(self, i: int, j: int, order: Mapping[Leaf, Table]) -> float:
        """What a pair of heads is worth with given orders inside."""
        u = self.unit
        heads = order[u.inner] if u.inner is not None else np.arange(self.r)
        total = 0.0
        for roles, leaf in ((("v", "o"), u.value), (("k", "q"), u.key)):
            block = self._pairs(roles[0], i, j, heads) + self._pairs(roles[1], i, j, heads)
            if isinstance(block, np.ndarray):
                columns = order[leaf] if leaf is not None else np.arange(block.shape[1])
                total += float(block[np.arange(len(block)), columns].sum())
        return total

    def best(self, i: int, j: int) -> tuple[float, dict[Leaf, Table]]:
        """The best orders inside a pair of heads: query heads and columns in turn where a group has several heads."""
        u = self.unit
        heads = np.arange(self.r)
        order: dict[Leaf, Table] = {}
        for leaf, role in ((u.value, "v"), (u.key, "k")):
            if leaf is not None:
                block = self._pairs(role, i, j, heads) if self.r > 1 else self._both(role, i, j, heads)
                order[leaf] = assign(np.asarray(block))[1]
        for _ in range(3 if self.r > 1 else 0):
            if u.inner is not None:
                heads = assign(self._heads(i, j, order))[1]
            for leaf, role in ((u.value, "v"), (u.key, "k")):
                if leaf is not None:
                    order[leaf] = assign(self._both(role, i, j, heads))[1]
        if u.inner is not None:
            order[u.inner] = heads
        return self.value(i, j, order), order

    def _both(self, role: str, i: int, j: int, heads: Table) -> np.ndarray:
        return np.asarray(self._pairs(role, i, j, heads) + self._pairs("o" if role == "v" else "q", i, j, heads))

    def _heads(self, i: int, j: int, order: Mapping[Leaf, Table]) -> np.ndarray:
        """What each query head of one is worth in the place of each of the other."""
        total = np.zeros((self.r, self.r))
        for role, leaf in (("o", self.unit.value), ("q", self.unit.key)):
            if role in self.sums:
                block = self.sums[role][i, j]
                columns = order[leaf] if leaf is not None else np.arange(block.shape[-1])
                total += block[:, :, np.arange(block.shape[-1]), columns].sum(-1)
        return total


def assign(worth: np.ndarray) -> tuple[Table, Table]:
    """Rows in order and the column of each, so that the sum of what they are worth is largest. Raises S0799 without scipy."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise fail("S0799", "weight matching needs the package scipy", exit_code=2, help="pip install 'model-surgery[merge]'") from None
    rows, columns = linear_sum_assignment(worth, maximize=True)
    return rows, columns


def _word(unit: Unit) -> str:
    return unit.what if isinstance(unit, Plain) else "heads"


def _by_unit(where: Table, count: int) -> Table:
    """Positions ``[units, places of each]`` from the unit at every position."""
    order = np.argsort(where, kind="stable")
    order = order[where[order] >= 0]
    return order.reshape(count, -1)


def _matrix(value: Tensor) -> Tensor:
    return value.reshape(value.shape[0], -1)
