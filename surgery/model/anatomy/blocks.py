"""All blocks of one graph."""

from __future__ import annotations

from surgery.model.anatomy.attention import Attention, Attentions
from surgery.model.anatomy.feedforward import FeedForward, FeedForwards
from surgery.model.anatomy.graphview import GraphView
from surgery.model.anatomy.sources import Sources
from surgery.model.anatomy.streams import Exit, Part, whole

__all__ = ["Attention", "Blocks", "Exit", "FeedForward", "Part", "whole"]


class Blocks:
    """The attention and feed-forward blocks of one graph."""

    def __init__(self, view: GraphView, sources: Sources) -> None:
        self.sources = sources
        self.attentions: list[Attention] = Attentions(view, sources).found
        taken = {p.projection for a in self.attentions for p in a.parts.values()}
        self.feed_forwards: list[FeedForward] = FeedForwards(view, sources, taken).found
