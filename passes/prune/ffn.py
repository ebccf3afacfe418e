from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.core.site import Site
from surgery.model.program import Program
from surgery.passes.kinds.slice import SliceMethod
from surgery.passes.kinds.slice_targets import Units, hidden_leaf


@dataclass(frozen=True)
class Ffn(SliceMethod):
    """Hidden units of feed-forward blocks go: rows of the first projections, columns of the last.

    A unit of a gated block is its row of the gate, its row of the up projection and its column of the down projection, whether the two
    are stored apart or as one tensor. The experts of a block that are stored as one tensor have one width: the same units go in
    all of them, and the scores of the experts add up.

        prune ffn(ratio = 25%) on layers[4..29].ffn
        prune ffn(ratio = ramp(10%, 40%), round_to = 64) on layers[*].ffn

    A share removes `int(ratio x units)`; what stays is rounded up to a multiple of `round_to`. Scores and amounts are as for
    `prune heads`.

    Equal to the model with the removed units masked.

    Source: Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023, arXiv:2305.11627, section 3.1;
    Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, arXiv:2301.12900.
    """

    noun: ClassVar[str] = "hidden unit"
    block: ClassVar[str] = "feed-forward block"

    def fits(self, site: Site) -> bool:
        return "width" in site.facts and not site.role.endswith(".experts")

    def units(self, program: Program, site: Site) -> Units | None:
        leaf = hidden_leaf(program, site)
        return None if leaf is None else Units(leaf)
