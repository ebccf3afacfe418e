"""The texts that ``surgery new`` writes."""

from __future__ import annotations

from surgery.cli import scaffold_structure as structure

SPEC = """surg 1

## Low-rank adapters on the queries and values of every layer.
model "MODEL"

param r = 8  # surgery compile NAME.surg --set r=16

adapt lora(rank = r, alpha = 16, dropout = 5%) on layers[*].attn.{q, v}

expect trainable <= 5%
expect same_output(at = init) within 1e-6

emit torch to "build/NAME"
"""

_ADAPT = '''from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.delta import Tensors
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.kinds.lowrank import LowRankMethod


@dataclass(frozen=True)
class CLASS(LowRankMethod):
    """Low-rank change with a strength of its own: say here in one line what the method is.

    The weight ``W [out, in]`` stays as it is; two thin trained factors add to its output:

        y = x W^T + b + gain (alpha / rank) (x A^T) B^T        A [rank, in], B [out, rank]

    Folds exactly: ``W + gain (alpha / rank) B A``.

        adapt NAME(rank = 8, gain = 1) on layers[*].attn.{q, v}

    Source: the paper, its year, the section with the formula.
    """

    gain: float = param(1.0, "factor in front of the change", min=0)

    def factors(self, site: Geometry, t: Tensors) -> tuple[Tensor, Tensor]:
        return t["A"], self.gain * t["B"]
'''

_INSERT = '''from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.attach import TensorSpec
from surgery.passes.kinds.insert import InsertMethod, Stream, Tensors


@dataclass(frozen=True)
class CLASS(InsertMethod):
    """A small branch on a value: say here in one line what the method is.

    The branch ``A(z) = relu(z D^T) U^T`` with ``D [width, in]`` and ``U [out, width]`` is added to the value, times ``scale``.
    ``U`` starts at zero, so the model is unchanged at the start. It stays a module of its own: it does not fold.

        insert NAME(width = 16) after layers[*].ffn

    Source: the paper, its year, the section with the formula.
    """

    width: int = param(16, "features between the two projections", min=1, per_layer=True)
    scale: float = param(1.0, "factor in front of the branch", per_layer=True)
    seed: int = param(0, "changes every random initial value of this statement", min=0)

    def tensors(self, site: Stream) -> tuple[TensorSpec, ...]:
        bound = site.inp**-0.5
        return TensorSpec("down", (self.width, site.inp), "uniform", (-bound, bound)), TensorSpec("up", (site.out, self.width))

    def count(self, site: Stream) -> int:
        return self.width * (site.inp + site.out)

    def forward(self, site: Stream, t: Tensors, z: Tensor, out: Tensor, training: bool) -> Tensor:
        h = F.relu(F.linear(z, t["down"].to(z.dtype)))
        return torch.add(out, F.linear(h, t["up"].to(z.dtype)), alpha=self.scale).to(out.dtype)
'''

_TRAIN = '''from __future__ import annotations

from dataclasses import dataclass

from surgery.core.method import param
from surgery.passes.kinds.schedule import ScheduleMethod


@dataclass(frozen=True)
class CLASS(ScheduleMethod):
    """A learning rate over the tokens trained on: say here in one line what the rule is.

    After ``n`` tokens:

        lr(n) = peak (1 - n / tokens)        0 from ``tokens`` on

        train NAME(peak = 1e-4, tokens = 1B)

    Source: the paper, its year, the section with the formula.
    """

    peak: float = param(1e-4, "learning rate at the start", min=0)
    tokens: int = param(10**9, "tokens of the whole training", min=1)

    def lr(self, tokens: float) -> float:
        return self.peak * max(0.0, 1 - tokens / self.tokens)
'''

TEMPLATES = {"adapt": _ADAPT, "insert": _INSERT, "train": _TRAIN} | structure.TEMPLATES

WITHOUT = {
    "fold": "what a fold does belongs to what was attached: write it there, as `fold_attachments` of a kind under passes/kinds or as the fold of "
    "an `adapt` method; `fold all` then does it",
}
"""Why a verb that has a kind has no template."""

_CASE = """# VERB NAME

What this case shows, in a sentence. The spec is planned on a tiny model; `pytest tests/test_cases.py --update-golden` writes the plan below.

```surg plan model=config:bert
surg 1

STATEMENT
```
"""

_STATEMENTS = {
    "adapt": "adapt NAME(rank = 4) on layers[*].attn.{q, v}\n\nexpect same_output(at = init) within 1e-6",
    "insert": "insert NAME(width = 4) after layers[*].ffn\n\nexpect same_output(at = init) within 1e-6",
    "train": "train NAME",
} | structure.STATEMENTS

CASE = {verb: _CASE.replace("VERB", verb).replace("STATEMENT", text) for verb, text in _STATEMENTS.items()}


def class_name(name: str) -> str:
    """``dora_x`` as ``DoraX``."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_") if part)
