"""Embeddings, their sum and the layer norm behind it become one operation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from surgery.backends.fuse import ops_embedding  # noqa: F401  (registers the operations)
from surgery.backends.fuse.nodes import hoist, is_call, operand, pair, same, summands
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten


@dataclass(frozen=True)
class _Tables:
    """The look-ups by what they are to the operation; ``counted``: position i is row i, so that its rows need not be given."""

    total: fx.Node
    words: fx.Node
    positions: fx.Node
    kinds: fx.Node | None
    counted: bool
    kept: bool


@dataclass(frozen=True)
class EmbeddingNorm:
    """A layer norm of two or three look-ups is EmbedLayerNormalization. One of them may have one row of positions for the whole batch; when
    those are the counters 0, 1, 2 ... of a stored table, the operation counts by itself. The sum may be read by others, too."""

    name: str = "embedding_norm"
    doc: str = "embeddings, their sum and its layer norm are one operation"
    order: int = 200
    targets: frozenset[str] = frozenset({ONNX})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        for node in view.calls(aten.layer_norm.default):
            found = self._read(view, node)
            if isinstance(found, _Tables):
                count = 2 if found.kinds is None else 3
                what = f"{count} tables, sum and norm{', the sum kept' if found.kept else ''}"
                yield Match(node, lambda n=node: self._write(view, n), what)  # type: ignore[misc]
            elif found is not None:
                yield Miss(view.where(node), *found)

    def _read(self, view: FuseView, node: fx.Node) -> _Tables | tuple[str, str] | None:
        """The tables before a norm; the first condition that fails; None where no embedding is summed."""
        total: Any = node.args[0]
        if pair(total, aten.add.Tensor) is None:
            return None
        parts = list(summands(total))
        looks = [p for p in parts if is_call(p, aten.embedding.default)]
        if not looks:
            return None
        if len(looks) < len(parts):
            other = next(p for p in parts if p not in looks)
            return "a summand is no look-up in a table", other.name
        if len(looks) not in (2, 3):
            return "more than three tables are summed", str(len(looks))
        if len(operand(node, "normalized_shape")) != 1 or any(not isinstance(operand(node, n), fx.Node) for n in ("weight", "bias")):
            return "the norm has no gain or shift, or is not over the last axis alone", node.name
        if view.dtype(total) is not torch.float32:
            return "the runtime has no kernel for this type", str(view.dtype(total)).removeprefix("torch.")
        if any(not view.name(p.args[0]) for p in looks):
            return "a table is computed in the graph and not stored", ", ".join(str(p.args[0]) for p in looks if not view.name(p.args[0]))
        if any(view.rank(p) != 3 for p in looks):
            return "rows are not looked up by batch and step", ", ".join(p.name for p in looks if view.rank(p) != 3)
        return self._roles(view, total, looks)

    @staticmethod
    def _roles(view: FuseView, total: fx.Node, looks: list[fx.Node]) -> _Tables | tuple[str, str]:
        whole = [p for p in looks if same(view, view.shape(p), view.shape(total))]
        single = [p for p in looks if p not in whole]
        if len(single) > 1 or any(view.shape(p)[0] != 1 or not same(view, view.shape(p)[1:], view.shape(total)[1:]) for p in single):
            return "more than one table is looked up for a single batch", ", ".join(p.name for p in single)
        largest = max(whole, key=lambda p: int(view.shape(p.args[0])[0]))
        rest = [p for p in whole if p is not largest]
        positions = single[0] if single else max(rest, key=lambda p: int(view.shape(p.args[0])[0]))
        kinds = next((p for p in rest if p is not positions), None)
        return _Tables(total, largest, positions, kinds, _counts(view, positions.args[1]), len(total.users) > 1)

    def _write(self, view: FuseView, node: fx.Node) -> None:
        found = self._read(view, node)
        if not isinstance(found, _Tables):
            return
        if not all(hoist(view, operand(node, name), found.total) for name in ("weight", "bias")):
            return
        ops = torch.ops.surgery
        kinds = found.kinds.args[:2] if found.kinds is not None else (None, None)
        places = None if found.counted else found.positions.args[1]
        tables = (*found.words.args[:2], found.positions.args[0], places, *kinds)
        more = (operand(node, "weight"), operand(node, "bias"), operand(node, "eps"))
        with view.before(found.total):
            if not found.kept:
                view.replace(node, view.call(ops.embed_layer_norm.default, *tables, *more, like=node))
                return
            made = view.call(ops.embed_layer_norm_sum.default, *tables, *more, like=node)
            normed, total = view.item(made, 0, like=node), view.item(made, 1, like=found.total)
        view.replace(node, normed)
        view.replace(found.total, total)


def _counts(view: FuseView, rows: Any) -> bool:
    """Whether rows are the beginning ``0, 1, 2 ...`` of a stored table of counters."""
    if not is_call(rows, aten.slice.Tensor) or view.rank(rows) != 2:
        return False
    start = operand(rows, "start")
    table = view.tensor(rows.args[0])
    if table is None or view.is_live(rows.args[0]) or operand(rows, "dim") != 1 or start not in (0, None) or operand(rows, "step") != 1:
        return False
    return bool(torch.equal(table.reshape(-1), torch.arange(table.numel(), dtype=table.dtype)))


RULE = EmbeddingNorm()
