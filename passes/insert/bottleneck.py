from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.insert import InsertMethod, Stream, Tensors


@dataclass(frozen=True)
class Bottleneck(InsertMethod):
    """A small feed-forward network beside or behind a part of the model.

    The branch ``A(z) = f(z D^T + d) U^T + u`` with ``D [width, hidden]`` and ``U [hidden, width]`` edits a value ``h``:

        after    h + scale A(h)      sequential, behind the part and before its residual addition
        beside   h + scale A(x)      parallel, x is what enters the part
        before   x + scale A(x)      in front of the part

    Houlsby's placement is ``after layers[*].{attn, ffn}``, Pfeiffer's ``after layers[*].ffn``, He's scaled parallel adapter
    ``bottleneck(width = 512, activation = relu, scale = 4) beside layers[*].ffn``. ``position = after_norm`` edits the value
    behind the norm that follows a post-norm block. ``init = lora`` draws ``D`` uniform in +-1/sqrt(hidden) and sets ``U``
    to zero, which leaves the model unchanged; ``init = bert`` draws both from N(0, 0.02) and does not. ``residual = false``
    lets the branch replace the value: the model is then changed from the start. Dropout acts on the bottleneck.

    Adds ``2 hidden width + width + hidden`` parameters per part (a layer norm 2 hidden, a learned scale 1 more). Beside a
    feed-forward block with the same activation it folds exactly, by widening that block (of a gated one by units whose value is 1);
    elsewhere it stays.

        insert bottleneck(width = 64, activation = gelu) after layers[*].{attn, ffn}

    Source: Houlsby et al., 2019, arXiv:1902.00751; Pfeiffer et al., 2021, arXiv:2005.00247; He et al., "Towards a Unified View
    of Parameter-Efficient Transfer Learning", 2022, arXiv:2110.04366, sections 3 and 4.
    """

    fold_class: ClassVar[str] = "widen"

    width: int = param(64, "features of the bottleneck", min=1, per_layer=True)
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "identity"] = param("relu", "function between the two projections")
    scale: float = param(1.0, "factor in front of the branch, the first value of it when it is learned", per_layer=True)
    learn_scale: bool = param(False, "train the factor in front of the branch")
    layernorm: Literal["none", "in", "out"] = param("none", "a layer norm on what enters or leaves the branch")
    residual: bool = param(True, "add the branch to the value; false lets it replace the value")
    dropout: float = param(0.0, "probability of zeroing a feature of the bottleneck while training", min=0, max=0.99, unit="%")
    init: Literal["lora", "bert"] = param("lora", "first values: lora leaves the model unchanged, bert does not")
    position: Literal["before_norm", "after_norm"] = param("before_norm", "behind a post-norm block: before or after its norm")
    seed: int = param(0, "changes every random initial value of this statement", min=0)

    def __post_init__(self) -> None:
        if self.init == "bert" or not self.residual:
            object.__setattr__(self, "identity", "changed")  # of this statement; the class promises what the defaults keep

    def tensors(self, site: Stream) -> tuple[TensorSpec, ...]:
        k = self.width
        bound = 1.0 / math.sqrt(site.inp)
        down = TensorSpec("down_weight", (k, site.inp), "uniform", (-bound, bound))
        up = TensorSpec("up_weight", (site.out, k))
        if self.init == "bert":
            down = TensorSpec("down_weight", (k, site.inp), "normal", (0.0, 0.02))
            up = TensorSpec("up_weight", (site.out, k), "normal", (0.0, 0.02))
        specs = [down, TensorSpec("down_bias", (k,)), up, TensorSpec("up_bias", (site.out,))]
        if self.layernorm != "none":
            width = site.inp if self.layernorm == "in" else site.out
            specs += [TensorSpec("norm_weight", (width,), "ones"), TensorSpec("norm_bias", (width,))]
        if self.learn_scale:
            specs.append(TensorSpec("scale", (1,), "constant", (self.scale,)))
        return tuple(specs)

    def count(self, site: Stream) -> int:
        norm = {"none": 0, "in": 2 * site.inp, "out": 2 * site.out}[self.layernorm]
        return self.width * (site.inp + site.out) + self.width + site.out + norm + int(self.learn_scale)

    def check(self, site: Stream) -> str:
        if not self.residual and site.place == "beside":
            return "a parallel branch is added to the part's output: `residual = false` has no meaning there"
        return ""

    def note(self, site: Stream) -> str:
        if not self.residual:
            return "warning: the branch replaces the value here, the model does not start from its old outputs"
        return "the model is changed at the start (init = bert)" if self.init == "bert" else ""

    def branch(self, site: Stream) -> dict[str, Any] | None:
        """What folding by widening needs to know; None when the branch is more than two projections."""
        if self.layernorm != "none":
            return None
        return {"width": self.width, "activation": self.activation, "scale": self.scale}

    def forward(self, site: Stream, t: Tensors, z: Tensor, out: Tensor, training: bool) -> Tensor:
        t = {k: v.to(z.dtype) for k, v in t.items()}
        if self.layernorm == "in":
            z = F.layer_norm(z, z.shape[-1:], t["norm_weight"], t["norm_bias"])
        return self.behind(site, t, F.linear(z, t["down_weight"], t["down_bias"]), out, training)

    def behind(self, site: Stream, t: Tensors, inside: Tensor, out: Tensor, training: bool) -> Tensor:
        """The edited value from what enters the activation, ``[..., width]``."""
        t = {k: v.to(inside.dtype) for k, v in t.items() if not k.startswith("down_")}
        h = _activate(inside, self.activation)
        if self.dropout and training:
            h = F.dropout(h, self.dropout)
        y = F.linear(h, t["up_weight"], t["up_bias"])
        if self.layernorm == "out":
            y = F.layer_norm(y, y.shape[-1:], t["norm_weight"], t["norm_bias"])
        if self.learn_scale:
            y = y * t["scale"]
            return (out + y if self.residual else y).to(out.dtype)
        if not self.residual:
            return (y * self.scale).to(out.dtype)
        return torch.add(out, y, alpha=self.scale).to(out.dtype)


def _activate(h: Tensor, name: str) -> Tensor:
    if name == "gelu_tanh":
        return F.gelu(h, approximate="tanh")
    if name == "identity":
        return h
    return torch.tanh(h) if name == "tanh" else getattr(F, name)(h)  # type: ignore[no-any-return]


def times(tensor: Tensor, scale: Tensor) -> Tensor:
    """A tensor times a learned scale, for folding."""
    return tensor.float() * scale.float()
