"""Which layers are stacked in which order: the slices of a statement, read against the stacks of its sources."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.core.diagnostics import fail
from surgery.core.near import quoted
from surgery.core.plan import plural
from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model.program import Program
from surgery.passes.kinds.merge_inputs import Source

SLICE = re.compile(r"(?P<stack>.+)\[(?P<ranges>\*|[-\d., by]+)\]")
RANGE = re.compile(r"(?P<first>-?\d+)(?P<dots>\.\.(?P<last>-?\d+)?)?(?: by (?P<step>\d+))?")


@dataclass(frozen=True)
class Taken:
    """One layer of the result: the number of its source as named, its number there."""

    source: int
    layer: int


@dataclass(frozen=True)
class Order:
    """The layers of the result and the stack that they form."""

    stack: str
    layers: tuple[Taken, ...]

    def sites(self) -> list[Site]:
        """Stand-ins for the layers of the result, over which values by layer are spread."""
        return [Site(f"{self.stack}[{i}]", "region", "", stack=self.stack, layer=i) for i in range(len(self.layers))]


def order_of(program: Program, sources: Sequence[Source], programs: Sequence[Program], slices: Sequence[str] | None, span: Span) -> Order:
    """The layers that ``slices`` name, one slice for each source; without it all layers of each source. Raises S0779."""
    stacks = {s.name: s.layers for s in program.anatomy.stacks}
    if not stacks:
        raise fail("S0779", "this model has no stack of layers", span, "stacked here")
    if slices is None:
        if len(stacks) > 1:
            raise fail(
                "S0779", f"this model has several stacks: {quoted(list(stacks), 'and')}", span, "which of them?",
                help=f"say it in the slices, for example `slices = [{next(iter(stacks))}[*]]`",
            )  # fmt: skip
        slices = [f"{next(iter(stacks))}[*]"] * len(sources)
    if len(slices) != len(sources):
        raise fail(
            "S0779", f"{plural(len(slices), 'slice')} for {plural(len(sources), 'checkpoint')}", span, "one slice for each that is named",
            help="name a checkpoint as often as layers of it are taken: `slices = [layers[0..15], layers[8..23]]` goes with `of base, base`",
        )  # fmt: skip
    found: list[Taken] = []
    names = set()
    for at, (text, source, other) in enumerate(zip(slices, sources, programs, strict=True)):
        match = SLICE.fullmatch(text)
        stack = match["stack"] if match else ""
        count = next((s.layers for s in other.anatomy.stacks if s.name == stack), None)
        if match is None or count is None or stack not in stacks:
            raise fail(
                "S0779", f"`{text}` names no layers of {source.name}", span, "sliced here",
                notes=[f"stacks: {', '.join(f'{n}[0..{c - 1}]' for n, c in stacks.items())}"], help="a slice is a stack with layers: `layers[0..15]`",
            )  # fmt: skip
        names.add(stack)
        found += [Taken(at, j) for j in _numbers(match["ranges"], count, text, source.name, span)]
    if len(names) > 1:
        raise fail(
            "S0779",
            f"slices of different stacks: {quoted(sorted(names), 'and')}",
            span,
            "sliced here",
            help="write one statement for each stack",
        )
    return Order(names.pop(), tuple(found))


def _numbers(ranges: str, count: int, text: str, name: str, span: Span) -> list[int]:
    """Layers in the order written, repeated where they are written twice."""
    if ranges == "*":
        return list(range(count))
    out: list[int] = []
    for part in ranges.split(","):
        match = RANGE.fullmatch(part.strip())
        if match is None:
            raise fail("S0779", f"`{text}` is no slice", span, "sliced here", help="a slice is a stack with layers: `layers[0..15]`")
        first = int(match["first"])
        last = first if not match["dots"] else int(match["last"]) if match["last"] else count - 1
        first, last = (n + count if n < 0 else n for n in (first, last))
        if not 0 <= first <= last < count:
            raise fail(
                "S0779", f"{name} has layers 0..{count - 1}, not `{part.strip()}`", span, "sliced here", help="ranges are inclusive and count from 0",
            )  # fmt: skip
        out += range(first, last + 1, int(match["step"] or 1))
    return out
