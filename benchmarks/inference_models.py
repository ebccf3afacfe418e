"""The models of the inference figures: seeded weights of published shapes (MiniLM has its own), and the inputs that they are timed on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
VIT = {"model_type": "vit", "architectures": ["ViTModel"]}
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
    "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
BERT_12 = {"model_type": "bert", "architectures": ["BertModel"], "num_hidden_layers": 12}


@dataclass(frozen=True)
class Shape:
    """``label`` as the table says it; ``past`` steps of a cache that is filled."""

    label: str
    batch: int
    length: int
    past: int = 0


@dataclass(frozen=True)
class Case:
    """One model. ``optimizer``: what onnxruntime's optimizer calls its kind; ``task``: what optimum calls it."""

    name: str
    config: dict[str, Any] | None
    shapes: tuple[Shape, ...]
    optimizer: str
    task: str
    spec: str = ""
    options: str = ""
    images: bool = False
    cached: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


ENCODER = (Shape("(1, 16)", 1, 16), Shape("(1, 128)", 1, 128), Shape("(8, 128)", 8, 128))
DECODER = (Shape("prefill (1, 128)", 1, 128), Shape("one token, 128 before", 1, 1, 128))
HALF = "prune heads(ratio = 50%) on layers[*].attn\nprune ffn(ratio = 50%) on layers[*].ffn\n"
CASES = {
    "minilm": Case("minilm", None, ENCODER, "bert", "feature-extraction"),
    "pruned": Case("pruned", None, ENCODER, "bert", "feature-extraction", spec=HALF),
    "gpt2": Case("gpt2", GPT2, DECODER, "gpt2", "text-generation-with-past", options="cache = true", cached=True),
    "llama": Case("llama", LLAMA, DECODER, "gpt2", "text-generation-with-past", options="cache = true", cached=True),
    "vit": Case("vit", VIT, (Shape("batch 1", 1, 0), Shape("batch 8", 8, 0)), "vit", "feature-extraction", images=True),
}


def folder_of(case: Case, work: Path) -> Path:
    """The checkpoint that all arms read, written into ``work`` where there is none yet."""
    if case.config is None:
        from surgery.model.checkpoint import open_checkpoint

        path = open_checkpoint("minilm").path
        assert path is not None
        return path
    return seeded(case.config, work / f"{case.name}-checkpoint")


def seeded(config: dict[str, Any], folder: Path) -> Path:
    if not (folder / "config.json").exists():
        import transformers

        torch.manual_seed(0)
        plain = transformers.AutoConfig.for_model(**config)
        made = getattr(transformers, config["architectures"][0])(plain)
        made.save_pretrained(folder)
    return folder


def live(folder: Path) -> nn.Module:
    """The original class in evaluation mode, fp32."""
    import json

    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    made: nn.Module = getattr(transformers, name).from_pretrained(str(folder), dtype=torch.float32)
    return made.eval().requires_grad_(False)


def feeds(case: Case, model: nn.Module, shape: Shape) -> dict[str, torch.Tensor]:
    """Seeded inputs by their flat names; caches as ``past_key_values.LAYER.key`` and ``.value``."""
    generator = torch.Generator().manual_seed(0)
    config: Any = model.config
    if case.images:
        return {"pixel_values": torch.randn(shape.batch, 3, config.image_size, config.image_size, generator=generator)}
    ids = torch.randint(1000, 20000, (shape.batch, shape.length), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones(shape.batch, shape.past + shape.length, dtype=torch.long)}
    if not case.cached:
        return found | {"token_type_ids": torch.zeros_like(ids)}
    found["position_ids"] = torch.arange(shape.past, shape.past + shape.length).expand(shape.batch, -1).contiguous()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        for what in ("key", "value"):
            found[f"past_key_values.{layer}.{what}"] = torch.randn(shape.batch, heads, shape.past, width, generator=generator)
    return found


class Plain(nn.Module):
    """A decoder with its cache as tensors, as exporters want it: keys and values in, logits and keys and values out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, past: list[Any]) -> tuple[Any, ...]:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache_of(past), use_cache=True)
        return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))


def cache_of(flat: Any) -> Any:
    """A cache of keys and values in turns; what has no steps stays empty, as it is in generation."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(len(flat) // 2):
        if flat[2 * layer].shape[-2] != 0:
            cache.update(flat[2 * layer], flat[2 * layer + 1], layer)
    return cache


def past_of(given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    layers = sum(1 for n in given if n.endswith(".key"))
    return [given[f"past_key_values.{i}.{what}"] for i in range(layers) for what in ("key", "value")]
