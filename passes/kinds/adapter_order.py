"""Which of several shared vectors a layer of an adapter has, where a file numbers them by the order of the model's layers."""

from __future__ import annotations

from dataclasses import replace

from surgery.core.diagnostics import fail
from surgery.core.source import Span
from surgery.model.adapter import Adapter, Low
from surgery.model.program import Program
from surgery.model.weights import Apply, Expr

OPEN = ("which", -1)
"""The parameter of a function that waits for such a number."""


def ordered(program: Program, adapter: Adapter, span: Span) -> Adapter:
    """The adapter with every number filled in: layers share vectors in groups of equal size, in the order of the model that it was trained on.
    Raises S0786 where that order is not known."""
    waiting = [low for low in adapter.parts.values() if isinstance(low.a, Apply) and OPEN in low.a.params]
    if not waiting:
        return adapter
    names = list(program.past.names or program.weights)
    place = {name: i for i, name in enumerate(names)}
    paths = [low.path for low in waiting]
    if any(f"{p}.weight" not in place for p in paths) or program.past.ancestors or program.past.gone:
        raise fail(
            "S0786", f"{adapter.name} numbers its vectors by the layers of the model that it was trained on, and their order is not known here", span,
            "merged here", help="merge it into that model, before anything is taken out",
        )  # fmt: skip
    paths.sort(key=lambda p: place[f"{p}.weight"])
    first = waiting[0].a
    assert isinstance(first, Apply)
    groups = len(first.args) - 3
    size = max(1, len(paths) // groups)
    number = {path: min(i // size, groups - 1) for i, path in enumerate(paths)}
    return replace(adapter, parts={p: _filled(low, number[p]) if p in number else low for p, low in adapter.parts.items()})


def _filled(low: Low, number: int) -> Low:
    def made(expr: Expr) -> Expr:
        assert isinstance(expr, Apply)
        return replace(expr, params=tuple(("which", number) if p == OPEN else p for p in expr.params))

    return replace(low, a=made(low.a), b=made(low.b))
