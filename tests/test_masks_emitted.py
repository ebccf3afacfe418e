"""Masks from the command line: artifacts, training, a second spec, ONNX, the same bytes, and bad input."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import surgery as api
from surgery.model import masked
from tests.driver_support import checkpoint, model, surgery, write
from tests.test_masks import live_zeros
from tests.workbench import difference

SPEC = """surg 1

prune mask(ratio = 50%) on layers[*].attn.{q, k, v, o}
prune mask(pattern = "2:4") on layers[*].ffn.{up, down}
adapt lora(rank = 2) on layers[*].attn.{q, v}
unfreeze all on layers[*].ffn

expect sparsity == 50% on layers[*].ffn.{up, down}
expect sparsity == 50% on layers[*].attn.{q, k, v, o}
emit torch to "live"
"""


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_emitted_trained_saved_and_folded_by_a_second_spec(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = SPEC.replace("{up, down}", "{up, gate, down}") if family == "llama" else SPEC
    write("a.surg", spec)
    ran = surgery("compile", "a.surg", model(family))
    assert ran.code == 0, ran.err
    module = api.load("live")
    zeros = live_zeros(module)
    sizes = [(getattr(owner, m.leaf), m) for _, owner, m in masked.mask_modules(module)]
    assert zeros * 2 == sum(p.numel() for p, _ in sizes)

    trained = copy.deepcopy(module).train()
    optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        trained(input_ids=ids)[0].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert live_zeros(trained) == zeros
    moved = [n for n, p in trained.named_parameters() if not torch.equal(p, module.get_parameter(n))]
    assert any(n.endswith(".B") for n in moved) and any("lora" not in n for n in moved)
    api.save(trained, "trained")

    write(
        "b.surg",
        'surg 1\n\nfold all\nexpect same_output(at = fold) within 1e-5\nexpect sparsity == 50% on layers[*].attn.{q, k, v, o}\nemit torch to "folded"\n',
    )
    ran = surgery("compile", "b.surg", "trained")
    assert ran.code == 0, ran.err + ran.out
    assert f"masks kept: {zeros:,} zeros before the fold, {zeros:,} after" in ran.err + ran.out
    folded = api.load("folded")
    assert live_zeros(folded) == zeros
    trained.eval()
    with torch.no_grad():
        assert difference([folded(input_ids=ids)[0]], [trained(input_ids=ids)[0]]) <= 1e-5

    write(
        "c.surg",
        'surg 1\n\nprune mask(ratio = 75%) on layers[*].attn.q\nexpect sparsity == 75% on layers[*].attn.q\nemit torch to "more"\n',
    )
    ran = surgery("compile", "c.surg", "folded")
    assert ran.code == 0, ran.err + ran.out


def test_the_onnx_file_holds_the_zeros_and_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    import onnx

    monkeypatch.chdir(tmp_path)
    write("a.surg", SPEC + 'emit onnx(optimize = none) to "model.onnx"\nemit onnx(live = true, optimize = none) to "live.onnx"\n')
    ran = surgery("compile", "a.surg", model("bert"))
    assert ran.code == 0, ran.err
    for file, names in (("model.onnx", 0), ("live.onnx", 6)):
        tensors = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(file).graph.initializer}
        assert sum(n.endswith("_mask.keep") for n in tensors) == names  # an adapter that stays live needs its weight's mask
        query = next(v for n, v in tensors.items() if n.endswith("layer.0.attention.self.query.weight"))
        assert int(np.count_nonzero(query)) * 2 == query.size


def test_the_same_bytes_and_a_plan_as_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("a.surg", SPEC)
    reference = checkpoint("bert")
    (step, second, *_) = surgery("plan", "a.surg", reference, "--format", "json").json["steps"]
    assert (step["verb"], step["method"], step["params"]["ratio"], second["params"]["pattern"]) == ("prune", "mask", 0.5, "2:4")
    assert [s["removed"] for s in step["sites"]] == [0] * 12
    weights = []
    for out in ("one", "two"):
        assert surgery("compile", "a.surg", reference, "--out", out).code == 0
        weights.append(Path(out, "live", "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("line", "code"), [
    ("prune mask(ratio = 50%, pattern = \"2:4\") on layers[*].attn.q", "S0250"),
    ("prune mask(pattern = \"2:5\") on layers[*].attn.q", "S0460"),
    ("prune mask(ratio = 100%) on layers[*].attn.q", "S0460"),
    ("prune mask on layers[*].attn", "S0461"),
    ("prune mask on embed.tokens", "S0461"),
    ("prune mask on layers[0].norm[0]", "S0461"),
    ("prune mask(score = wanda) on layers[*].attn.q", "S0274"),
    ("prune mask(score = sparsegpt) on layers[*].attn.q", "S0274"),
    ("prune mask(score = best) on layers[*].attn.q", "S0221"),
    ("prune mask(ratio = 150%) on layers[*].attn.q", "S0222"),
])  # fmt: skip
def test_bad_input_is_a_diagnostic(line: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("a.surg", f"surg 1\n\n{line}\n")
    ran = surgery("plan", "a.surg", model("bert"))
    assert ran.code == 1 and ran.codes == [code], ran.err


def test_an_unstructured_mask_warns_and_a_pattern_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("a.surg", 'surg 1\n\nprune mask on layers[*].attn.q\nprune mask(pattern = "2:4") on layers[*].attn.k\n')
    ran = surgery("plan", "a.surg", model("bert"))
    assert ran.code == 0 and ran.err.count("warning[S0463]") == 1
    assert "2:4 is faster on kernels for this pattern only" in ran.out
    assert "98.3 k 98.3 k unchanged" in " ".join(ran.out.split())
