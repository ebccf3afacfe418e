from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from surgery.core.site import Site
from surgery.model.program import Program
from surgery.passes.kinds.slice import SliceMethod
from surgery.passes.kinds.slice_targets import Units, head_leaves


@dataclass(frozen=True)
class KvGroups(SliceMethod):
    """Key-value groups go, each with its key head, its value head and all query heads that read them.

    Removing a group keeps the number of query heads in each group, so that grouped-query attention stays what it was, only smaller;
    the cache of keys and values shrinks with it. In attention without grouping every head is a group of its own.

        prune kv_groups(keep = 6) on layers[*].attn

    Scores and amounts are as for `prune heads`: a group is worth the sum over its rows of query, key and value and its columns
    of the output projection.

    Equal to the model with the removed groups masked.

    Source: Ainslie et al., "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints", 2023,
    arXiv:2305.13245; Ma et al., "LLM-Pruner", 2023, arXiv:2305.11627 (groups rooted at the key projection).
    """

    noun: ClassVar[str] = "kv group"
    block: ClassVar[str] = "attention with several key-value groups"

    def fits(self, site: Site) -> bool:
        return site.heads is not None or bool(site.facts.get("mixer"))

    def units(self, program: Program, site: Site) -> Units | None:
        groups, _ = head_leaves(program, site)
        return None if groups is None else Units(groups)
