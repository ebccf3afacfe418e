"""LD-Pruner: the distance by hand, the choice by direct bypasses of the live model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.passes.kinds.drop_latent import distance
from tests.zoo import ZOO


def test_the_distance_of_the_worked_example() -> None:
    original, changed = torch.tensor([[0.0, 2.0], [2.0, 4.0]]), torch.tensor([[1.0, 2.0], [1.0, 6.0]])
    assert distance(original, changed) == pytest.approx(1 + 2**0.5, abs=1e-12)
    assert distance(changed, original) == distance(original, changed)
    assert distance(original, original) == 0.0


def test_the_blocks_that_matter_least_go(here: Path) -> None:
    """Against the live model with a block's last projection zeroed, which is what bypassing it does."""
    entry = ZOO["bert"]
    live: Any = entry.make_model()
    with torch.no_grad():
        for layer, amount in ((0, 1.0), (1, 0.02), (2, 0.3)):
            dense = live.encoder.layer[layer].output.dense
            dense.weight *= amount
            dense.bias *= amount
    live.save_pretrained("base")
    ids = torch.randint(3, 90, (5, 8), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, "ids.safetensors")
    text = 'surg 1\n\ndata few = tensors("ids.safetensors")\n\nprune operators(count = 2) on layers[*].{attn, ffn} using few\n'
    result = surgery.compile(text, "base")
    note = result.plan.steps[0].sites[0].note
    with torch.no_grad():
        whole = live(input_ids=ids).last_hidden_state
        scores = {}
        for i, layer in enumerate(live.encoder.layer):
            for name, dense in ((f"layers[{i}].attn", layer.attention.output.dense), (f"layers[{i}].ffn", layer.output.dense)):
                kept = dense.weight.clone(), dense.bias.clone()
                dense.weight.zero_()
                dense.bias.zero_()
                scores[name] = distance(whole, live(input_ids=ids).last_hidden_state)
                dense.weight.copy_(kept[0])
                dense.bias.copy_(kept[1])
    lowest = sorted(scores, key=scores.__getitem__)[:2]
    assert {s.role for s in result.plan.steps[0].sites} == set(lowest) and "layers[1].ffn" in lowest
    for role in lowest:
        assert f"{role} {scores[role]:.4g}" in note
    assert [c["ok"] for c in result.certificates if c["claim"] == "removed = bypassed"] == [True]
