"""The texts that ``surgery new`` writes."""

from __future__ import annotations

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

TEMPLATES = {"adapt": _ADAPT}

CASE = {
    "adapt": """# adapt NAME

A case: the spec is compiled on the tiny model of the tests.

```surg
surg 1

adapt NAME(rank = 4) on layers[*].attn.{q, v}

expect same_output(at = init) within 1e-6
```
""",
}


def class_name(name: str) -> str:
    """``dora_x`` as ``DoraX``."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("_") if part)
