"""Latent attention: the cache holds what keys and values are made of, in a form that no config states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import surgery
from surgery.core.diagnostics import SurgeryError
from surgery.model.capture import materialise, pipeline
from surgery.opening import open_program
from tests.capture_support import assert_bitwise, flat_inputs, flat_outputs

SIZES = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=6, n_routed_experts=4,
    n_group=2, topk_group=1, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1, max_position_embeddings=64,
)  # fmt: skip


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_the_cache_is_as_the_model_keeps_it(family: str) -> None:
    config = {"model_type": family, **SIZES}
    name = f"DeepseekV{family[-1]}ForCausalLM"
    capture = pipeline.capture_config(config, name)
    torch.manual_seed(0)
    model: Any = getattr(transformers, name)(transformers.AutoConfig.for_model(**config)).eval()
    graph = materialise(capture, model.state_dict())
    ids = torch.randint(0, 99, (2, 11))
    with torch.no_grad():
        first = model(input_ids=ids[:, :8], use_cache=True)
        inputs = {"input_ids": ids[:, 8:], "attention_mask": torch.ones(2, 11, dtype=torch.long), "past_key_values": first.past_key_values}
        flat = flat_inputs(capture, inputs)
        assert_bitwise(graph(*flat), flat_outputs(capture, model(**inputs, use_cache=True)))


def test_a_config_that_the_model_cannot_run_with_is_named() -> None:
    with pytest.raises(SurgeryError) as caught:
        pipeline.capture_config({"model_type": "deepseek_v2", **SIZES, "num_experts_per_tok": None}, "DeepseekV2ForCausalLM")
    assert caught.value.diagnostics[0].code == "S0504" and "topk" in caught.value.diagnostics[0].message


def test_its_attention_attends_to_its_own_stream(here: Path) -> None:
    Path("config.json").write_text(json.dumps({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], **SIZES}))
    program, _ = open_program("config:config.json")
    sites = {s.role: s for s in program.anatomy.sites}
    assert sites["layers[2].attn"].heads == 4 and not any("cross" in role for role in sites)
    assert sites["layers[2].attn.q"].weight == "model.layers.2.self_attn.q_b_proj.weight"
    rows = [slice(12 * head + 6, 12 * head + 12) for head in range(4)]  # of each head six for keys, then six for values
    assert sites["layers[2].attn.v"].rows == tuple((r.start, r.stop) for r in rows)
    rows = [slice(12 * head, 12 * head + 6) for head in range(4)]  # copied, with the rotary part, into memory without values
    assert sites["layers[2].attn.k"].rows == tuple((r.start, r.stop) for r in rows)


def test_heads_whose_keys_are_written_into_empty_memory(here: Path) -> None:
    sizes = {**SIZES, "num_hidden_layers": 1}
    Path("config.json").write_text(json.dumps({"model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], **sizes}))
    result = surgery.compile('surg 1\nprune heads(ratio = 25%) on layers[*].attn\nemit torch to "out"\n', "config:config.json")
    found = next(c for c in result.certificates if c["claim"] == "removed = masked")
    assert found["ok"] and 0 < found["max_abs_error"] < 1e-5
