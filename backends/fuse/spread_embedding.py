"""On processors the norm of embeddings is look-ups, sums and a norm again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse import ops_embedding, ops_spread  # noqa: F401  (they register the operations)
from surgery.backends.fuse.heads import called
from surgery.backends.fuse.nodes import operand
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView, aten

_OPS = torch.ops.surgery
ALONE, BOTH = _OPS.embed_layer_norm.default, _OPS.embed_layer_norm_sum.default


@dataclass
class SpreadEmbedding:
    """onnxruntime's EmbedLayerNormalization adds the numbers of a row one after another on processors, and wants its ids in 32 bits. Single
    look-ups copy whole rows, and the sum and the norm behind them run on vector units."""

    name: str = "spread_embedding"
    doc: str = "on processors embeddings are look-ups and sums of whole rows before their norm"
    order: int = 398
    targets: frozenset[str] = field(default_factory=lambda: frozenset({ONNX}))

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        if view.target.device != "cpu":
            return
        for node in view.calls(ALONE, BOTH):
            tables = 2 if operand(node, "kinds") is None else 3
            yield Match(node, lambda n=node: _apply(view, n), f"{tables} look-ups")  # type: ignore[misc]


def _apply(view: FuseView, node: fx.Node) -> None:
    def get(name: str) -> Any:
        return operand(node, name)

    with view.before(node):
        total = view.call(aten.embedding.default, get("words"), get("ids"), like=node)
        if get("kinds") is not None:
            kinds = view.call(aten.embedding.default, get("kinds"), get("segments"), like=node)
            total = view.call(_OPS.total.default, total, kinds, like=node)
        if get("places") is not None:
            rows = view.call(aten.embedding.default, get("positions"), get("places"), like=node)
        else:
            rows = view.call(aten.slice.Tensor, get("positions"), 0, 0, view.size(get("ids"), 1), like=node)
            rows = view.call(aten.unsqueeze.default, rows, 0, like=node)
        total = view.call(_OPS.total.default, total, rows, like=node)
        out = view.call(_OPS.spread_norm.default, total, get("weight"), get("shift"), float(get("eps")), True, like=node)
    if called(node, ALONE):
        view.replace(node, out)
        return
    for user in list(node.users):
        user.replace_all_uses_with((out, total)[user.args[1]])  # type: ignore[index]
        view.graph.graph.erase_node(user)
    view.drop(node)


RULE = SpreadEmbedding()
