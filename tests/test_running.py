"""A model that is not small runs part by part, with the same bits; the artifact of such a model is compared with its program, too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery as api
from surgery.model import running
from surgery.model.live import Tensors
from surgery.model.running import Runner, floats
from surgery.passes import registry
from tests.captured_programs import zoo_program
from tests.driver_support import checkpoint


@pytest.mark.parametrize("family", ["bert", "llama", "t5", "mixtral", "swin"])
def test_both_ways_give_the_same_bits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, inputs = zoo_program(family)
    tensors = Tensors(registry.function)
    whole = floats(Runner(program, tensors)(inputs))
    monkeypatch.setattr(running, "SMALL_BYTES", 0)
    parts = floats(Runner(program, tensors)(inputs))
    assert len(whole) == len(parts) and all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_a_large_model_keeps_its_certificates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ref = checkpoint("llama")
    spec = "surg 1\nprune ffn(ratio = 50%) on layers[*].ffn\nadapt lora(rank = 2) on layers[*].attn.q\nexpect runs(batch = 2, length = 9)\n"
    small = api.compile(spec + 'emit torch to "small"\n', ref).certificates
    monkeypatch.setattr(running, "SMALL_BYTES", 0)
    large = api.compile(spec + 'emit torch to "large"\n', ref).certificates
    assert [c["claim"] for c in large] == [c["claim"] for c in small] == ["unchanged at init", "removed = masked", "loaded = program"]
    assert all(c["ok"] for c in large)
    assert (Path("small/model.safetensors").read_bytes()) == Path("large/model.safetensors").read_bytes()
