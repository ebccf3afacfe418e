"""Adapter folders for tests and for the examples in pages: small, seeded, written tensor by tensor as peft writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
BERT = "encoder.layer.{}.attention.self.{}"


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A folder with these tensors (keys without the prefix that all have) and this config."""
    folder.mkdir(parents=True, exist_ok=True)
    layers = sorted({k.partition(".lora_")[0] for k in tensors if ".lora_" in k})
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": layers, **config}
    (folder / "adapter_config.json").write_text(json.dumps(said, indent=1), "utf-8")
    save_file(
        {PREFIX + k: t.clone().contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors", metadata={"format": "pt"}
    )
    return folder


def low(paths: list[str], rank: int, out: int = 32, inp: int = 32, seed: int = 1, magnitude: bool = False) -> dict[str, torch.Tensor]:
    """Factors for linear layers of one size."""
    g = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    for path in paths:
        made[f"{path}.lora_A.weight"] = 0.3 * torch.randn(rank, inp, generator=g)
        made[f"{path}.lora_B.weight"] = 0.3 * torch.randn(out, rank, generator=g)
        if magnitude:
            made[f"{path}.lora_magnitude_vector"] = 0.1 + torch.rand(out, generator=g)
    return made


def bert(*words: str, layers: int = 3) -> list[str]:
    """The paths of projections of the tiny BERT."""
    return [BERT.format(i, w) for i in range(layers) for w in words]


def example(name: str, folder: Path) -> Path:
    """An adapter of the pages' BERT by the name that a page gives it."""
    at = folder / name
    if name == "news":
        return write(at, low(bert("query", "value"), 4))
    if name == "legal":
        return write(at, low(bert("query", "key"), 2, seed=2), r=2, lora_alpha=6, use_rslora=True)
    if name == "dora":
        return write(at, low(bert("query"), 2, seed=3, magnitude=True), r=2, lora_alpha=4, use_dora=True)
    if name == "wide":
        return write(at, low(bert("query"), 4, out=64, inp=64))
    if name == "chat":
        return write(at, low(["model.layers.0.self_attn.q_proj"], 4), base_model_name_or_path="some-lab/chat-1b")
    if name == "broken":
        tensors = low(bert("query"), 4)
        tensors[f"{BERT.format(1, 'query')}.lora_B.weight"][0, 0] = float("nan")
        return write(at, tensors)
    if name == "uneven":
        return write(at, low(bert("query"), 2))
    if name == "clusters":
        return write(at, {f"{p}.adamss_newB": torch.zeros(8, 33) for p in bert("key")}, peft_type="ADAMSS")
    if name == "elsewhere":
        return write(at, low(bert("query"), 4), base_model_name_or_path="some-lab/other-bert")
    if name == "quick":
        return write(at, low(bert("query"), 4), init_lora_weights="pissa_niter_4")
    if name == "style":
        return write(at, low([f"transformer.h.{i}.attn.c_attn" for i in range(3)], 4, out=96))
    raise ValueError(name)
