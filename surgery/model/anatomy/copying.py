"""What a view of the graph notes of a layer that is a copy of another one."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from surgery.model.twins import Lost

if TYPE_CHECKING:
    from surgery.model.anatomy.graphview import GraphView


def copied(view: GraphView, i: int, projections: slice, norms: slice, embeddings: slice) -> bool:
    """Notes at run ``i``, a copy, what was found in the layer behind it, by places in the view's lists; False where something does not follow."""
    copies = view.copies
    name, node = copies.names(i).get, partial(copies.node, i)
    firsts = view.projections[projections]
    try:
        made = [p.moved(node, name) for p in firsts]
        norm = [n.moved(node, name) for n in view.norms[norms]]
        tables = [node(n) for n in view.embeddings[embeddings]]
    except Lost:
        return False
    mine, its = copies.runs[copies.of[i]].nodes, copies.runs[i].nodes
    view.constant.update(zip(its, [view.constant[a] for a in mine], strict=True))
    for first, projection in zip(firsts, made, strict=True):
        view.add(projection)
        view.copied[projection] = i, first
    view.embeddings += tables
    for one in norm:
        view.norms.append(one)
        view.norm_of[one.out] = one
        view.norm_inner |= dict.fromkeys(one.inner, one)
    return True
