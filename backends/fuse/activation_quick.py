"""SiLU as the kernel that the runtime has for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from surgery.backends.fuse import ops_activation  # noqa: F401  (registers the operations)
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten


@dataclass(frozen=True)
class QuickGelu:
    """``x sigmoid(a x)`` with ``a`` 1 is SiLU, and QuickGelu computes it in one pass. (With 1.702, ``written_activation`` has made it one.)"""

    name: str = "quick_gelu"
    doc: str = "SiLU is one operation instead of a sigmoid and a product"
    order: int = 221
    targets: frozenset[str] = frozenset({ONNX})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        for node in view.calls(aten.silu.default):
            if view.dtype(node) in (torch.float32, torch.float16):
                yield Match(node, lambda n=node: self._write(view, n), "SiLU")  # type: ignore[misc]
            else:
                yield Miss(view.where(node), "the runtime has no kernel for this type", str(view.dtype(node)).removeprefix("torch."))

    @staticmethod
    def _write(view: FuseView, node: fx.Node) -> None:
        with view.before(node):
            made = view.call(torch.ops.surgery.quick_gelu.default, node.args[0], 1.0, like=node)
        view.replace(node, made)


RULE = QuickGelu()
