"""Value domains: an integer tensor whose values are positions on an axis.

``topk`` over the expert axis gives numbers of experts: pruning an expert renumbers them, which is right only when every
consumer of the numbers (one-hot, histogram, gather, indexed weights) loses the same expert. So the numbers carry the axis they
index as long as operations only move them, consumers unify with it, and where they reach anything else (arithmetic, comparisons)
the axis is frozen. An operation whose rule says nothing about the numbers counts as such.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from surgery.model.dims.algebra import ONE, Axis

if TYPE_CHECKING:
    from surgery.model.dims.context import Axes, Context


def keep_domain(cx: Context, node: fx.Node, out: Axes) -> Axes:
    """For an operation that only moves values: the result's values index what the input's do."""
    source: Any = node.args[0] if node.args else None
    if isinstance(source, fx.Node) and source in cx.domains:
        cx.handled.add(source)
        cx.domains[node] = cx.domains[source]
    return out


def lose_domain(cx: Context, arg: Any, why: str) -> None:
    """Values of ``arg`` reach an operation that does not know positions: freeze what they index."""
    if isinstance(arg, fx.Node) and arg in cx.domains:
        cx.handled.add(arg)
        cx.freeze(cx.domains[arg], why)


def indexed_by(cx: Context, axis: Axis, index: Any, why: str) -> None:
    """``axis`` is indexed by the values of ``index``: one class with their domain, else frozen."""
    domain = cx.domains.get(index) if isinstance(index, fx.Node) else None
    cx.mark(axis, "indexed")
    if domain is not None:
        cx.handled.add(index)
    if domain is None:
        cx.freeze(axis, why)
    elif domain.size == axis.size and axis is not ONE:
        cx.unify(axis, domain)
    else:
        cx.freeze(axis, why)
        cx.freeze(domain, why)
