from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.core.method import param
from surgery.core.plan import group_roles
from surgery.core.site import Site
from surgery.model.claims import Claim
from surgery.model.decouple import decouple, shared_values
from surgery.model.oracle import outputs_of
from surgery.model.program import Program
from surgery.passes.kinds.slice import SliceMethod
from surgery.passes.kinds.slice_targets import Units, head_leaves, outside, paired
from surgery.passes.operation import Resolved


@dataclass(frozen=True)
class Heads(SliceMethod):
    """Attention heads go, with their rows of query, key and value and their columns of the output projection.

    Without grouping of keys and values a head takes its part of all four projections (and of their biases, of norms on queries
    and keys where each head has its own, of a table of position biases). With grouped keys and values query heads go, the
    same number from every group, and keys and values stay as they are; the heads may differ from group to group. A number that
    does not divide among the groups is refused; `prune kv_groups` removes whole groups.

    A share removes `int(ratio x heads)` of each block:

        prune heads(ratio = 25%) on layers[4..29].attn
        prune heads(keep = {0..1: 12, 2..11: 8}) on layers[*].attn
        prune heads(to = 80%, of = flops, scope = global) on layers[*].attn

    A head is worth the sum of its element scores, over every stored tensor that it has a part of:

        magnitude      |w|                       l2          w^2
        taylor         |w g|                     fisher      w^2 F
        taylor_signed  w g, added with its sign  taylor_mix  |w g - w^2 F / 2|
        wanda          |w| ||x||                 activation  mean |x| of what enters a product

    with `g` the gradient of the loss over the samples, `F` the mean of the squared gradients of single samples and `x` the values
    that meet the element; these need `using`. `taylor_signed` takes the size of the sum over each tensor. `random` is seeded by
    `seed`; `file` reads a list for each site from a JSON or safetensors file under the site's role. With `scope = global` the
    lowest scores of all blocks go, each block's scores divided by their mean (`normalize`). Blocks that share their heads, as T5's
    layers do through one table of position biases and those of MPT and BLOOM through the slopes of ALiBi, lose the same ones: their
    scores add up. `alone = true` gives each selected block heads of its own first, by picking its heads out of what is shared, so
    that one layer can lose heads that the others keep:

        prune heads(keep = 6, alone = true) on encoder.layers[3].attn

    Equal to the model with the removed heads masked. Adapters on what is cut are cut along.

    Source: Ma et al., "LLM-Pruner: On the Structural Pruning of Large Language Models", 2023, arXiv:2305.11627, sections 3.1 and 3.2;
    Michel et al., "Are Sixteen Heads Really Better than One?", 2019, arXiv:1905.10650; grouping as in Ainslie et al., "GQA", 2023,
    arXiv:2305.13245.
    """

    noun: ClassVar[str] = "head"
    block: ClassVar[str] = "attention"

    alone: bool = param(False, "blocks that only share position biases lose heads independently of each other")

    def prepare(self, program: Program, op: Resolved) -> None:
        if not self.alone:
            return
        before = program.copy() if op.study is not None else None
        apart: dict[str, None] = {}
        found = [(s, u) for _, s, u in self.find(program, op) if not any(outside(s.role, k.role) for k in op.keep)]
        for leaf in dict.fromkeys(leaf for _, units in found for leaf in units.leaves):
            mine = [s for s, units in found if leaf in units.leaves]
            layers = {path: s for path in shared_values(program, leaf) for s in mine if s.path.startswith(path + ".")}
            if layers and decouple(program, leaf, op.origin, list(layers)):
                apart |= dict.fromkeys(s.role for s in layers.values())
        if not apart:
            return
        op.tell(f"heads of their own for {', '.join(group_roles(list(apart))[:4])}, picked out of what is shared")
        if before is not None:
            after = program.copy()
            op.claim(Claim("independent = shared", before, outputs_of(before), outputs_of(after), tolerance=0.0, span=op.origin.span))

    def fits(self, site: Site) -> bool:
        return site.heads is not None or bool(site.facts.get("mixer"))

    def units(self, program: Program, site: Site) -> Units | None:
        groups, inner = head_leaves(program, site)
        if groups is not None and inner is not None:
            return paired(program, groups, inner)
        only = groups if groups is not None else inner
        return None if only is None else Units(only)
