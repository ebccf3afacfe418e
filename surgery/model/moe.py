"""A feed-forward block of routed experts, in the layout of transformers 5: one 3-D tensor for all experts of a projection.

The block is captured like a model, so what stands in a program is a graph of plain operations; this module is where the operations
come from. Tokens are sorted by expert and each expert computes its own rows, so the work is that of ``top_k`` experts a token.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.model.grouped import product
from surgery.model.modules import register_module

ROUTERS = ("mixtral", "switch", "sum")
TAP_TAG = "surgery.router"
MOST_NOTED = 64
"""Calls whose losses a tap keeps until somebody asks for them."""


@dataclass(frozen=True)
class Layout:
    """Sizes of a block: ``experts`` of ``width`` units between ``inp`` and ``out`` features, ``top_k`` of them for a token.

    ``router`` says what the chosen experts count: ``mixtral`` their probabilities over the sum of these, ``switch`` their
    probabilities, ``sum`` one each (with the gradient of the probability). ``scale`` multiplies that. ``capacity`` above 0 bounds
    the tokens of an expert by ``int(capacity * top_k * tokens / experts)``, first choices first.
    """

    inp: int
    out: int
    width: int
    experts: int
    top_k: int
    gated: bool = False
    up_bias: bool = False
    down_bias: bool = False
    router: str = "mixtral"
    scale: float = 1.0
    capacity: float = 0.0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of a block by its name below the block, in order."""
        e, f = self.experts, self.width
        up, rows = ("gate_up_proj", 2 * f) if self.gated else ("up_proj", f)
        found: dict[str, tuple[int, ...]] = {"gate.weight": (e, self.inp), f"experts.{up}": (e, rows, self.inp)}
        if self.up_bias:
            found[f"experts.{up}_bias"] = (e, rows)
        found["experts.down_proj"] = (e, self.out, f)
        if self.down_bias:
            found["experts.down_proj_bias"] = (e, self.out)
        return found


