"""Keys and values of an adapter file by the layers and heads that a program still has: what a cut took goes from the tables, too.

What is left of an attention's heads is read off its output projection, whose inputs are heads side by side in every family; a table keeps a key head
while one of its query heads is there. Layers are numbered by the paths that they had in the model that the file was trained on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.site import Site
from surgery.model.adapter_tokens import VirtualTokens
from surgery.model.dims.masks import Mask, to_ranges
from surgery.model.past import Ancestor
from surgery.model.program import Program
from surgery.model.weights import Expr, Reshape, select
from surgery.passes.kinds.adapter_frames import Frame, frames_of
from surgery.passes.kinds.adapter_join import Loaded
from surgery.passes.kinds.slice_targets import members
from surgery.passes.operation import Resolved


@dataclass(frozen=True)
class Layer:
    """Where an attention has its keys and values in the file, and which of their heads it still has (None: all)."""

    number: int
    heads: Mask | None = None


def table(tokens: VirtualTokens, layer: Layer, side: int) -> Expr:
    """The keys (``side`` 0) or values (1) of a layer, ``[heads, tokens, head]``."""
    at = (2 * layer.number + side) * tokens.heads * tokens.head
    flat = select(tokens.stored, 1, ((at, at + tokens.heads * tokens.head),))
    dtype = tokens.stored.dtype
    whole = Reshape(
        (tokens.heads, tokens.count, tokens.head), dtype, Reshape((tokens.count, tokens.heads, tokens.head), dtype, flat), (1, 0, 2)
    )
    return whole if layer.heads is None else select(whole, 0, to_ranges(layer.heads))


def left(tokens: VirtualTokens, layer: Layer) -> int:
    """How many key heads of a layer stay."""
    return tokens.heads if layer.heads is None else int(layer.heads.sum())


def layers_of(
    program: Program, op: Resolved, item: Loaded, tokens: VirtualTokens, blocks: Sequence[Site], count: int = 0
) -> list[Layer] | None:
    """For each attention its place among the ``count`` layers of the file (as many as its config says, where nothing is said); None where the model
    has and had another number.

    Raises S0789 where what is left of an attention's heads cannot be told.
    """
    count = count or tokens.layers
    outs = [members(program, block).get("o") for block in blocks]
    for frame in frames_of(program, item.adapter):
        found = _in_frame(item, frame, tokens, outs, count)
        if found is not None:
            if any(x.heads is not None for x in found) or len(found) < count:
                op.tell(f"{item.adapter.name} was trained before the cut and is carried over")
            return found
    return [Layer(i) for i in range(count)] if len(blocks) == count else None


def _in_frame(item: Loaded, frame: Frame, tokens: VirtualTokens, outs: Sequence[Site | None], count: int) -> list[Layer] | None:
    """The places when the file was trained on one model; None where it was not."""
    was: Mapping[str, Ancestor] = {now: before for now, before in frame.there.values()}
    found: list[Layer] = []
    for site in outs:
        before = was.get(site.weight) if site is not None and site.weight else None
        numbers = _numbers(frame, before.name) if before is not None else {}
        if site is None or before is None or len(numbers) != count:
            return None
        number = numbers[before.name]
        width = before.shape[site.in_axis]
        if width % (tokens.heads * tokens.head):
            return None
        if before.why:
            raise _unknown(item, site, before.why)
        kept = before.kept[site.in_axis] if before.kept else None
        if kept is None:
            found.append(Layer(number))
            continue
        features = np.asarray(kept, bool).reshape(width // tokens.head, tokens.head)
        if (features.any(1) != features.all(1)).any():
            raise _unknown(item, site, "some heads have lost a part of their features")
        heads = features.any(1).reshape(tokens.heads, -1).any(1)
        found.append(Layer(number, None if bool(np.all(heads)) else np.asarray(heads)))
    return found


def _numbers(frame: Frame, name: str) -> dict[str, int]:
    """The tensors that differ from one in the number of its layer alone, in the order of these numbers."""
    parts = name.split(".")
    at = next((i for i, p in enumerate(parts) if p.isdigit()), None)
    if at is None:
        return {name: 0}
    lead, tail = ".".join([*parts[:at], ""]), ".".join(["", *parts[at + 1 :]])
    mine = {
        int(n[len(lead) : len(n) - len(tail)]): n
        for n in frame.known
        if n.startswith(lead) and n.endswith(tail) and n[len(lead) : len(n) - len(tail)].isdigit()
    }
    return {mine[k]: i for i, k in enumerate(sorted(mine))}


def _unknown(item: Loaded, site: Site, why: str) -> SurgeryError:
    return fail(
        "S0789", f"{item.adapter.name} cannot be carried over to `{site.path}`: {why}", item.span, "merged here",
        help="merge the adapter above the statement that changed the model",
    )  # fmt: skip


__all__ = ["Layer", "layers_of", "left", "table"]
