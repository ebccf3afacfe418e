"""One spec a family, from what it has: each line with the number of parameters it adds, worked out by hand from the config."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from tests.zoo import ZOO, Entry


def lora(rank: int, *sizes: int) -> int:
    """``rank (in + out)`` for each pair of sizes."""
    return sum(rank * n for n in sizes)


def dora(rank: int, inp: int, out: int) -> int:
    return rank * (inp + out) + out


def bottleneck(width: int, hidden: int) -> int:
    return 2 * width * hidden + width + hidden


@dataclass(frozen=True)
class Case:
    """Statements with the parameters they add, then where biases train (empty: the family has none)."""

    lines: tuple[tuple[str, int], ...]
    bitfit: tuple[str, ...] = ()
    """Selectors of ``adapt bitfit``."""
    biases: tuple[str, ...] = ()
    """Prefixes of the parameters that those selectors stand for."""

    @property
    def added(self) -> int:
        return sum(count for _, count in self.lines)

    def statements(self) -> str:
        lines = [text for text, _ in self.lines]
        if self.bitfit:
            lines.append("adapt bitfit on " + ", ".join(self.bitfit))
        return "\n".join(lines)


def encoder(stack: str, prefix: str, layers: int, ffn: int = 64, embed: tuple[str, int] = ("embed.tokens", 99 + 32)) -> Case:
    """Width 32: the plain transformer encoder."""
    return Case(
        (
            (f"adapt lora(rank = 4) on {stack}[*].attn.{{q, v}}", layers * 2 * lora(4, 64)),
            (f"adapt dora(rank = 2) on {stack}[*].ffn.{{up, down}}", layers * (dora(2, 32, ffn) + dora(2, ffn, 32))),
            (f"adapt lora(rank = 2) on {embed[0]}", lora(2, embed[1])),
            (f"insert bottleneck(width = 4) after {stack}[*].attn", layers * bottleneck(4, 32)),
            (f"insert bottleneck(width = 6, activation = gelu) beside {stack}[*].ffn", layers * bottleneck(6, 32)),
        ),
        (f"{stack}[*].**",),
        (prefix,),
    )


def decoder(layers: int, kv: int = 16, extra: tuple[tuple[str, int], ...] = (), ffn: str = "ffn.{up, gate, down}") -> Case:
    """Width 32, feed-forward 64, a gate, no biases."""
    change = (ffn, layers * (2 * dora(2, 32, 64) + dora(2, 64, 32)))
    return Case(
        (
            ("adapt lora(rank = 4) on layers[*].attn.{q, v}", layers * (lora(4, 64) + lora(4, 32 + kv))),
            *extra,
            *(((f"adapt dora(rank = 2) on layers[*].{change[0]}", change[1]),) if ffn else ()),
            ("adapt lora(rank = 2) on embed.tokens", lora(2, 99 + 32)),
            ("insert bottleneck(width = 4) after layers[*].attn", layers * bottleneck(4, 32)),
            ("insert bottleneck(width = 6, activation = silu) beside layers[*].ffn", layers * bottleneck(6, 32)),
        )
    )


def both(biases: bool, embed: tuple[str, int]) -> Case:
    """An encoder and a decoder of width 32 with cross-attention."""
    lines = [
        ("adapt lora(rank = 4) on encoder.layers[*].attn.{q, v}, decoder.layers[*].{attn, cross}.{q, v}", 3 * 6 * lora(4, 64)),
        ("adapt dora(rank = 2) on {encoder, decoder}.layers[*].ffn.{up, down}", 6 * (dora(2, 32, 64) + dora(2, 64, 32))),
        (f"adapt lora(rank = 2) on {embed[0]}", lora(2, embed[1])),
        ("insert bottleneck(width = 4) after encoder.layers[*].attn, decoder.layers[*].cross", 6 * bottleneck(4, 32)),
        ("insert bottleneck(width = 6) beside encoder.layers[*].ffn, decoder.layers[*].ffn", 6 * bottleneck(6, 32)),
    ]
    if not biases:
        return Case(tuple(lines))
    return Case(tuple(lines), ("encoder.layers[*].**", "decoder.layers[*].**"), ("encoder.layers.", "decoder.layers."))


def per_stage(kind: str, rank: int, shapes: list[tuple[int, int, int]]) -> int:
    """Sum over (layers, in, out) of a method's count."""
    return sum(n * (dora(rank, i, o) if kind == "dora" else lora(rank, i + o)) for n, i, o in shapes)


