"""Templates of methods that change weights or structure, or choose what trains: each is a whole method with a formula of its own."""

from __future__ import annotations

_MERGE = '''from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from surgery.core.method import param
from surgery.passes.kinds.merge import TaskMethod
from surgery.passes.kinds.merge_math import Delta, Sparsifier


@dataclass(frozen=True)
class CLASS(TaskMethod):
    """Task vectors without their small entries: say here in one line what the method is.

    Every entry of a task vector moves towards zero by ``floor``, and what is smaller becomes zero:

        theta = theta_0 + scale * sum_i w_i S(theta_i - theta_0)        S(t) = sign(t) max(|t| - floor, 0)

        merge NAME(floor = 0.001) of first, second * 0.5

    Source: the paper, its year, the section with the formula.
    """

    floor: float = param(1e-3, "what every entry of a task vector loses", min=0, per_layer=True)
    scale: float = param(1.0, "factor of the merged change", per_layer=True)

    def sparsify(self, delta: Delta, shape: Sequence[int], model: int, seed: int, prepared: tuple[Any, ...]) -> Sparsifier:
        def shrink(tau: Tensor, at: slice) -> Tensor:
            return F.softshrink(tau, self.floor)

        return shrink
'''

_PRUNE = '''from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from surgery.core.method import param
from surgery.core.site import Site
from surgery.model.program import Program
from surgery.passes.kinds.slice import SliceMethod
from surgery.passes.kinds.slice_targets import Units, hidden_leaf


@dataclass(frozen=True)
class CLASS(SliceMethod):
    """Hidden units of feed-forward blocks go, but never too many of one block: say here in one line what the method is.

    A block of ``f`` units keeps at least ``max(1, ceil(floor f))`` of them, also where all blocks compete for what may stay:

        prune NAME(ratio = 50%, scope = global, floor = 25%) on layers[*].ffn

    Scores and amounts are those of the kind, as for ``prune ffn``. Equal to the model with the removed units masked.

    Source: the paper, its year, the section with the formula.
    """

    noun: ClassVar[str] = "hidden unit"
    block: ClassVar[str] = "feed-forward block"

    floor: float = param(0.25, "share of its units that every block keeps", min=0, max=1, unit="%")

    def fits(self, site: Site) -> bool:
        return "width" in site.facts and not site.role.endswith(".experts")

    def units(self, program: Program, site: Site) -> Units | None:
        leaf = hidden_leaf(program, site)
        if leaf is None:
            return None
        least = max(1, math.ceil(self.floor * leaf.size))
        return Units(leaf, least=least, why=f"a floor of {100 * self.floor:g}%")
'''

_SKIP = '''from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.core.method import param
from surgery.passes.kinds.drop import DropMethod


@dataclass(frozen=True)
class CLASS(DropMethod):
    """Take out the blocks with the least weight: say here in one line what the method is.

    Of the selected blocks ``f`` those ``count`` go whose parameters have the smallest sum of absolute values:

        x + f(x)  becomes  x        where  sum |w|  over the parameters w of f  is least

        skip NAME(count = 1) on layers[*].ffn

    The output changes; what is promised and measured is that it equals the output of the model before with these blocks bypassed.

    Source: the paper, its year, the section with the formula.
    """

    branches: ClassVar[bool] = True

    count: int = param(1, "blocks that go", min=1)
    score: Literal["magnitude"] = param("magnitude", "what the choice goes by; the kind reads it")
'''

_SHARE = '''from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from surgery.core.method import param
from surgery.passes.kinds.tie import TieMethod


@dataclass(frozen=True)
class CLASS(TieMethod):
    """Layers in turn share the mean of their weights: say here in one line what the method is.

    Of ``n`` selected layers those whose number has the same rest divided by ``groups`` become one, parameter by parameter:

        W_g = groups / n  *  sum over l = g, g + groups, g + 2 groups ... of  W_l

        share NAME(groups = 2) on layers[0..3] keep own norm

    Source: the paper, its year, the section with the formula.
    """

    groups: int = param(1, "number of groups, which divides the number of layers", min=1)
    order: Literal["cycle"] = param("cycle", "how layers are dealt out to groups; the kind reads it")
    weights: Literal["mean"] = param("mean", "what the shared tensors start from; the kind reads it")
'''

