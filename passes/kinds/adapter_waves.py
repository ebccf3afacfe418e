"""Orthogonal wavelets: their filters from the conditions that define them, and one step of the inverse transform of a matrix.

Daubechies' filters and symlets of ``n`` vanishing moments are the roots of one polynomial: of every pair ``z, 1 / z`` that it has one goes into
the filter. The Daubechies filter takes the roots inside of the unit circle; which ones a symlet takes (those whose phase is nearest to a straight
line) is the number in :data:`SYMLETS`, a bit a pair. Coiflets follow from equations without such a form and stand here as numbers.

Source: Daubechies, "Ten Lectures on Wavelets", 1992, section 6.4 (Daubechies), 8.1.1 (symlets), 8.2 (coiflets).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

SYMLETS = {2: 0, 3: 0, 4: 2, 5: 1, 6: 5, 7: 1, 8: 10, 9: 6, 10: 21}
COIFLETS = {
    1: (-0.07273261951252645, 0.3378976624574818, 0.8525720202116004, 0.3848648468648578, -0.07273261951252645, -0.015655728135791993),
    2: (
        0.01638733646320364, -0.04146493678687178, -0.0673725547237256, 0.3861100668227629, 0.8127236354494135, 0.4170051844232391,
        -0.07648859907828076, -0.05943441864643109, 0.02368017194684777, 0.005611434819368834, -0.0018232088709110323, -0.000720549445520347,
    ),
    3: (
        -0.003793512864380802, 0.007782596425672746, 0.023452696142077168, -0.06577191128146936, -0.06112339000297255, 0.40517690240911824,
        0.7937772226260872, 0.42848347637737, -0.07179982161915484, -0.08230192710629983, 0.03455502757329774, 0.015880544863669452,
        -0.009007976136730624, -0.0025745176881367972, 0.0011175187708306303, 0.0004662169598204029, -7.0983302506379e-05, -3.459977319727278e-05,
    ),
}  # fmt: skip


@cache
def lowpass(family: str) -> tuple[float, ...]:
    """The filter of the smooth part, with the sum ``sqrt(2)`` and the norm 1. KeyError for a family that is not listed."""
    name, n = family.rstrip("0123456789"), int(family[len(family.rstrip("0123456789")) :] or 0)
    if name == "coif":
        return COIFLETS[n]
    taken = {"db": 0, "sym": SYMLETS.get(n, -1)}[name]
    if taken < 0 or not 1 <= n <= 10:
        raise KeyError(family)
    roots = [-1.0 + 0j] * n
    for i, pair in enumerate(_pairs(n)):
        roots += [z if not taken >> i & 1 else 1 / z for z in pair]
    made = np.real(np.poly(roots))
    return tuple(float(x) for x in made * (math.sqrt(2) / made.sum()))


def _pairs(n: int) -> list[list[complex]]:
    """Roots inside of the unit circle, each with its conjugate, in the order of ``y = (2 - z - 1 / z) / 4``."""
    solutions = np.roots([math.comb(n - 1 + k, k) for k in range(n)][::-1])
    out: list[list[complex]] = []
    for y in sorted((complex(y) for y in solutions if y.imag > -1e-9), key=lambda y: (round(y.real, 9), round(y.imag, 9))):
        middle = 1 - 2 * y
        z = min((middle + s * np.sqrt(middle * middle - 1 + 0j) for s in (1, -1)), key=abs)
        out.append([complex(z)] if abs(y.imag) <= 1e-9 else [complex(z), complex(z).conjugate()])
    return out


def restored(parts: Tensor, family: str) -> Tensor:
    """One step of the inverse transform of ``parts``, whose quarters are smooth, and across, down and both ways rough: rows and columns are
    ``L - 2`` fewer for filters of length ``L``. Both sizes are even."""
    low = torch.tensor(lowpass(family), dtype=parts.dtype)
    high = torch.tensor([(-1) ** i * x for i, x in enumerate(reversed(lowpass(family)))], dtype=parts.dtype)
    rows, columns = (torch.cat([_spread(f, n // 2) for f in (low, high)], 1) for n in parts.shape)
    half = parts.shape[0] // 2, parts.shape[1] // 2
    # the quarter on the right is rough along rows of the result, and the one below along its columns
    turned = torch.cat(
        [
            torch.cat([parts[: half[0], : half[1]], parts[half[0] :, : half[1]]], 1),
            torch.cat([parts[: half[0], half[1] :], parts[half[0] :, half[1] :]], 1),
        ]
    )
    return rows @ turned @ columns.t()


def _spread(taps: Tensor, count: int) -> Tensor:
    """``[2 count - L + 2, count]``: column ``k`` has the filter from row ``2 k`` on, without the ``L - 2`` rows at either end."""
    length = taps.shape[0]
    full = torch.zeros(2 * count + length - 2, count, dtype=taps.dtype)
    for k in range(count):
        full[2 * k : 2 * k + length, k] = taps
    return full[length - 2 : full.shape[0] - (length - 2)]


def families() -> tuple[str, ...]:
    """All that :func:`lowpass` knows."""
    return tuple([f"db{n}" for n in range(1, 11)] + [f"sym{n}" for n in SYMLETS] + [f"coif{n}" for n in COIFLETS])
