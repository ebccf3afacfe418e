from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core.method import param
from surgery.model.cut_attached import Kept
from surgery.model.dims.masks import Mask
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.insert_memory import Core, MemoryMethod, Tensors


@dataclass(frozen=True)
class Prefix(MemoryMethod):
    """Trained keys and values in front of those of an attention: prefix tuning.

    With ``m`` entries an attention with queries ``Q``, keys ``K`` and values ``V`` (per key head, ``P_k [m, head]``, ``P_v [m, head]``) becomes

        softmax(Q [P_k; K]^T s + mask) [P_v; V]

    Every query sees all entries; padding, rotary positions and the length of a cache stay as they are, and a relative position bias is zero
    there. Keys that the model repeats for groups of query heads have one prefix a key head. With ``reparametrise`` one table of ``m`` rows
    ``E [m, d]`` and a network make all of them while training,

        [P_k, P_v] of layer l = tanh(E U^T + u) W_l^T + w_l        U [width, d], W_l [2 heads head, width]

    where ``E``, ``U`` and ``u`` are shared by the self attentions of a stack that one statement selects, and by its cross attentions. Folding
    computes the tables once and drops the network; they stay in the graph, as constants.

    ``2 m heads head`` numbers a layer are deployed: 200 entries on the 36 attentions of BART-large are 14,745,600. Even tables of zeros
    change the output: they are entries with score 0.

        insert prefix(length = 30) on layers[*].attn

    Source: Li and Liang, "Prefix-Tuning", 2021, arXiv:2101.00190, section 4; as a weighted sum He et al., "Towards a Unified View of
    Parameter-Efficient Transfer Learning", 2022, arXiv:2110.04366, section 3.1.
    """

    exchange: ClassVar[bool] = True

    length: int = param(30, "keys and values in front", min=1)
    reparametrise: bool = param(True, "train a table and a network that makes the keys and values; false trains these themselves")
    width: int = param(800, "features between the two layers of the network", min=1)
    activation: Literal["tanh", "relu", "gelu"] = param("tanh", "function between the two layers of the network")
    seed: int = param(0, "changes every random initial value of this statement", min=0)

    def entries(self) -> int:
        return self.length

    def tensors(self, site: Core) -> tuple[TensorSpec, ...]:
        if not self.reparametrise:
            return (
                TensorSpec("keys", (site.heads, self.length, site.key), "normal", (0.0, 0.02)),
                TensorSpec("values", (site.heads, self.length, site.value), "normal", (0.0, 0.02)),
            )
        d, w, out = site.hidden, self.width, site.heads * (site.key + site.value)
        first, second = 1.0 / math.sqrt(d), 1.0 / math.sqrt(w)
        return (
            TensorSpec("table", (self.length, d), "normal", (0.0, 1.0), shared=f"table {site.group} {d}"),
            TensorSpec("in_weight", (w, d), "uniform", (-first, first), shared=f"in_weight {site.group} {d}"),
            TensorSpec("in_bias", (w,), "uniform", (-first, first), shared=f"in_bias {site.group} {d}"),
            TensorSpec("out_weight", (out, w), "uniform", (-second, second)),
            TensorSpec("out_bias", (out,), "uniform", (-second, second)),
        )

    def follow(self, site: Core, heads: Mask | None, key: Mask | None, value: Mask | None) -> Mapping[str, Kept]:
        if not self.reparametrise:
            return {"keys": (heads, None, key), "values": (heads, None, value)}
        whole = np.ones(site.heads, bool) if heads is None else heads
        parts = [
            np.outer(whole, np.ones(size, bool) if mask is None else mask).reshape(-1)
            for mask, size in ((key, site.key), (value, site.value))
        ]
        rows = np.concatenate(parts)  # all keys, then all values
        return {"out_weight": (rows, None), "out_bias": (rows,)}

    def count(self, site: Core) -> int:
        out = site.heads * (site.key + site.value)
        if not self.reparametrise:
            return self.length * out
        return self.length * site.hidden + self.width * (site.hidden + 1) + out * (self.width + 1)

    def tables(self, site: Core, t: Tensors) -> tuple[Tensor, Tensor]:
        if not self.reparametrise:
            return t["keys"], t["values"]
        h = F.linear(t["table"], t["in_weight"], t["in_bias"])
        h = torch.tanh(h) if self.activation == "tanh" else getattr(F, self.activation)(h)
        made = F.linear(h, t["out_weight"], t["out_bias"])
        keys, values = made.split([site.heads * site.key, site.heads * site.value], -1)
        return (
            keys.reshape(self.length, site.heads, site.key).transpose(0, 1),
            values.reshape(self.length, site.heads, site.value).transpose(0, 1),
        )
