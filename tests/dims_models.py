"""Tiny models for the tests of dimension classes: name -> (model, inputs, dynamic axes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn
from torch.export import Dim

LM: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
WIDE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
BART = {"d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 20, "decoder_ffn_dim": 20}  # fmt: skip
Made = tuple[nn.Module, dict[str, torch.Tensor]]


def ids(length: int = 7) -> torch.Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(1))


def text(model: Any, config: Any, **more: torch.Tensor) -> Made:
    return model(config), {"input_ids": ids(), **more}


def seq2seq(model: Any, config: Any) -> Made:
    return model(config), {"input_ids": ids(), "decoder_input_ids": ids(5)}


def image(model: Any, config: Any, size: int = 32) -> Made:
    return model(config), {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))}


AUDIO: dict[str, Any] = {**WIDE, "vocab_size": 32, "conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3), "num_conv_pos_embeddings": 4,
                         "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False}  # fmt: skip


def sound() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 64, generator=torch.Generator().manual_seed(1))}


class Shuffle(nn.Module):
    """Grouped convolutions with a channel shuffle between, as ShuffleNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.down = nn.Conv2d(12, 24, 1, groups=3)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.up = nn.Conv2d(24, 12, 1, groups=3)
        self.norm = nn.GroupNorm(3, 24)
        self.head = nn.Linear(12 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm(self.down(x))
        b, c, h, w = y.shape
        y = y.view(b, 3, c // 3, h, w).transpose(1, 2).reshape(b, c, h, w)
        x = x + self.up(self.depth(y).relu())
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Dense(nn.Module):
    """Each convolution reads the concatenation of all before it, as DenseNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(6 + 4 * i, 4, 3, padding=1) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.head = nn.Linear(18, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [self.stem(x)]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            parts.append(conv(norm(torch.cat(parts, 1)).relu()))
        return self.head(torch.cat(parts, 1).mean((2, 3)))


MODELS: dict[str, Callable[[], Made]] = {
    "bert": lambda: text(tf.BertModel, tf.BertConfig(**WIDE, vocab_size=60, max_position_embeddings=32), attention_mask=torch.ones(2, 7, dtype=torch.long)),
    "roberta": lambda: text(tf.RobertaModel, tf.RobertaConfig(**WIDE, **LM, max_position_embeddings=34)),
    "distilbert": lambda: text(tf.DistilBertModel, tf.DistilBertConfig(vocab_size=60, dim=24, n_layers=2, n_heads=4, hidden_dim=20, max_position_embeddings=32)),
    "albert": lambda: text(tf.AlbertModel, tf.AlbertConfig(**WIDE, vocab_size=60, embedding_size=12, max_position_embeddings=32)),
    "deberta": lambda: text(tf.DebertaV2Model, tf.DebertaV2Config(**WIDE, vocab_size=60, relative_attention=True, pos_att_type=["c2p", "p2c"], max_position_embeddings=32, position_buckets=8)),
    "gpt2": lambda: text(tf.GPT2LMHeadModel, tf.GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=4, n_positions=32, use_cache=False, bos_token_id=1, eos_token_id=2)),
    "llama": lambda: text(tf.LlamaForCausalLM, tf.LlamaConfig(**WIDE, **LM, num_key_value_heads=2, head_dim=6, use_cache=False)),
    "llama_eager": lambda: text(tf.LlamaForCausalLM, tf.LlamaConfig(**WIDE, **LM, num_key_value_heads=2, head_dim=6, use_cache=False, attn_implementation="eager")),
    "qwen3": lambda: text(tf.Qwen3ForCausalLM, tf.Qwen3Config(**WIDE, **LM, num_key_value_heads=2, head_dim=6, use_cache=False)),
    "gemma3": lambda: text(tf.Gemma3ForCausalLM, tf.Gemma3TextConfig(**WIDE, **LM, num_key_value_heads=2, head_dim=6, sliding_window=4, use_cache=False)),
    "phi3": lambda: text(tf.Phi3ForCausalLM, tf.Phi3Config(**WIDE, **LM, num_key_value_heads=2, use_cache=False)),
    "mixtral": lambda: text(tf.MixtralForCausalLM, tf.MixtralConfig(**WIDE, **LM, num_key_value_heads=2, num_local_experts=4, use_cache=False)),
    "qwen2_moe": lambda: text(tf.Qwen2MoeForCausalLM, tf.Qwen2MoeConfig(**WIDE, **LM, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=10, shared_expert_intermediate_size=14, use_cache=False)),
    "gpt_oss": lambda: text(tf.GptOssForCausalLM, tf.GptOssConfig(**WIDE, **LM, num_key_value_heads=2, head_dim=6, num_local_experts=4, num_experts_per_tok=2, sliding_window=4, use_cache=False)),
    "gpt_neox": lambda: text(tf.GPTNeoXForCausalLM, tf.GPTNeoXConfig(**WIDE, **LM, rotary_pct=0.67, use_cache=False)),
    "gptj": lambda: text(tf.GPTJForCausalLM, tf.GPTJConfig(vocab_size=60, n_embd=24, n_layer=2, n_head=4, rotary_dim=4, n_positions=32, use_cache=False, bos_token_id=1, eos_token_id=2)),
    "bloom": lambda: text(tf.BloomForCausalLM, tf.BloomConfig(**LM, hidden_size=24, n_layer=2, n_head=4, use_cache=False)),
    "falcon": lambda: text(tf.FalconForCausalLM, tf.FalconConfig(**LM, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True, use_cache=False)),
    "falcon_mqa": lambda: text(tf.FalconForCausalLM, tf.FalconConfig(**LM, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, multi_query=True, new_decoder_architecture=False, use_cache=False)),
    "opt": lambda: text(tf.OPTForCausalLM, tf.OPTConfig(**LM, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=20, max_position_embeddings=32, word_embed_proj_dim=24, use_cache=False)),
    "mamba2": lambda: text(tf.Mamba2ForCausalLM, tf.Mamba2Config(**LM, hidden_size=24, num_hidden_layers=2, state_size=6, num_heads=8, head_dim=6, n_groups=2, chunk_size=4, use_cache=False)),
    "mpt": lambda: text(tf.MptForCausalLM, tf.MptConfig(vocab_size=60, d_model=24, n_heads=4, n_layers=2, max_seq_len=32, expansion_ratio=1, use_cache=False)),
    "t5": lambda: seq2seq(tf.T5ForConditionalGeneration, tf.T5Config(vocab_size=60, d_model=24, num_layers=2, num_heads=4, d_kv=6, d_ff=20, use_cache=False, decoder_start_token_id=0)),
    "bart": lambda: seq2seq(tf.BartModel, tf.BartConfig(**BART, **LM, max_position_embeddings=32, use_cache=False)),
    "marian": lambda: seq2seq(tf.MarianModel, tf.MarianConfig(**BART, **LM, max_position_embeddings=32, use_cache=False, decoder_start_token_id=0)),
    "whisper": lambda: (tf.WhisperModel(tf.WhisperConfig(**BART, **LM, num_mel_bins=8, max_source_positions=10, max_target_positions=12, use_cache=False, decoder_start_token_id=1)), {"input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1)), "decoder_input_ids": ids(5)}),
    "vit": lambda: image(tf.ViTModel, tf.ViTConfig(**WIDE, image_size=16, patch_size=4), 16),
    "dinov2": lambda: image(tf.Dinov2Model, tf.Dinov2Config(**{k: v for k, v in WIDE.items() if k != "intermediate_size"}, image_size=16, patch_size=4), 16),
    "beit": lambda: image(tf.BeitModel, tf.BeitConfig(**WIDE, image_size=16, patch_size=4, use_relative_position_bias=True), 16),
    "clip": lambda: (tf.CLIPModel(tf.CLIPConfig(text_config={**WIDE, **LM, "max_position_embeddings": 32}, vision_config={**WIDE, "image_size": 16, "patch_size": 4}, projection_dim=14)), {"input_ids": ids(), "pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}),
    "swin": lambda: image(tf.SwinModel, tf.SwinConfig(image_size=32, patch_size=2, embed_dim=12, depths=[2, 1], num_heads=[2, 4], window_size=4)),
    "segformer": lambda: image(tf.SegformerModel, tf.SegformerConfig(depths=[1, 1], num_encoder_blocks=2, hidden_sizes=[8, 16], num_attention_heads=[1, 2], sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2], decoder_hidden_size=8)),
    "resnet": lambda: image(tf.ResNetModel, tf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic")),
    "resnet_bottleneck": lambda: image(tf.ResNetModel, tf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="bottleneck")),
    "regnet": lambda: image(tf.RegNetModel, tf.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, layer_type="y")),
    "mobilenet_v2": lambda: image(tf.MobileNetV2Model, tf.MobileNetV2Config(image_size=32, depth_multiplier=0.25, depth_divisible_by=4, min_depth=4)),
    "convnext": lambda: image(tf.ConvNextModel, tf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], image_size=32, num_stages=2)),
    "conformer": lambda: (tf.Wav2Vec2ConformerModel(tf.Wav2Vec2ConformerConfig(**AUDIO, position_embeddings_type="relative", conv_depthwise_kernel_size=3)), sound()),
    "wav2vec2": lambda: (tf.Wav2Vec2Model(tf.Wav2Vec2Config(**AUDIO)), sound()),
    "siglip": lambda: image(tf.SiglipVisionModel, tf.SiglipVisionConfig(**WIDE, image_size=16, patch_size=4), 16),
    "mobilebert": lambda: text(tf.MobileBertModel, tf.MobileBertConfig(**WIDE, vocab_size=60, embedding_size=8, intra_bottleneck_size=12, true_hidden_size=12, max_position_embeddings=32)),
    "squeezebert": lambda: text(tf.SqueezeBertModel, tf.SqueezeBertConfig(**WIDE, vocab_size=60, embedding_size=24, q_groups=2, k_groups=2, v_groups=2, post_attention_groups=1, intermediate_groups=2, output_groups=2, max_position_embeddings=32)),
    "swinv2": lambda: image(tf.Swinv2Model, tf.Swinv2Config(image_size=32, patch_size=2, embed_dim=12, depths=[2, 1], num_heads=[2, 4], window_size=4)),
    "pvt": lambda: image(tf.PvtModel, tf.PvtConfig(image_size=32, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[8, 16], num_attention_heads=[1, 2], patch_sizes=[4, 2], strides=[4, 2], sequence_reduction_ratios=[2, 1], mlp_ratios=[2, 2])),
    "levit": lambda: image(tf.LevitModel, tf.LevitConfig(image_size=32, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 3, 4], depths=[1, 1, 1], key_dim=[4, 4, 4], mlp_ratio=[2, 2, 2], attention_ratio=[2, 2, 2], patch_size=16)),
    "poolformer": lambda: image(tf.PoolFormerModel, tf.PoolFormerConfig(hidden_sizes=[8, 12, 16, 16], depths=[1, 1, 1, 1])),
    "xlnet": lambda: text(tf.XLNetModel, tf.XLNetConfig(vocab_size=60, d_model=24, n_layer=2, n_head=4, d_inner=20, use_mems_eval=False)),
    "deepseek_v3": lambda: text(tf.DeepseekV3ForCausalLM, tf.DeepseekV3Config(**WIDE, **LM, num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=6, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=10, first_k_dense_replace=1, use_cache=False)),
    "shuffle": lambda: (Shuffle(), {"x": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}),
    "dense": lambda: (Dense(), {"x": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))}),
    "encoder": lambda: (nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 20, batch_first=True), 2), {"src": torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1))}),
}  # fmt: skip


def dynamic(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Batch is dynamic everywhere, length too for token inputs."""
    return {
        name: {0: Dim.AUTO, 1: Dim.AUTO} if name.endswith("ids") or name in ("attention_mask", "src") else {0: Dim.AUTO}
        for name, value in inputs.items()
    }
