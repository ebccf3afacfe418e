from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from surgery.core.method import param
from surgery.model import moe_split
from surgery.model.moe import Layout
from surgery.model.weights import Add, Apply, Concat, Expr, Init, Scale, Stack
from surgery.passes.kinds.route import Dense, RouteMethod
from surgery.passes.kinds.route_fit import Centres, Collector, Contributions

COPIES = ("upcycle", "widenet")


@dataclass(frozen=True)
class Moe(RouteMethod):
    """Dense feed-forward blocks become a router and experts.

    A block ``y = W2 f(W1 x)`` with ``f`` units becomes, for every token ``x``,

        p = softmax(R x)  [experts],  in float32          y = sum over the top_k largest p_e of  w_e Expert_e(x)

    ``split`` says what the experts are:

        upcycle      copies of the whole block (noise adds N(0, noise) to each)
        widenet      copies, with the router switch when no other is named
        moefication  the f units in experts of exactly f / experts: balanced clusters of the rows of W1 (gate rows where there is a gate)
        kmeans       another name of moefication
        random       the same with a random partition

    ``router`` says what a chosen expert counts. For copies: mixtral ``w_e = p_e / sum of the chosen p``, switch ``w_e = p_e``, sum
    ``w_e = 1 / top_k``. For parts of a block the output is a sum of parts, so all of these are larger: ``top_k`` times as large for mixtral
    and sum (each chosen part then counts one), ``experts`` times as large for switch. With sum the router learns through the gradient of
    ``p_e``. The default is mixtral for upcycle, switch for widenet, and sum for parts.

    ``init`` is the router's start: normal N(0, 0.02), zero, centres (for parts: the mean direction of the expert's rows of W1), or data. With data and
    copies the rows are centres of the inputs that the block sees; with parts they predict, by least squares, how much each part adds to
    the output. The default is data where the statement names some with ``using``, else centres for clusters, else normal.

    The output at the start is unchanged for copies without noise unless the router is switch, and for parts that are all chosen
    (``top_k = experts``) with ``router = sum``, or with any router that starts at zero. Otherwise it changes by design.

    ``capacity`` C bounds the tokens of an expert to ``int(C top_k tokens / experts)``; those past it get nothing from it. ``balance`` and ``z`` weigh
    the losses ``E sum_e f_e P_e`` (1 for uniform routing) and ``mean log^2 sum exp``, which training adds (``Controller.extra_loss``). ``jitter`` is the
    standard deviation of noise on the scores in training.

    Adds for copies ``(experts - 1) block + experts hidden`` parameters to each layer, for parts ``experts hidden`` (and ``experts - 1`` times
    the bias of W2 where there is one).

        convert moe(experts = {0..15: 4, 16..31: 8}, top_k = 2) on layers[*].ffn as moe_ffn
        convert moe(experts = 8, top_k = 2, split = moefication) on layers[16..31].ffn using text

    Source: Komatsuzaki et al., "Sparse Upcycling", 2022, arXiv:2212.05055; Zhang et al., "MoEfication", 2021, arXiv:2110.01786, section 3;
    Xue et al., "Go Wider Instead of Deeper", 2021, arXiv:2107.11817; Jiang et al., "Mixtral of Experts", 2024, arXiv:2401.04088.
    """

    takes_data: ClassVar[bool] = True

    experts: int = param(help="experts of a block", min=1, per_layer=True)
    top_k: int = param(2, "experts that work for one token", min=1, per_layer=True)
    split: Literal["upcycle", "widenet", "moefication", "kmeans", "random"] = param("upcycle", "what the experts are made of")
    router: Literal["auto", "mixtral", "switch", "sum"] = param("auto", "what a chosen expert counts")
    init: Literal["auto", "normal", "zero", "centres", "data"] = param("auto", "what the router starts from")
    noise: float = param(0.0, "standard deviation of noise on every copy", min=0)
    capacity: float = param(0.0, "most tokens of an expert, as a multiple of its equal share; 0 drops none", min=0)
    balance: float = param(0.01, "weight of the load-balancing loss", min=0)
    z: float = param(0.0, "weight of the loss on large router scores", min=0)
    jitter: float = param(0.0, "standard deviation of noise on the router's scores in training", min=0)
    seed: int = param(0, "changes every random choice of this statement", min=0)

    def __post_init__(self) -> None:
        if self.noise and not self.copies:
            raise ValueError(f"noise makes copies differ, and split = {self.split} makes no copies")
        if self.init == "centres" and self.split not in ("moefication", "kmeans"):
            raise ValueError(f"init = centres is for clusters, and split = {self.split} makes none")
        object.__setattr__(self, "identity", "exact" if self._unchanged() else "changed")

    @property
    def copies(self) -> bool:
        return self.split in COPIES

    @property
    def routing(self) -> str:
        if self.router != "auto":
            return self.router
        return {"upcycle": "mixtral", "widenet": "switch"}.get(self.split, "sum")

    @property
    def wants_data(self) -> bool:
        return self.init == "data"

    @property
    def reads_data(self) -> bool:
        return self.init in ("auto", "data")

    def _unchanged(self) -> bool:
        if self.capacity or self.noise:
            return False
        if self.copies:
            return self.routing != "switch"
        return self.top_k == self.experts and (self.routing == "sum" or self.init == "zero")

    # ------------------------------------------------------------ sizes

    def layout(self, dense: Dense) -> Layout:
        width = dense.width
        if not self.copies:
            if width % self.experts:
                raise ValueError(f"{width} units cannot be {self.experts} equal parts")
            width //= self.experts
        whole = 1.0 if self.copies else float(self.top_k)
        scale = {"mixtral": whole, "sum": whole / self.top_k, "switch": 1.0 if self.copies else float(self.experts)}[self.routing]
        return Layout(
            dense.inp, dense.out, width, self.experts, self.top_k, dense.gated, "up_bias" in dense.weights or "gate_bias" in dense.weights,
            "down_bias" in dense.weights, self.routing, scale, self.capacity,
        )  # fmt: skip

    def count(self, dense: Dense) -> int:
        """How many parameters a block gets more, by the formulas above."""
        router = self.experts * dense.inp
        if self.copies:
            return (self.experts - 1) * dense.size + router
        return router + ((self.experts - 1) * dense.out if "down_bias" in dense.weights else 0)

    def note(self, dense: Dense, layout: Layout) -> str:
        return f"{super().note(dense, layout)}, {layout.router} router"

    def tap(self) -> dict[str, float]:
        return {"balance": self.balance, "z": self.z, "jitter": self.jitter}

    # ------------------------------------------------------------ weights

    def tensors(self, dense: Dense, layout: Layout, seed: int) -> dict[str, Expr]:
        w, order = dense.weights, self._order(dense, seed)
        rows = ("gate", "up") if dense.gated else ("up",)
        up = self._together([self._rows(w[r], order, 0) for r in rows])
        name = "gate_up_proj" if dense.gated else "up_proj"
        found: dict[str, Expr] = {"gate.weight": self._router(dense, layout, order, seed), f"experts.{name}": up}
        if layout.up_bias:
            empty = Init((dense.width,), w["up"].dtype, "zeros")
            found[f"experts.{name}_bias"] = self._together([self._rows(w.get(f"{r}_bias", empty), order, 0) for r in rows])
        found["experts.down_proj"] = self._rows(w["down"], order, 1)
        if layout.down_bias:
            bias = w["down_bias"]
            # each of the chosen parts brings its share, so that together they bring the bias once
            each = bias if self.copies else Scale(bias.shape, bias.dtype, bias, 1 / self.top_k)
            found["experts.down_proj_bias"] = _stacked(each, self.experts)
        if self.noise:
            for i, key in enumerate(k for k in found if k.startswith("experts.")):
                part = found[key]
                noise = Init(part.shape, part.dtype, "normal", (0.0, self.noise), (seed + 1 + i) % 2**63)
                found[key] = Add(part.shape, part.dtype, (part, noise))
        return found

    def _order(self, dense: Dense, seed: int) -> Expr | None:
        """The units, expert by expert; None for copies."""
        if self.copies:
            return None
        params = (("parts", self.experts), ("seed", seed))
        if self.split == "random":
            return Apply((dense.width,), "int64", "convert/moe:shuffle", (), (("width", dense.width), *params))
        return Apply((dense.width,), "int64", "convert/moe:cluster", (dense.weights["gate" if dense.gated else "up"],), params)

    def _rows(self, weight: Expr, order: Expr | None, axis: int) -> Expr:
        """A dense tensor for every expert: copied, or its units on ``axis`` divided."""
        if order is None:
            return _stacked(weight, self.experts)
        shape = list(weight.shape)
        shape[axis] //= self.experts
        params = (("parts", self.experts), ("axis", axis))
        return Apply((self.experts, *shape), weight.dtype, "convert/moe:divide", (weight, order), params)

    @staticmethod
    def _together(parts: list[Expr]) -> Expr:
        """Gate rows in front of value rows, expert by expert."""
        if len(parts) == 1:
            return parts[0]
        shape = (parts[0].shape[0], sum(p.shape[1] for p in parts), *parts[0].shape[2:])
        return Concat(shape, parts[0].dtype, tuple(parts), 1)

    def _start(self, data: bool) -> str:
        if self.init != "auto":
            return self.init
        if data:
            return "data"
        return "centres" if self.split in ("moefication", "kmeans") else "normal"

    def _router(self, dense: Dense, layout: Layout, order: Expr | None, seed: int) -> Expr:
        shape, dtype = (layout.experts, layout.inp), dense.weights["up"].dtype
        start = self._start(False)
        if start == "centres":
            assert order is not None
            rows = dense.weights["gate" if dense.gated else "up"]
            return Apply(shape, dtype, "convert/moe:centres", (rows, order), (("parts", self.experts),))
        if start == "normal":
            return Init(shape, dtype, "normal", (0.0, 0.02), seed)
        return Init(shape, dtype, "zeros")

    def collector(self, dense: Dense, layout: Layout, seed: int) -> Collector | None:
        if self._start(True) != "data":
            return None
        order = self._order(dense, seed)
        return Centres(layout.experts, seed) if order is None else Contributions(dense.weights, order, layout.experts)


