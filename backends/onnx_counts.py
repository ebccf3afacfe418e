"""Positions that count tokens, where a graph is called with the last steps of a sequence alone.

Some decoders (M2M100 and what follows it) number a token by how many tokens up to it are no padding: ``cumsum(ids != padding)``. The tokens of the past are not
there any more; as in the models' own cached generation all of them count, so a target has no padding in front.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from surgery.backends.onnx_rows import Lengths, base

aten = torch.ops.aten
_CASTS = frozenset({"to", "_to_copy", "type_as", "alias", "clone", "detach"})


def is_count(node: fx.Node, ids: fx.Node) -> bool:
    """Whether a node counts, along the steps, the tokens that differ from one number."""
    if base(node) != "cumsum" or len(node.args) < 2 or node.args[1] not in (1, -1):
        return False
    what: Any = node.args[0]
    while base(what) in _CASTS:
        what = what.args[0]
    return base(what) == "ne" and what.args[0] is ids and not isinstance(what.args[1], fx.Node)


def add_past(graph: fx.Graph, node: fx.Node, lengths: Lengths) -> None:
    """Puts the tokens of the past in front of a count."""
    with graph.inserting_before(node):
        new = graph.call_function(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    new.meta.update(node.meta)
    # the node itself becomes the sum: what reads it goes on to see a value of the new steps
    node.target, node.args, node.kwargs = aten.add.Scalar, (new, lengths.past), {}