CASES: dict[str, Case] = {
    "bert": encoder("layers", "encoder.layer.", 3),
    "roberta": encoder("layers", "encoder.layer.", 3),
    "distilbert": encoder("layers", "transformer.layer.", 3),
    "albert": encoder("layers", "encoder.albert_layer_groups.", 1, embed=("embed.tokens", 99 + 16)),
    "deberta-v2": encoder("layers", "encoder.layer.", 3),
    "gpt2": Case(
        (
            ("adapt lora(rank = 4) on layers[*].attn.q", 3 * lora(4, 64)),
            ("adapt dora(rank = 2) on layers[*].attn.v", 3 * dora(2, 32, 32)),
            ("adapt dora(rank = 2) on layers[*].ffn.{up, down}", 3 * (dora(2, 32, 128) + dora(2, 128, 32))),
            ("adapt lora(rank = 2) on embed.tokens", lora(2, 99 + 32)),
            ("insert bottleneck(width = 4) after layers[*].attn", 3 * bottleneck(4, 32)),
            ("insert bottleneck(width = 6, activation = gelu_tanh) beside layers[*].ffn", 3 * bottleneck(6, 32)),
        ),
        ("layers[*].**",),
        ("transformer.h.",),
    ),
    "llama": decoder(3),
    "qwen3": decoder(3),
    "gemma3_text": decoder(6),
    "phi3": decoder(3),
    "mixtral": decoder(
        3,
        extra=(
            ("adapt lora(rank = 2) on layers[*].ffn.experts.{up, gate}", 3 * 4 * 2 * lora(2, 96)),
            ("adapt dora(rank = 2) on layers[*].ffn.experts.down", 3 * 4 * dora(2, 64, 32)),
            ("adapt lora(rank = 2) on layers[*].ffn.router", 3 * lora(2, 36)),
        ),
        ffn="",
    ),
    "t5": both(False, ("embed.tokens", 99 + 32)),
    "bart": both(True, ("embed.tokens", 99 + 32)),
    "whisper": both(True, ("embed.conv[0]", 16 * 3 + 32)),
    "vit": encoder("layers", "layers.", 3, embed=("embed.patch", 3 * 16 + 32)),
    "swin": Case(
        (
            ("adapt lora(rank = 4) on stages[*].layers[*].attn.{q, v}", per_stage("lora", 4, [(4, 8, 8), (8, 16, 16)])),
            (
                "adapt dora(rank = 2) on stages[*].layers[*].ffn.{up, down}",
                per_stage("dora", 2, [(2, 8, 32), (2, 32, 8), (4, 16, 64), (4, 64, 16)]),
            ),
            ("adapt lora(rank = 2) on embed.patch, stages[0].downsample", lora(2, 3 * 4 + 8, 32 + 16)),
            ("insert bottleneck(width = 4) after stages[*].layers[*].attn", 2 * bottleneck(4, 8) + 4 * bottleneck(4, 16)),
            (
                "insert bottleneck(width = 6, activation = gelu) beside stages[*].layers[*].ffn",
                2 * bottleneck(6, 8) + 4 * bottleneck(6, 16),
            ),
        ),
        ("stages[*].layers[*].**",),
        ("encoder.layers.0.blocks.", "encoder.layers.1.blocks."),
    ),
    "clip": Case(
        (
            ("adapt lora(rank = 4) on {vision, text}.layers[*].attn.{q, v}", 6 * 2 * lora(4, 64)),
            ("adapt dora(rank = 2) on {vision, text}.layers[*].ffn.{up, down}", 6 * (dora(2, 32, 64) + dora(2, 64, 32))),
            ("adapt lora(rank = 2) on embed.{patch, tokens}, {vision, text}.head", lora(2, 3 * 16 + 32, 99 + 32, 48, 48)),
            ("insert bottleneck(width = 4) after vision.layers[*].attn, text.layers[*].attn", 6 * bottleneck(4, 32)),
            ("insert bottleneck(width = 6) beside text.layers[*].ffn", 3 * bottleneck(6, 32)),
        ),
        ("vision.layers[*].**", "text.layers[*].**"),
        ("vision_model.encoder.layers.", "text_model.encoder.layers."),
    ),
    "wav2vec2-conformer": Case(
        (
            ("adapt lora(rank = 4) on layers[*].attn.{q, v}", 3 * 2 * lora(4, 64)),
            ("adapt dora(rank = 2) on layers[*].ffn[*].{up, down}", 6 * (dora(2, 32, 64) + dora(2, 64, 32))),
            ("adapt lora(rank = 32) on layers[*].conv[1]", 3 * (32 * 5 + 32)),  # depthwise: one factor a channel
            ("adapt lora(rank = 2) on layers[*].conv[0, 2], embed.conv[*]", 3 * lora(2, 32 + 64, 32 + 32) + lora(2, 10 + 16, 16 * 4 + 16)),
            ("insert bottleneck(width = 4) after layers[*].attn", 3 * bottleneck(4, 32)),
            ("insert bottleneck(width = 6, activation = gelu) beside layers[*].ffn[1]", 3 * bottleneck(6, 32)),
        ),
        ("layers[*].**",),
        ("encoder.layers.",),
    ),
    "resnet": Case(
        (
            ("adapt lora(rank = 2) on stages[0].layers[*].conv[0, 2]", lora(2, 8 + 4, 4 + 16) + 2 * lora(2, 16 + 4, 4 + 16)),
            ("adapt dora(rank = 2) on stages[*].layers[*].conv[1]", 3 * dora(2, 4 * 9, 4) + 3 * dora(2, 8 * 9, 8)),
            ("adapt lora(rank = 2) on embed.conv[*], stages[*].layers[0].shortcut", lora(2, 3 * 49 + 8, 8 + 16, 16 + 32)),
            ("insert bottleneck(width = 4) after stages[*].layers[*]", 3 * bottleneck(4, 16) + 3 * bottleneck(4, 32)),
        ),
        ("stages[*].layers[*].**",),
        ("encoder.stages.",),
    ),
    "convnext": Case(
        (
            ("adapt lora(rank = 4) on stages[*].layers[*].ffn.up", 3 * lora(4, 8 + 32) + 3 * lora(4, 16 + 64)),
            ("adapt dora(rank = 2) on stages[*].layers[*].ffn.down", 3 * dora(2, 32, 8) + 3 * dora(2, 64, 16)),
            ("adapt lora(rank = 16) on stages[*].layers[*].conv[*]", 3 * (16 * 49 + 8 * 16 // 8) + 3 * (16 * 49 + 16)),
            ("adapt lora(rank = 2) on embed.patch, stages[1].downsample", lora(2, 3 * 16 + 8, 8 * 4 + 16)),
            (
                "insert bottleneck(width = 6, activation = gelu) beside stages[*].layers[*].ffn",
                3 * bottleneck(6, 8) + 3 * bottleneck(6, 16),
            ),
        ),
        ("stages[*].layers[*].**",),
        ("encoder.stages.0.layers.", "encoder.stages.1.layers."),
    ),
    "audio-spectrogram-transformer": encoder("layers", "layers.", 3, embed=("embed.patch", 16 + 32)),
}


ONNX = ("bert", "deberta-v2", "gpt2", "mixtral", "whisper", "vit", "clip", "resnet", "convnext", "audio-spectrogram-transformer")
"""The families for which the tests also emit and run an ONNX file: one of each kind, since an export takes seconds."""


def trained_like(entry: Entry, seed: int = 0) -> nn.Module:
    """The live model with weights of a scale at which every part matters to the output."""
    model = entry.make_model(seed)
    generator = torch.Generator().manual_seed(seed + 2)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.ndim > 1:
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


assert set(CASES) == {family for family, entry in ZOO.items() if entry.capturable}
