"""The models that the cut is measured on, and a checkpoint in shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Case = tuple[nn.Module, dict[str, Any], list[tuple[str, ...]]]
"""(module, example inputs, for each block the paths of the projections whose outputs are hidden units)."""


def models() -> dict[str, Callable[[], Case]]:
    """Name -> what makes the case, so that a process holds the model that it measures and no other."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

    torch.manual_seed(0)
    ids = torch.randint(3, 1000, (2, 16))

    def case(made: nn.Module, inputs: dict[str, Any]) -> Case:
        return made.eval(), inputs, blocks(made)

    bert = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 32, "num_attention_heads": 8, "num_key_value_heads": 4}
    llama = LlamaConfig(vocab_size=32000, use_cache=False, **shape)
    return {
        "MiniLM (BERT, 6 layers, 384 wide)": lambda: case(BertModel(bert), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
        "ViT-base (12 layers, 768 wide)": lambda: case(ViTModel(ViTConfig()), {"pixel_values": torch.randn(2, 3, 224, 224)}),
        "Llama-shaped (32 layers, 512 wide)": lambda: case(LlamaForCausalLM(llama), {"input_ids": ids}),
    }


def blocks(model: nn.Module) -> list[tuple[str, ...]]:
    """The first projections of each feed-forward block, by their sizes: they widen what the layer carries."""
    width = model.config.intermediate_size  # type: ignore[union-attr]
    up = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.out_features == width]
    gated = any(n.endswith("gate_proj") for n in up)
    return [tuple(up[i : i + 2]) for i in range(0, len(up), 2)] if gated else [(n,) for n in up]


def checkpoint(folder: Path, layers: int, shard: int = 256 << 20) -> tuple[int, int]:
    """A Llama-shaped bf16 checkpoint with random values; (bytes of all tensors, bytes of the largest)."""
    from safetensors.torch import save_file

    hidden, inner, vocab = 2048, 5632, 32000
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner, "vocab_size": vocab,
        "num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {at + f"self_attn.{p}_proj.weight": (hidden if p in "qo" else hidden // 4, hidden) for p in "qkvo"}
        shapes |= {at + "mlp.gate_proj.weight": (inner, hidden), at + "mlp.up_proj.weight": (inner, hidden)}
        shapes |= {at + "mlp.down_proj.weight": (hidden, inner)}
        shapes |= {at + f"{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        each = 2 * torch.Size(shape).numel()
        if size + each > shard and groups[-1]:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += each
    files = {}
    for i, group in enumerate(groups, 1):
        file = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        save_file({n: (0.02 * torch.randn(s, generator=generator)).bfloat16() for n, s in group.items()}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(group, file)
    total = sum(2 * torch.Size(s).numel() for s in shapes.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}))
    return total, max(2 * torch.Size(s).numel() for s in shapes.values())
