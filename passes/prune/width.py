from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.core.site import Site
from surgery.model.program import Program
from surgery.passes.kinds import slice_faults as faults
from surgery.passes.kinds.slice import SliceMethod
from surgery.passes.kinds.slice_targets import Units, is_layer, stream_leaf
from surgery.passes.operation import Resolved


@dataclass(frozen=True)
class Width(SliceMethod):
    """Channels of the residual stream go, through every layer and in embeddings, norms and heads.

    All layers that add to one stream have the same channels, so the cut runs through the whole stack whichever layers
    are selected, and further through what is tied to it. Without a selector every stream of the model is cut; a model with stages
    has one for each.

        prune width(ratio = 25%, round_to = 8)
        prune width(keep = 256) on encoder.layers[*]

    A channel is worth the sum of its element scores over all of these tensors. Norms take their means and variances over the channels
    that are left: the result equals the model in which the removed channels are masked and the norms count only what stays,
    not the model with zeros in their place. An encoder's output gets narrower with it (S0452).

    Source: Fang et al., "DepGraph: Towards Any Structural Pruning", 2023, arXiv:2301.12900; Muralidharan et al., "Compact Language
    Models via Pruning and Knowledge Distillation", 2024, arXiv:2407.14679 (embedding channels).
    """

    needs_sites: ClassVar[bool] = False
    noun: ClassVar[str] = "channel"
    block: ClassVar[str] = "residual stream"
    together: ClassVar[bool] = False

    def fits(self, site: Site) -> bool:
        return is_layer(site)

    def units(self, program: Program, site: Site) -> Units | None:
        leaf = stream_leaf(program, site)
        return None if leaf is None else Units(leaf)

    def find(self, program: Program, op: Resolved) -> list[tuple[int, Site, Units]]:
        if op.sites:
            return super().find(program, op)
        found = []
        for site in program.anatomy.sites:
            units = self.units(program, site) if self.fits(site) else None
            if units is not None:
                found.append((0, site, units))
        if not found:
            raise faults.nothing_there(op, self.noun, self.block, ["the model"], [], False)
        return found
