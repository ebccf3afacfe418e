"""Places in the graph that hold a size or depend on one, and the slices that a graph takes of an axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import fx

from surgery.model.dims.algebra import Axis

Size = Callable[[Axis], int]


@dataclass(frozen=True)
class Constant:
    """A place in a node's arguments that depends on axis sizes.

    ``path`` leads there: ``("args", 1, 2)`` is item 2 of argument 1, ``("kwargs", "scale")`` a keyword (which may be absent so
    far). ``kind`` says what belongs there:

    ========== ====================================================================================================
    size       the size of the axis; ``data`` is subtracted (``histc`` max = bins - 1)
    prefix     the sum of the sizes of the axes, the parts in front of a slice's end
    split      a list, the sizes of the axes; the operator becomes ``split_with_sizes``
    scale      the attention scale ``data`` of the size before the cut, to be written out as a number
    ========== ====================================================================================================

    Where a graph node stands at ``path`` (a symbolic size), the place becomes ``node * numerator // denominator`` with
    the fraction of :meth:`ratio`.
    """

    node: fx.Node
    path: tuple[Any, ...]
    kind: str
    axes: tuple[Axis, ...]
    data: Any = None

    def value(self, size: Size) -> Any:
        """What belongs there when axes have the sizes that ``size`` says."""
        if self.kind == "split":
            return [size(a) for a in self.axes]
        if self.kind == "scale":
            return self.data
        total = sum(size(a) for a in self.axes)
        return total - (self.data or 0)

    def ratio(self, size: Size) -> Fraction:
        """New over old total size: the factor for a symbolic entry."""
        return Fraction(sum(size(a) for a in self.axes), sum(a.size for a in self.axes))


@dataclass(frozen=True)
class Cut:
    """A node that takes ``start:stop:step`` (in units of the traced size) of an axis: slice, select, one part of a split."""

    axis: Axis
    start: int
    stop: int
    step: int = 1
