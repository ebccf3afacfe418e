"""Removing units: what follows a cut. Generation, adapters, export, refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T

import surgery
from surgery.core.diagnostics import SurgeryError
from tests.cutting import Cutting, roles
from tests.zoo import ZOO

# ---------------------------------------------------------------- what follows a cut


def sliced(live: T.PreTrainedModel, rows: dict[str, dict[str, list[int]]], **config: Any) -> T.PreTrainedModel:
    """A live model of a smaller configuration with hand-sliced weights: ``rows`` maps a part of a name to kept rows and columns."""
    settings = live.config.to_dict() | config
    small = type(live)(type(live.config)(**settings)).eval()
    values = {}
    for name, value in live.state_dict().items():
        for part, cut in rows.items():
            if part in name:
                for axis, keep in cut.items():
                    value = value.index_select(int(axis), torch.tensor(keep))
        values[name] = value
    small.load_state_dict(values)
    return small


def test_a_pruned_llama_generates_as_the_hand_sliced_one(here: Path) -> None:
    live = ZOO["llama"].make_model()
    live.save_pretrained("base")  # type: ignore[operator]
    Path("groups.json").write_text(json.dumps({f"layers[{i}].attn": [1.0, 0.0] for i in range(3)}), "utf-8")
    units = {f"layers[{i}].ffn": [float(u % 2) for u in range(64)] for i in range(3)}
    Path("units.json").write_text(json.dumps(units), "utf-8")
    text = (
        'surg 1\n\nprune kv_groups(keep = 1, score = file, scores = "groups.json") on layers[*].attn\n'
        'prune ffn(ratio = 50%, score = file, scores = "units.json") on layers[*].ffn\n\nemit torch to "small"\n'
    )
    surgery.compile(text, "base", out=".")
    module = surgery.load("small")
    odd, q, kv = list(range(1, 64, 2)), list(range(16)), list(range(8))
    small = sliced(
        live,  # type: ignore[arg-type]
        {
            "q_proj": {"0": q}, "k_proj": {"0": kv}, "v_proj": {"0": kv}, "o_proj": {"1": q},
            "gate_proj": {"0": odd}, "up_proj": {"0": odd}, "down_proj": {"1": odd},
        },
        num_attention_heads=2, num_key_value_heads=1, intermediate_size=32,
    )  # fmt: skip
    tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (module(tokens).logits - small(tokens).logits).abs().max() <= 1e-5
        settings: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(tokens), pad_token_id=0)
        assert torch.equal(module.generate(tokens, **settings), small.generate(tokens, **settings))
        first = module(tokens[:, :4], use_cache=True)
        assert first.past_key_values.layers[0].keys.shape == (2, 1, 4, 8)


def test_a_pruned_gpt2_generates_as_the_masked_one(here: Path) -> None:
    live = ZOO["gpt2"].make_model()
    live.save_pretrained("base")  # type: ignore[operator]
    Path("heads.json").write_text(json.dumps({f"layers[{i}].attn": [3.0, 0.0, 2.0, 1.0] for i in range(3)}), "utf-8")
    text = 'surg 1\n\nprune heads(keep = 2, score = file, scores = "heads.json") on layers[*].attn\n\nemit torch to "small"\n'
    surgery.compile(text, "base", out=".")
    module = surgery.load("small")
    with torch.no_grad():
        for layer in live.transformer.h:  # type: ignore[union-attr]
            for head in (1, 3):
                layer.attn.c_proj.weight[head * 8 : head * 8 + 8] = 0
        tokens = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
        assert (module(tokens).logits - live(tokens).logits).abs().max() <= 1e-5
        settings: dict[str, Any] = dict(max_new_tokens=8, do_sample=False, attention_mask=torch.ones_like(tokens), pad_token_id=0)
        assert torch.equal(module.generate(tokens, **settings), live.generate(tokens, **settings))  # type: ignore[operator]


@pytest.mark.parametrize("first", ["prune", "adapt"])
def test_adapters_before_and_after_a_cut_fold_and_export(first: str, here: Path) -> None:
    """Prune then adapt, and adapt then prune: the same counts; folded equals unfolded; the file computes what the module computes."""
    import onnxruntime

    Path("bert.json").write_text(json.dumps({"architectures": ["BertModel"], **ZOO["bert"].plain_config}), "utf-8")
    lines = ["prune heads(ratio = 50%) on layers[*].attn", "prune ffn(ratio = 25%) on layers[*].ffn"]
    adapt = "adapt lora(rank = 2) on layers[*].attn.{q, v, o}, layers[*].ffn.{up, down}"
    lines = [*lines, adapt] if first == "prune" else [adapt, *lines]
    added = 3 * 2 * (3 * (32 + 16) + 2 * (32 + 48))
    text = (
        "surg 1\n\n" + "\n".join(lines) + f'\n\nexpect trainable == {added}\nexpect runs(batch = 2, length = 9)\n\nemit torch to "live"\n'
    )
    result = surgery.compile(text, "config:bert.json", out=".")
    assert all(c["ok"] for c in result.certificates)
    module = surgery.load("live")
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    surgery.save(module, "trained")
    text = 'surg 1\n\nfold all on **\n\nexpect same_output(at = fold)\n\nemit torch to "folded"\nemit onnx to "folded.onnx"\n'
    surgery.compile(text, "trained", out=".")
    inputs = ZOO["bert"].inputs(2, 9)
    with torch.no_grad():
        expected = module(**inputs)
        found = surgery.load("folded")(**inputs)
    assert (found.last_hidden_state - expected.last_hidden_state).abs().max() <= 1e-5
    session = onnxruntime.InferenceSession("folded.onnx", providers=["CPUExecutionProvider"])
    given = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    out = session.run(None, given)[0]
    assert np.abs(out - expected.last_hidden_state.numpy()).max() <= 1e-4


def test_a_refused_cut_leaves_the_program_as_it_was() -> None:
    cut = Cutting("llama", "heads", roles("layers[{}].attn"), ratio=0.25)
    before = dict(cut.program.weights)
    with pytest.raises(SurgeryError, match="S0444"):
        cut.run()
    assert dict(cut.program.weights) == before and not cut.claims