class MoeBlock(nn.Module):
    """``[tokens, inp]`` to ``[tokens, out]``; ``act`` is what stands between the projections: ``act(up)`` or ``act(gate, up)``."""

    def __init__(self, layout: Layout, act: nn.Module) -> None:
        super().__init__()
        self.layout = layout
        self.gate = nn.Linear(layout.inp, layout.experts, bias=False)
        self.experts = nn.Module()
        for name, shape in layout.shapes.items():
            owner, _, leaf = name.partition(".")
            if owner == "experts":
                self.experts.register_parameter(leaf, nn.Parameter(torch.empty(shape)))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        k, experts = self.layout.top_k, self.layout.experts
        probs = torch.softmax(self.gate(x).float(), dim=-1)
        top, chosen = torch.topk(probs, k, dim=-1)
        weights = self.weights(top)
        if self.layout.capacity:
            weights = weights * within_capacity(chosen, experts, self.layout.capacity)
        ids, order = torch.sort(chosen.reshape(-1))
        ends = torch.cumsum(torch.histc(ids.float(), bins=experts, min=0, max=experts - 1), 0, dtype=torch.int32)
        out = self.run(x[order // k], ids, ends) * weights.reshape(-1)[order].unsqueeze(-1)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.shape[0], device=order.device)
        return out[back].reshape(x.shape[0], k, self.layout.out).sum(1).to(x.dtype)

    def weights(self, top: Tensor) -> Tensor:
        """What the chosen experts count, from their probabilities ``[tokens, top_k]`` in float32."""
        if self.layout.router == "mixtral":
            top = top / top.sum(dim=-1, keepdim=True)
        elif self.layout.router == "sum":
            top = top + (1.0 - top).detach()  # one, with the gradient of the probability: else the router would never learn
        return top if self.layout.scale == 1 else top * self.layout.scale

    def run(self, rows: Tensor, ids: Tensor, ends: Tensor) -> Tensor:
        """Rows sorted by expert through their experts; ``ids`` is the expert of each row, ``ends`` where each expert's rows end."""
        e = self.experts
        name = "gate_up_proj" if self.layout.gated else "up_proj"
        h = product(rows, getattr(e, name).transpose(-2, -1), ends)
        if self.layout.up_bias:
            h = h + getattr(e, f"{name}_bias")[ids]
        h = self.act(*h.chunk(2, dim=-1)) if self.layout.gated else self.act(h)
        out = product(h, e.down_proj.transpose(-2, -1), ends)
        return out + e.down_proj_bias[ids] if self.layout.down_bias else out


def within_capacity(chosen: Tensor, experts: int, capacity: float) -> Tensor:
    """1 where a choice ``[tokens, top_k]`` is among the first ``int(capacity * top_k * tokens / experts)`` (at least one) of its
    expert, 0 where it is dropped; all first choices come before the second ones. In float32.

    Source: Xue et al., "Go Wider Instead of Deeper", 2021, arXiv:2107.11817, section 3.
    """
    tokens, k = chosen.shape
    picked = F.one_hot(chosen.transpose(0, 1).reshape(-1), experts)
    place = (picked.cumsum(0) * picked).sum(-1)
    # the small term undoes the rounding of whole numbers
    limit = torch.clamp(torch.floor(picked.sum().float() * (capacity / experts) + 1e-3), min=1.0)
    return (place <= limit).reshape(k, tokens).transpose(0, 1).float()


# ------------------------------------------------------------------ losses


def load_balance(probs: Tensor, chosen: Tensor) -> Tensor:
    """``E sum_e f_e P_e``: ``f_e`` the share of choices ``[tokens, top_k]`` that fall on expert ``e``, ``P_e`` its mean probability
    (``probs [tokens, E]``). One for uniform routing, ``E`` when everything goes to one expert that has all probability.

    Source: Fedus et al., "Switch Transformers", 2021, arXiv:2101.03961, equations 4 to 6, with the choices counted as shares.
    """
    experts = probs.shape[-1]
    share = F.one_hot(chosen, experts).to(probs.dtype).mean(dim=(0, 1))
    return experts * (share * probs.mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean of the squared log-sum-exp of router scores ``[tokens, E]``. Source: Zoph et al., "ST-MoE", 2022, arXiv:2202.08906, equation 5."""
    return torch.logsumexp(logits.float(), dim=-1).square().mean()


class RouterTap(nn.Module):
    """Stands behind a router's scores and leaves them as they are, but in training notes what they add to the loss.

    ``jitter`` is the standard deviation of noise on the scores in training. The controller collects the loss with ``extra_loss``.
    """

    edits = 0

    def __init__(self, top_k: int, balance: float = 0.0, z: float = 0.0, jitter: float = 0.0) -> None:
        super().__init__()
        self.top_k, self.balance, self.z, self.jitter = top_k, balance, z, jitter
        self.noted: list[Tensor] = []
        self.unasked = False

    def forward(self, logits: Tensor) -> Tensor:
        if not self.training:
            return logits
        if self.jitter:
            logits = logits + self.jitter * torch.randn_like(logits)
        if torch.is_grad_enabled() and (self.balance or self.z):
            found = self.loss(logits)  # also when a checkpointed layer runs again: it must save what it saved before
            if not _recomputing():
                self._note(found)
        return logits

    def _note(self, found: Tensor) -> None:
        self.noted.append(found)
        if len(self.noted) > MOST_NOTED:  # nobody asks: each holds the graph that it came from
            del self.noted[0]
            if not self.unasked:
                self.unasked = True
                warnings.warn(
                    "a router's loss is not collected, so that nothing balances its experts: train with surgery.train.Controller, or give"
                    " the Trainer surgery.train.Callback; `balance = 0` makes experts without it",
                    stacklevel=2,
                )

    def loss(self, logits: Tensor) -> Tensor:
        """What scores ``[tokens, E]`` of one call add."""
        probs = torch.softmax(logits.float(), dim=-1)
        total = probs.new_zeros(())
        if self.balance:
            total = total + self.balance * load_balance(probs, torch.topk(probs, self.top_k, dim=-1).indices)
        return total + self.z * z_loss(logits) if self.z else total

    # events of training; a tap acts for itself

    def surgery_events(self) -> tuple[RouterTap, nn.Module]:
        return self, self

    def step_begin(self, module: nn.Module, step: int) -> None:
        self.noted.clear()

    def extra_loss(self, module: nn.Module) -> Tensor | None:
        """The sum over all calls since it was last asked for, so that every forward pass counts once."""
        noted = list(self.noted)
        self.noted.clear()
        return torch.stack(noted).sum() if noted else None

    def expand_flat(self, flat: Any, args: tuple[Any, ...], kwargs: dict[str, Any], spec: Any) -> Any:
        """In evaluation it does nothing."""
        return args[0]

    def follow(self, around: Any) -> Any:
        """When experts are pruned: scores of any number of experts will do."""
        from surgery.model.cut_attached import Follow

        return Follow(None)

    def module_config(self) -> dict[str, Any]:
        return {"top_k": self.top_k, "balance": self.balance, "z": self.z, "jitter": self.jitter}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> RouterTap:
        return cls(int(config["top_k"]), *(float(config[k]) for k in ("balance", "z", "jitter")))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "noted": []}  # what is noted hangs on a graph, which has no copy

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.module_config().items())


def _recomputing() -> bool:
    """Inside a backward pass a checkpointed layer runs again: its loss is noted already."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # type: ignore[attr-defined]


register_module(TAP_TAG, RouterTap)


def config_of(layout: Layout) -> dict[str, Any]:
    return asdict(layout)
