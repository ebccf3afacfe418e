"""Structured pruning on every family, by spec: equal to the masked original, counts by closed formulas before and after, trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import surgery
from tests.zoo import ZOO


def linear(i: int, o: int, bias: bool = True) -> int:
    return i * o + (o if bias else 0)


def norm(d: int) -> int:
    return 2 * d


def attn(d: int, h: int, kv: int = 0, biases: str = "qkvo", head: int = 8) -> int:
    q, k = head * h, head * (kv or h)
    return linear(d, q, "q" in biases) + linear(d, k, "k" in biases) + linear(d, k, "v" in biases) + linear(q, d, "o" in biases)


def ffn(d: int, f: int, bias: bool = True) -> int:
    return linear(d, f, bias) + linear(f, d, bias)


def block(d: int, h: int, f: int) -> int:
    """Attention, feed-forward and two norms, everything with biases."""
    return attn(d, h) + ffn(d, f) + 2 * norm(d)


def encoder(d: int, h: int, f: int, tables: int, pooled: bool) -> int:
    """BERT and its kin; the pooler keeps its 32 outputs."""
    return tables * d + norm(d) + 3 * block(d, h, f) + (linear(d, 32) if pooled else 0)


def gpt2(d: int, h: int, f: int) -> int:
    return (99 + 64) * d + 3 * block(d, h, f) + norm(d)


def llama(d: int, h: int, kv: int, f: int, qk: int = 0) -> int:
    return 2 * 99 * d + 3 * (attn(d, h, kv, "") + 3 * d * f + 2 * d + qk) + d


def mixtral(d: int, h: int, kv: int, f: int, e: int) -> int:
    return 2 * 99 * d + 3 * (attn(d, h, kv, "") + e * (3 * d * f + d) + 2 * d) + d


def t5(d: int, enc: int, dec: int, cross: int, f: int) -> int:
    inner = 3 * (attn(d, enc, biases="") + ffn(d, f, False) + 2 * d) + 8 * enc + d
    outer = 3 * (attn(d, dec, biases="") + attn(d, cross, biases="") + ffn(d, f, False) + 3 * d) + 8 * dec + d
    return 99 * d + inner + outer


def bart(d: int, h: int, f: int) -> int:
    return (99 + 2 * 66) * d + 2 * norm(d) + 3 * block(d, h, f) + 3 * (block(d, h, f) + attn(d, h) + norm(d))


def whisper(d: int, h: int, f: int) -> int:
    one = attn(d, h, biases="qvo")
    layer = one + ffn(d, f) + 2 * norm(d)
    stem = 16 * 3 * 32 + 32 + 32 * 3 * d + d  # the first convolution's 32 channels are no part of the stream
    return stem + 20 * d + 3 * layer + norm(d) + (99 + 32) * d + 3 * (layer + one + norm(d)) + norm(d)


def vit(d: int, h: int, f: int) -> int:
    return d + 17 * d + 3 * 16 * d + d + 3 * block(d, h, f) + norm(d) + linear(d, 32)


def swin(d: int, h: int, f: int, d1: int, h1: int, f1: int) -> int:
    def layer(d: int, h: int, f: int) -> int:
        return attn(d, h, head=4) + 49 * h + ffn(d, f) + 2 * norm(d)

    return 3 * 4 * d + d + norm(d) + 2 * layer(d, h, f) + norm(4 * d) + 4 * d * d1 + 4 * layer(d1, h1, f1) + norm(d1)


def clip(d: int, h: int, f: int) -> int:
    vision = d + 3 * 16 * d + 17 * d + 2 * norm(d) + 3 * block(d, h, f) + 16 * d
    return vision + (99 + 64) * d + 3 * block(d, h, f) + norm(d) + 16 * d + 1


def resnet(stem: int, mid: tuple[int, int], out: tuple[int, int]) -> int:
    total, before = 3 * 49 * stem + norm(stem), stem
    for m, o in zip(mid, out, strict=True):
        total += before * o + norm(o)  # the shortcut
        for _ in range(3):
            total += before * m + 9 * m * m + m * o + 2 * norm(m) + norm(o)
            before = o
    return total


def convnext(d: int, f: int, d1: int, f1: int) -> int:
    def layer(d: int, f: int) -> int:
        return 49 * d + d + norm(d) + ffn(d, f) + d

    return 3 * 16 * d + d + norm(d) + 3 * layer(d, f) + norm(d) + 4 * d * d1 + d1 + 3 * layer(d1, f1) + norm(d1)


HEADS, FFN, WIDTH = "prune heads(ratio = 25%) on layers[*].attn", "prune ffn(ratio = 25%) on layers[*].ffn", "prune width(ratio = 25%)"
BOTH = "encoder.layers[*].{attn, ffn}", "decoder.layers[*]"
SEQ2SEQ = [
    "prune heads(ratio = 25%) on encoder.layers[*].attn, decoder.layers[*].{attn, cross}",
    "prune ffn(ratio = 25%) on encoder.layers[*], decoder.layers[*]",
    WIDTH,
]

Sizes = tuple[object, ...]
CASES: dict[str, tuple[list[str], Callable[..., int], Sizes, Sizes]] = {
    "bert": ([HEADS, FFN, WIDTH], encoder, (32, 4, 64, 165, True), (24, 3, 48, 165, True)),
    "roberta": ([HEADS, FFN, WIDTH], encoder, (32, 4, 64, 164, True), (24, 3, 48, 164, True)),
    "distilbert": ([HEADS, FFN, WIDTH], encoder, (32, 4, 64, 163, False), (24, 3, 48, 163, False)),
    "gpt2": ([HEADS, FFN, WIDTH], gpt2, (32, 4, 128), (24, 3, 96)),
    "llama": (["prune heads(ratio = 50%) on layers[*]", FFN, WIDTH], llama, (32, 4, 2, 64), (24, 2, 2, 48)),
    "qwen3": (["prune kv_groups(ratio = 50%) on layers[*].attn", FFN, WIDTH], llama, (32, 4, 2, 64, 16), (24, 2, 1, 48, 16)),
    "mixtral": (
        ["prune heads(ratio = 50%) on layers[*].attn", "prune experts(ratio = 25%) on layers[*].ffn", FFN, WIDTH],
        mixtral, (32, 4, 2, 64, 4), (24, 2, 2, 48, 3),
    ),
    "t5": (SEQ2SEQ, t5, (32, 4, 4, 4, 64), (24, 3, 3, 3, 48)),
    "bart": (SEQ2SEQ, bart, (32, 4, 64), (24, 3, 48)),
    "whisper": (SEQ2SEQ, whisper, (32, 4, 64), (24, 3, 48)),
    "vit": ([HEADS, FFN, WIDTH], vit, (32, 4, 64), (24, 3, 48)),
    "swin": (
        ["prune heads(ratio = 50%) on stages[*].layers[*].attn", "prune ffn(ratio = 25%) on stages[*].layers[*].ffn", WIDTH],
        swin, (8, 2, 32, 16, 4, 64), (6, 1, 24, 12, 2, 48),
    ),
    "clip": (
        [
            "prune heads(ratio = 25%) on vision.layers[*].attn, text.layers[*].attn",
            "prune ffn(ratio = 25%) on vision.layers[*].ffn, text.layers[*].ffn", WIDTH,
        ],
        clip, (32, 4, 64), (24, 3, 48),
    ),
    "resnet": (
        ["prune channels(ratio = 25%) on stages[*].layers[*]", "prune channels(keep = 6) on embed.conv[0]"],
        resnet, (8, (4, 8), (16, 32)), (6, (3, 6), (12, 32)),
    ),
    "convnext": (["prune ffn(ratio = 25%) on stages[*].layers[*].ffn", WIDTH], convnext, (8, 32, 16, 64), (6, 24, 12, 48)),
}  # fmt: skip


@pytest.mark.parametrize("family", CASES)
def test_cut_is_the_masked_model_and_counts_and_trains(family: str, here: Path) -> None:
    statements, count, before, after = CASES[family]
    entry = ZOO[family]
    Path("model.json").write_text(json.dumps({"architectures": [entry.architecture], **entry.plain_config}), "utf-8")
    result = surgery.compile("surg 1\n\n" + "\n".join(statements) + "\n", "config:model.json")
    totals = result.plan.totals
    assert totals is not None
    assert totals.params_before == count(*before)
    assert totals.params_after == count(*after)
    removed = sum(site.removed for step in result.plan.steps for site in step.sites)
    assert removed == totals.params_before - totals.params_after
    claims = [c for c in result.certificates if c["claim"] == "removed = masked"]
    assert len(claims) == len(statements)
    assert all(c["ok"] and c["max_abs_error"] <= 1e-5 for c in claims), claims
    trains(result.module, entry.inputs(2, 9), count(*after))


def trains(module: nn.Module, inputs: dict[str, object], size: int) -> None:
    """One step moves every parameter that has a gradient, and nearly all have one."""
    module.train()
    inputs = {k: v for k, v in inputs.items() if k not in ("past_key_values", "use_cache")} | {
        k: v[:, 5:] if k == "attention_mask" and "past_key_values" in inputs else v for k, v in inputs.items() if k == "attention_mask"  # type: ignore[index]
    }  # fmt: skip
    out = module(**inputs)
    loss = sum(t.float().square().mean() for t in tree_leaves(out) if isinstance(t, torch.Tensor) and t.is_floating_point())
    assert isinstance(loss, torch.Tensor) and bool(torch.isfinite(loss))
    loss.backward()
    parameters = list(module.parameters())
    assert sum(p.numel() for p in parameters) == size
    with_gradient = [p for p in parameters if p.grad is not None]
    assert sum(p.numel() for p in with_gradient) >= 0.9 * size
    assert all(bool(torch.isfinite(p.grad).all()) for p in with_gradient if p.grad is not None)


class Gated(nn.Module):
    """A hand-written block: attention from plain linears and a gated feed-forward with one fused projection."""

    def __init__(self, d: int = 16, h: int = 4, f: int = 24) -> None:
        super().__init__()
        self.h = h
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.both, self.down = nn.Linear(d, 2 * f, bias=False), nn.Linear(f, d, bias=False)
        self.first, self.second = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(self.first(x)).view(b, n, 3, self.h, -1).permute(2, 0, 3, 1, 4).unbind(0)
        a = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(a.transpose(1, 2).reshape(b, n, -1))
        gate, up = self.both(self.second(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 16, 1)
        self.layers = nn.ModuleList([Gated() for _ in range(2)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).transpose(1, 2)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def test_a_plain_module(here: Path) -> None:
    torch.manual_seed(0)
    model, x = Plain(), torch.randn(2, 3, 7)
    text = "surg 1\n\nprune heads(ratio = 50%) on layers[*].attn\nprune ffn(keep = 16) on layers[*].ffn\nprune width(keep = 12)\n"
    result = surgery.compile(text, model, inputs=(x,))
    d, h, f = 12, 2, 16
    layer = linear(d, 3 * 4 * h) + linear(4 * h, d) + 3 * d * f + 2 * norm(d)
    assert sum(p.numel() for p in result.module.parameters()) == linear(3, d) + 2 * layer + linear(d, 5)
    claims = [c["max_abs_error"] for c in result.certificates if c["claim"] == "removed = masked"]
    assert len(claims) == 3 and max(claims) <= 1e-5
    assert result.module(x).shape == (2, 5)
