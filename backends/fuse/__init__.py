"""Fusion of a live graph for serving: rules on one flat graph, each behind a numeric gate, with a report of what fired and what did not."""

from surgery.backends.fuse.engine import Fused, FusionEntry, fuse
from surgery.backends.fuse.rule import Match, Miss, Rule, Target

__all__ = ["Fused", "FusionEntry", "Match", "Miss", "Rule", "Target", "fuse"]
