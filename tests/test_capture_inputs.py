"""What a model is called with when it is captured: videos, transforms that know no half precision, states that are no keys and values."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from surgery.model.capture import materialise, pipeline
from tests.capture_support import assert_bitwise, flat_inputs, flat_outputs

VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, num_frames=4)
TEXT = dict(vocab_size=99, hidden_size=32, num_hidden_layers=2, intermediate_size=64, max_position_embeddings=64)
IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
VIDEO = torch.randn(3, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("family", "architecture", "sizes", "inputs"),
    [
        ("videomae", "VideoMAEModel", {**VIT, "patch_size": 8, "tubelet_size": 2}, {"pixel_values": VIDEO}),
        ("vivit", "VivitModel", {**VIT, "tubelet_size": [2, 8, 8]}, {"pixel_values": VIDEO}),
        ("timesformer", "TimesformerModel", {**VIT, "patch_size": 8}, {"pixel_values": VIDEO}),
        ("fnet", "FNetModel", TEXT, {"input_ids": IDS, "token_type_ids": IDS % 2}),
    ],
)
def test_equal_to_live_model(family: str, architecture: str, sizes: dict[str, Any], inputs: dict[str, Any]) -> None:
    config = {"model_type": family, **sizes}
    capture = pipeline.capture_config(config, architecture)
    assert capture.fallback == ""
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(transformers.AutoConfig.for_model(**config)).eval()
    graph = materialise(capture, model.state_dict())
    with torch.no_grad():
        assert_bitwise(graph(*flat_inputs(capture, inputs)), flat_outputs(capture, model(**inputs)))


def test_a_hybrid_is_captured_without_a_past() -> None:
    sizes = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
    config = {"model_type": "lfm2", **sizes}
    capture = pipeline.capture_config(config, "Lfm2ForCausalLM")
    assert capture.notes == ("captured without a past: layers of type conv keep states between calls that are no keys and values",)
    torch.manual_seed(0)
    model = transformers.Lfm2ForCausalLM(transformers.AutoConfig.for_model(**config)).eval()
    graph, inputs = materialise(capture, model.state_dict()), {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        assert_bitwise(graph(*flat_inputs(capture, inputs)), flat_outputs(capture, model(**inputs, use_cache=False)))
