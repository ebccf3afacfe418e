"""Checkpoints and an adapter that the benchmarks of merging work on: random, seeded, of the shape of a Llama."""

from __future__ import annotations

import json
import math
from pathlib import Path

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 2048,
    "tie_word_embeddings": False, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SEVEN = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}
SHARD = 180_000_000
NAMES = ("base", "one", "two")
FILLED = ("model.embed_tokens.weight", "model.layers.0.", "lm_head.weight")
"""Which tensors of the large checkpoints hold numbers; the others are holes of their files, zeros that stand nowhere."""
RANK = 16


def write_models(folder: Path) -> None:
    """Three checkpoints of 0.45B parameters in bfloat16, in shards."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in CONFIG.items() if k not in ("model_type", "architectures", "dtype")}))
        model.to(torch.bfloat16).save_pretrained(folder / name, max_shard_size=SHARD)


def write_adapter(folder: Path, base: Path) -> None:
    """A LoRA of rank 16 on every projection, as peft stores it, with factors that are not zero."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    width, inner = int(str(CONFIG["hidden_size"])), int(str(CONFIG["intermediate_size"]))
    sizes = {f"self_attn.{p}_proj": (width, width) for p in "qkvo"}
    sizes |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(int(str(CONFIG["num_hidden_layers"]))):
        for name, (rows, columns) in sizes.items():
            at = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) / columns**0.5
            tensors[f"{at}.lora_B.weight"] = 0.01 * torch.randn(rows, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": RANK, "lora_alpha": 2 * RANK,
        "lora_dropout": 0.0, "bias": "none", "target_modules": sorted(n.rpartition(".")[2] for n in sizes), "inference_mode": True,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_seven(folder: Path, layers: int = 32) -> int:
    """Three checkpoints of the shape of a 7B Llama in bfloat16; the bytes of one. Files have holes where a tensor is not :data:`FILLED`."""
    import torch

    from surgery.model.shards import header_bytes, plan_shards

    words = int(str(CONFIG["vocab_size"]))
    shapes = _shapes(layers, words)
    shards = plan_shards({n: 2 * math.prod(s) for n, s in shapes.items()})
    total = sum(2 * math.prod(s) for s in shapes.values())
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**CONFIG, **SEVEN, "num_hidden_layers": layers}))
        files = {}
        for i, names in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            header = header_bytes(names, shapes, dict.fromkeys(names, "bfloat16"), {"format": "pt"})
            with open(folder / name / file, "wb") as out:
                out.write(header)
                for tensor in names:
                    size = math.prod(shapes[tensor])
                    if tensor.startswith(FILLED):
                        value = torch.randn(size, generator=generator).mul_(0.02).to(torch.bfloat16)
                        out.write(memoryview(value.view(torch.uint8).numpy()))
                    else:
                        out.seek(2 * size, 1)
                out.truncate(out.tell())
            files |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shapes(layers: int, words: int) -> dict[str, tuple[int, ...]]:
    hidden, inner = SEVEN["hidden_size"], SEVEN["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
