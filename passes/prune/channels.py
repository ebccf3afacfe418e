from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.core.site import Site
from surgery.model.program import Program
from surgery.passes.kinds import slice_faults as faults
from surgery.passes.kinds.slice import SliceMethod
from surgery.passes.kinds.slice_targets import Units, best, out_leaves
from surgery.passes.operation import Resolved


@dataclass(frozen=True)
class Channels(SliceMethod):
    """Output channels of convolutions go, with their norms and with the inputs of what reads them.

    A channel inside a block takes a row of one convolution, its entries of the norm behind it and a column of the next
    convolution. Channels that a residual addition joins are one decision: the last convolutions of all blocks of a stage and
    its shortcut lose the same ones, and their scores add up. A selected layer or stage stands for all convolutions in it, but for
    those that give an output of the model; name such a convolution to cut it.

        prune channels(ratio = 25%, round_to = 8) on stages[*].layers[*]
        prune channels(keep = 48) on stages[0].layers[*].conv[1]

    Grouped convolutions lose whole groups or the same channels of each group, whichever are the finer units.

    Scores and amounts are as for `prune heads`. Equal to the model with the removed channels masked.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", 2017, arXiv:1608.08710 (L1 of filters); Fang et al., "DepGraph: Towards Any
    Structural Pruning", 2023, arXiv:2301.12900 (what goes together).
    """

    noun: ClassVar[str] = "channel"
    block: ClassVar[str] = "convolution"
    together: ClassVar[bool] = False

    def fits(self, site: Site) -> bool:
        return site.op == "conv"

    def units(self, program: Program, site: Site) -> Units | None:
        leaf = best(out_leaves(program, site))
        return None if leaf is None else Units(leaf)

    def find(self, program: Program, op: Resolved) -> list[tuple[int, Site, Units]]:
        found: dict[str, tuple[int, Site, Units]] = {}
        whole: list[str] = []
        for at, chosen in enumerate(op.sites):
            inside = [s for s in program.anatomy.sites if self.fits(s) and (s.role == chosen.role or s.role.startswith(chosen.role + "."))]
            if self.fits(chosen) and not inside:
                inside = [chosen]
            if not inside:
                raise faults.nothing_there(op, self.noun, self.block, [chosen.role], [], any(map(self.fits, program.anatomy.sites)))
            for site in inside:
                units = self.units(program, site)
                if units is None:
                    raise faults.nothing_there(op, self.noun, self.block, [site.role], [], True)
                if chosen.is_region and (not units.inner.free or "output" in units.inner.flags):
                    whole.append(site.role)
                    continue
                found.setdefault(site.role, (at, site, units))
        if not found:
            raise faults.only_outputs(op, whole)
        if whole:
            op.tell(faults.left_whole(whole))
        return list(found.values())
