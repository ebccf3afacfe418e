from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.core.site import Site
from surgery.model.program import Program
from surgery.passes.kinds.slice import SliceMethod
from surgery.passes.kinds.slice_targets import Units, expert_leaves


@dataclass(frozen=True)
class Experts(SliceMethod):
    """Whole experts of a mixture go, with their rows of the router.

    The router chooses among those that stay, so at least as many must stay as it picks for a token; the probabilities
    are a softmax over the experts that are left.

        prune experts(keep = 6) on layers[*].ffn

    Where the router chooses among groups of experts first, as DeepSeek-V3's does, every group loses the experts at the same places.

    Scores and amounts are as for `prune heads`: an expert is worth the sum over its weights and its row of the router.

    Equal to the model in which the router gives the removed experts no probability.

    Source: Lu et al., "Not All Experts are Equal: Efficient Expert Pruning and Skipping for Mixture-of-Experts Large Language
    Models", 2024, arXiv:2402.14800 (removal of whole experts with their router rows; the choice here is by `score`).
    """

    noun: ClassVar[str] = "expert"
    block: ClassVar[str] = "mixture of experts"
    columns: ClassVar[bool] = False

    def fits(self, site: Site) -> bool:
        return "experts" in site.facts and not site.role.endswith(".experts")

    def units(self, program: Program, site: Site) -> Units | None:
        groups, leaf = expert_leaves(program, site)
        if leaf is None:
            return None
        picks = program.dims.picks(leaf.axis) or site.facts.get("top_k")
        least = int(picks) if isinstance(picks, int) else 1
        why = f"its router picks {least} for each token" if least > 1 else ""
        if groups is None:
            return Units(leaf, least=least, why=why)
        why = f"its router looks at {least} of each of {groups.size} groups" if least > 1 else ""
        return Units(leaf, groups, same=True, least=least * groups.size, why=why)
