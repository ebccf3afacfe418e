from __future__ import annotations

from dataclasses import dataclass

from surgery.passes.kinds.fold import FoldMethod


@dataclass(frozen=True)
class All(FoldMethod):
    """Put attached changes into the weights that they change.

    Everything attached to the selected sites (``@name``: what that statement attached) whose method can fold goes into the
    stored weight, computed in float32 and rounded once, and its module leaves the graph. A tied weight is untied first, so
    that only the selected use of it changes. What cannot fold stays and the plan says why. Folding again changes nothing.

        fold all on @lora
        fold all on layers[*]
    """
