"""From a spec to training: the emitted module carries its schedule, and what was trained folds in a second spec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import surgery
from surgery.train import Controller, disabled
from tests.zoo import ZOO

SPEC = """surg 1
adapt lora(rank = 2, dropout = 10%) on layers[*].attn.{q, v}
insert bottleneck(width = 4, activation = gelu) beside layers[*].ffn
train power(batch = 2, warmup_tokens = 36) on layers[*].attn
emit torch to "out"
"""


@pytest.fixture
def model_ref(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    entry = ZOO["bert"]
    entry.make_model().save_pretrained("bert")
    return "bert"


def test_from_spec_to_training_to_folding(model_ref: str, tmp_path: Path) -> None:
    Path("a.surg").write_text(SPEC)
    surgery.compile("a.surg", model_ref)
    model = surgery.load(next(p.parent for p in tmp_path.rglob("surgery.json")))
    inputs = ZOO["bert"].inputs(2, 9)
    before = ZOO["bert"].make_model()(**inputs).last_hidden_state
    torch.testing.assert_close(model(**inputs).last_hidden_state, before, atol=1e-6, rtol=0)
    model.train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    controller = Controller(model, optimizer)
    ((rule, names),) = controller.schedules
    assert {n.rpartition(".")[2] for n in names} >= {"A", "B"} and not any("bottleneck" in n for n in names)
    for _ in range(4):
        controller.step(lambda: model(**inputs).last_hidden_state.square().mean())
    assert controller.tokens == 4 * 18
    rates = {n: g["lr"] for g in optimizer.param_groups for p in g["params"] for n, q in trained.items() if q is p}
    assert {rates[n] for n in rates if ".lora." in n} == {rule.lr(3 * 18)}
    assert {rates[n] for n in rates if "bottleneck" in n} == {1e-3}
    assert controller.load_state_dict(json.loads(json.dumps(controller.state_dict()))) is None
    model.eval()
    after = model(**inputs).last_hidden_state.detach()
    assert (after - before).abs().max() > 1e-3
    with disabled(model):
        torch.testing.assert_close(model(**inputs).last_hidden_state, before, atol=1e-6, rtol=0)
    surgery.driver.save(model, "trained")
    Path("b.surg").write_text('surg 1\nfold all on layers[*]\nemit torch to "folded"\n')
    result = surgery.compile("b.surg", "trained")
    torch.testing.assert_close(result.module(**inputs).last_hidden_state, after, atol=1e-5, rtol=0)
    assert not [n for n, _ in result.module.named_parameters() if "lora" in n or "bottleneck" in n]
