"""Gated activations: what the runtimes have for them, which on a processor is nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from surgery.backends.fuse import ops_activation  # noqa: F401  (registers the operations)
from surgery.backends.fuse.nodes import pair, same
from surgery.backends.fuse.rule import ONNX, Match, Miss
from surgery.backends.fuse.view import FuseView

aten = torch.ops.aten


@dataclass(frozen=True)
class GatedActivation:
    """``act(gate) * up`` with SiLU or GELU. onnxruntime declares SwiGLU, but has no kernel for it on a processor, and none for gated GELU
    anywhere; the activation and the product stay two operations. The rule says where they are."""

    name: str = "gated_activation"
    doc: str = "an activation and the value that it gates are one operation, where the runtime has one"
    order: int = 225
    targets: frozenset[str] = frozenset({ONNX})

    def find(self, view: FuseView) -> Iterable[Match | Miss]:
        surgery = torch.ops.surgery
        known = {
            surgery.quick_gelu.default: "SiLU",
            aten.silu.default: "SiLU",
            aten.gelu.default: "GELU",
            surgery.bias_gelu.default: "GELU",
        }
        for node in view.calls(aten.mul.Tensor):
            sides = pair(node, aten.mul.Tensor)
            if sides is None or not same(view, view.shape(sides[0]), view.shape(sides[1])):
                continue
            gates = [known[s.target] for s in sides if isinstance(s, fx.Node) and s.target in known]
            if gates:
                yield Miss(view.where(node), "the runtime has no kernel for it on this device", f"gated {gates[0]} on {view.target.device}")


RULE = GatedActivation()
