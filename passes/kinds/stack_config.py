"""The config of a model whose layers were stacked anew: how many there are, and what it lists layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

from surgery.model.program import Program
from surgery.passes.kinds.drop_config import COUNTS, LISTS, NUMBERS, SIZES, THRESHOLDS, full_config, owner_of

Taken = Sequence[tuple[Program, int]]
"""The layers of the result in order: the program that each comes from, and its number there."""


def stack_layers(program: Program, stack: str, count: int, taken: Taken) -> list[str]:
    """Write the layers ``taken`` into the program's config in the place of the ``count`` of ``stack``.

    Lists with an entry for each layer take the entries of the layers' own configs, lists of layer numbers are counted anew, and a number of
    first layers of one kind is set where the new order still has them first. Names of the entries that cannot say the new order are returned.
    """
    config = deepcopy(program.info.config)
    whole = full_config(program)
    owner, side = owner_of(config, stack)
    full = owner_of(whole, stack)[0]
    theirs = {id(p): owner_of(full_config(p) or p.info.config, stack)[0] for p, _ in taken}
    wrong = _write(owner, full, side, stack, count, [(theirs[id(p)], j) for p, j in taken])
    program.info = replace(program.info, config=config)
    return wrong


def _write(
    owner: dict[str, Any], full: dict[str, Any], side: str, stack: str, count: int, taken: Sequence[tuple[dict[str, Any], int]]
) -> list[str]:
    if "stages[" in stack:
        at = int(stack.rpartition("stages[")[2].partition("]")[0])
        depths = owner.get("depths", full.get("depths"))
        if isinstance(depths, list | tuple) and at < len(depths) and depths[at] == count:
            owner["depths"] = [len(taken) if i == at else n for i, n in enumerate(depths)]
        return []
    own = [n.format(side=side) for n in COUNTS if side or "{side}" not in n]
    said = {n: owner.get(n, full.get(n)) for n in own}
    known = [n for n in own if said[n] == count and not isinstance(said[n], bool)]
    if side == "decoder" and known[:1] and known[0] in ("decoder_layers", "num_decoder_layers"):
        known = known[:1]  # the names without a side speak of the encoder
    if side == "encoder":
        known = [n for n in known if "decoder" not in n]
    for name in known:
        if name in owner or name == known[0]:
            owner[name] = len(taken)
    wrong: list[str] = []
    for name in (*LISTS, *(n for n in {**full, **owner} if n.endswith("_per_layer") or n in SIZES)):
        entries = owner.get(name, full.get(name))
        if isinstance(entries, list | tuple) and len(entries) == count:
            owner[name] = [_entry(config, name, j, entries) for config, j in taken]
    for name in NUMBERS:
        entries = owner.get(name, full.get(name))
        if isinstance(entries, list | tuple) and all(isinstance(e, int) for e in entries):
            owner[name] = [i for i, (config, j) in enumerate(taken) if j in (config.get(name) or entries)]
    for name in THRESHOLDS:
        first = owner.get(name, full.get(name))
        if isinstance(first, int) and not isinstance(first, bool):
            early = [j < int(config.get(name, first)) for config, j in taken]
            if sorted(early, reverse=True) != early:
                wrong.append(name)
            owner[name] = sum(early)
    return wrong


def _entry(config: dict[str, Any], name: str, layer: int, own: Sequence[Any]) -> Any:
    theirs = config.get(name)
    listed = theirs if isinstance(theirs, list | tuple) and layer < len(theirs) else own
    return listed[layer] if layer < len(listed) else own[-1]
