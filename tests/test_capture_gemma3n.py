"""Gemma 3n: layers hand keys and values on through a dictionary, some keep only the largest activations, coefficients are clipped in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import surgery as api
from surgery.model.capture import materialise, pipeline
from surgery.model.capture.errors import Fallback
from tests.capture_support import assert_bitwise, flat_inputs, flat_outputs
from tests.zoo import Entry, causal

GEMMA3N = Entry(
    "gemma3n_text", "Gemma3nForCausalLM",
    dict(
        vocab_size=99, vocab_size_per_layer_input=99, hidden_size=32, hidden_size_per_layer_input=8, intermediate_size=[64] * 6,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=8,
        laurel_rank=4, altup_num_inputs=3, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3,
        activation_sparsity_pattern=[0.9, 0.9, 0.0, 0.0, 0.0, 0.0], pad_token_id=0,
    ),
    causal(6, 2, 8),
)  # fmt: skip


@pytest.mark.parametrize("stamped", [True, False])
def test_equal_to_live_model(stamped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = pipeline.trace

    def forced(model, call, *, stubs):  # type: ignore[no-untyped-def]
        if stubs and not stamped:
            raise Fallback("forced")
        return trace(model, call, stubs=stubs)

    monkeypatch.setattr(pipeline, "trace", forced)
    capture = pipeline.capture_config(GEMMA3N.plain_config, GEMMA3N.architecture)
    assert capture.fallback == ("" if stamped else "forced")
    assert any("AltUp" in note for note in capture.notes)
    model = GEMMA3N.make_model()
    with torch.no_grad():
        model.model.layers[0].altup.prediction_coefs.weight[0, 0] = 200.0  # type: ignore[union-attr,index]  # beyond the bound of training
    graph = materialise(capture, model.state_dict())
    for batch, length in ((3, 17), (1, 9)):
        inputs = GEMMA3N.inputs(batch, length)
        flat = flat_inputs(capture, inputs)
        with torch.no_grad():
            assert_bitwise(graph(*flat), flat_outputs(capture, model(**inputs)))


def test_widths_by_layer_are_written_as_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(
        json.dumps({**GEMMA3N.plain_config, "num_kv_shared_layers": 0, "architectures": [GEMMA3N.architecture]}), encoding="utf-8"
    )
    text = 'surg 1\nprune ffn(keep = 40) on layers[1].ffn[1]\nprune ffn(keep = 48) on layers[4].ffn[1]\nemit transformers to "out"\n'
    result = api.compile(text, "config:tiny.json")
    widths = [64, 40, 64, 64, 48, 64]
    assert json.loads(Path("out/config.json").read_text())["intermediate_size"] == widths
    loaded = transformers.Gemma3nForCausalLM.from_pretrained("out", dtype=torch.float32)
    assert [layer.mlp.gate_proj.out_features for layer in loaded.model.layers] == widths
    assert next(c for c in result.certificates if c["claim"] == "from_pretrained = program")["ok"]