def _stacked(part: Expr, copies: int) -> Expr:
    return Stack((copies, *part.shape), part.dtype, (part,) * copies, 0)


# ------------------------------------------------------------------ functions of weights


def cluster(rows: Tensor, *, parts: int, seed: int) -> Tensor:
    """The units in the order of balanced clusters of ``rows [units, in]``."""
    return moe_split.balanced_clusters(rows, parts, seed)


def shuffle(*, width: int, parts: int, seed: int) -> Tensor:
    """The units in the order of a random partition, ascending within a part."""
    mixed = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    return mixed.reshape(parts, -1).sort(dim=1).values.reshape(-1)


def divide(weight: Tensor, order: Tensor, *, parts: int, axis: int) -> Tensor:
    """A dense tensor with its units on ``axis`` in equal parts of ``order``: the parts become the first axis."""
    mixed = weight.index_select(axis, order)
    shape = list(mixed.shape)
    shape[axis : axis + 1] = [parts, shape[axis] // parts]
    return mixed.reshape(shape).movedim(axis, 0).contiguous()


def centres(rows: Tensor, order: Tensor, *, parts: int) -> Tensor:
    """Mean direction of the rows ``[units, in]`` of each part: ``[parts, in]``."""
    unit: Any = moe_split.unit_rows(rows)
    mean: Tensor = unit[order].reshape(parts, -1, rows.shape[1]).mean(1)
    return mean