_CONVERT = '''from __future__ import annotations

from dataclasses import dataclass

from surgery.core.method import param
from surgery.model.moe import Layout
from surgery.model.weights import Concat, Expr, Init, Stack
from surgery.passes.kinds.route import Dense, RouteMethod


@dataclass(frozen=True)
class CLASS(RouteMethod):
    """A feed-forward block becomes copies of itself and a router: say here in one line what the method is.

    With the block ``F`` copied ``experts`` times and a router ``R ~ N(0, spread) [experts, in]``, for every token ``x``:

        p = softmax(R x)        y = sum over the top_k largest p_e of  p_e / (sum of the chosen p)  F_e(x)

    The factors sum to one, so the model is unchanged at the start. Adds ``(experts - 1) block + experts in`` parameters.

        convert NAME(experts = 4, top_k = 2) on layers[*].ffn

    Source: the paper, its year, the section with the formula.
    """

    experts: int = param(4, "experts of a block", min=1, per_layer=True)
    top_k: int = param(2, "experts that work for one token", min=1, per_layer=True)
    spread: float = param(0.02, "standard deviation of the router at the start", min=0)
    capacity: float = param(0.0, "most tokens of an expert, as a multiple of its equal share; 0 drops none", min=0)
    seed: int = param(0, "changes every random initial value of this statement", min=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "identity", "changed" if self.capacity else "exact")

    def layout(self, dense: Dense) -> Layout:
        up_bias = "up_bias" in dense.weights or "gate_bias" in dense.weights
        return Layout(
            dense.inp, dense.out, dense.width, self.experts, self.top_k, dense.gated, up_bias, "down_bias" in dense.weights,
            "mixtral", capacity=self.capacity,
        )  # fmt: skip

    def tensors(self, dense: Dense, layout: Layout, seed: int) -> dict[str, Expr]:
        w = dense.weights
        dtype = w["up"].dtype
        rows = ("gate", "up") if dense.gated else ("up",)
        name = "gate_up_proj" if dense.gated else "up_proj"
        found: dict[str, Expr] = {"gate.weight": Init((layout.experts, dense.inp), dtype, "normal", (0.0, self.spread), seed)}
        found[f"experts.{name}"] = _copies([w[r] for r in rows], layout.experts)
        if layout.up_bias:
            none = Init((dense.width,), dtype, "zeros")  # one of the two may be without
            found[f"experts.{name}_bias"] = _copies([w.get(f"{r}_bias", none) for r in rows], layout.experts)
        found["experts.down_proj"] = _copies([w["down"]], layout.experts)
        if layout.down_bias:
            found["experts.down_proj_bias"] = _copies([w["down_bias"]], layout.experts)
        return found


def _copies(parts: list[Expr], experts: int) -> Expr:
    """The parts one behind the other, once for every expert: ``[experts, rows, ...]``."""
    first = parts[0]
    shape = (sum(p.shape[0] for p in parts), *first.shape[1:])
    whole = first if len(parts) == 1 else Concat(shape, first.dtype, tuple(parts), 0)
    return Stack((experts, *shape), first.dtype, (whole,) * experts, 0)
'''

_STATE = '''from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from surgery.passes.kinds.state import StateMethod


@dataclass(frozen=True)
class CLASS(StateMethod):
    """The matrices of the selected parts DOES: say here in one line what the method is.

    Chosen is every parameter called ``weight`` that belongs to no normalisation; biases and norms stay as they are.

        VERB NAME on layers[0..1]
    """

    sets: ClassVar[Literal["frozen", "trainable"]] = "STATE"
    missing: ClassVar[tuple[str, str]] = ("no matrix", "select a layer, a block or a projection")

    def chooses(self, name: str, norm: bool) -> bool:
        return name.rpartition(".")[2] == "weight" and not norm
'''


def _state(verb: str, does: str, state: str) -> str:
    return _STATE.replace("VERB", verb).replace("DOES", does).replace("STATE", state)


TEMPLATES = {
    "merge": _MERGE,
    "prune": _PRUNE,
    "skip": _SKIP,
    "share": _SHARE,
    "convert": _CONVERT,
    "freeze": _state("freeze", "stop training", "frozen"),
    "unfreeze": _state("unfreeze", "train", "trainable"),
}

STATEMENTS = {
    "merge": 'model "config:bert.json" as base\ncheckpoint other = load("config:bert.json")\n\n'
    "merge NAME(floor = 0.001) of other\n\nexpect params == 100% of base",
    "prune": "prune NAME(ratio = 50%, scope = global, floor = 25%) on layers[*].ffn\n\nexpect params < 100% of base",
    "skip": "skip NAME(count = 1) on layers[*].ffn\n\nexpect params < 100% of base",
    "share": "share NAME(groups = 1) on layers[*] keep own norm\n\nexpect params < 100% of base",
    "convert": "convert NAME(experts = 4, top_k = 2) on layers[*].ffn\n\nexpect same_output(at = init) within 1e-5",
    "freeze": "freeze NAME on layers[0..1]\n\nexpect trainable < 100%",
    "unfreeze": "freeze all on layers[*]\nunfreeze NAME on layers[0..1]\n\nexpect trainable < 100%",
}
