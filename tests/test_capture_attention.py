"""Attention that is written in uncommon ways: sinks in the softmax, fused projections that are taken apart by numbers, local windows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

import surgery
from surgery.model.capture import materialise, pipeline
from surgery.opening import open_program
from tests.capture_support import assert_bitwise, flat_inputs, flat_outputs
from tests.zoo import seq2seq

TINY = dict(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
LONG = dict(
    vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_decoder_layers=1, num_heads=4, local_radius=3, pad_token_id=0,
    decoder_start_token_id=0, relative_attention_num_buckets=8,
)  # fmt: skip


def write(family: str, architecture: str, sizes: dict[str, Any]) -> str:
    Path("config.json").write_text(json.dumps({"model_type": family, "architectures": [architecture], **sizes}))
    return "config:config.json"


def test_sinks_go_with_their_heads(here: Path) -> None:
    sizes = {**TINY, "head_dim": 8, "intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8}
    ref = write("gpt_oss", "GptOssForCausalLM", sizes)
    result = surgery.compile('surg 1\nprune heads(ratio = 50%) on layers[*].attn\nemit torch to "out"\n', ref)
    assert next(c for c in result.certificates if c["claim"] == "removed = masked")["ok"]
    sites = {s.role: s for s in open_program("out")[0].anatomy.sites}
    assert sites["layers[0].attn"].heads == 2 and sites["layers[0].attn.sinks"].shape == (2,)
    assert sites["layers[0].attn.sinks"].weight == "model.layers.0.self_attn.sinks"


def test_rows_that_are_taken_by_number(here: Path) -> None:
    sizes = {k: v for k, v in TINY.items() if k != "num_key_value_heads"}
    ref = write("falcon", "FalconForCausalLM", {**sizes, "num_kv_heads": 2, "new_decoder_architecture": True})
    sites = {s.role: s for s in open_program(ref)[0].anatomy.sites}
    assert (sites["layers[0].attn"].heads, sites["layers[0].attn"].kv_heads) == (4, 2)
    assert sites["layers[0].attn.q"].rows == ((0, 16), (32, 48))
    assert sites["layers[0].attn.k"].rows == ((16, 24), (48, 56)) and sites["layers[0].attn.v"].rows == ((24, 32), (56, 64))


def test_windows_over_positions() -> None:
    """Lengths between two blocks of four and whole blocks, which the model's own code fills up to one more."""
    capture = pipeline.capture_config({"model_type": "longt5", **LONG}, "LongT5ForConditionalGeneration")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model("longt5", **LONG)
    model: Any = transformers.LongT5ForConditionalGeneration(config).eval()
    graph = materialise(capture, model.state_dict())
    for length in (11, 8):
        inputs = seq2seq(2, length)
        with torch.no_grad():
            got, want = graph(*flat_inputs(capture, inputs)), flat_outputs(capture, model(**inputs))
        if length % 4:
            assert_bitwise(got, want)
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(got, want, strict=True))
