"""Tied embeddings: what the plan says of the tie is true in the graph, the config, the stored tensors and the ONNX file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import surgery
from tests.programs import ids
from tests.zoo import ZOO

HEAD, TOKENS = "lm_head.weight", "transformer.wte.weight"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    ZOO["gpt2"].make_model().save_pretrained(folder)  # type: ignore[operator]
    return folder


def stored(folder: Path) -> set[str]:
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            names |= set(f.keys())
    return names


def compiled(tmp_path: Path, model: Path, body: str, onnx: bool = False) -> tuple[Any, Path]:
    emits = '\nemit torch to "out"\n' + ('emit onnx to "out.onnx"\n' if onnx else "")
    (tmp_path / "s.surg").write_text(f"surg 1\n\n{body}\n{emits}", "utf-8")
    return surgery.compile(tmp_path / "s.surg", str(model), out=tmp_path), tmp_path / "out"


def tables(path: Path) -> int:
    """How many tensors of the vocabulary's size an ONNX file holds."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(str(path), load_external_data=False).graph
    return sum(sorted(i.dims) == [32, 99] for i in graph.initializer)


TIED = {
    "nothing": "freeze norms on layers",
    "adapter": "adapt lora(rank = 2) on head, embed.tokens",
    "layers": "share layers(groups = all) on layers keep own norm",
    "dropped": "skip bypass on layers[1]",
}


@pytest.mark.parametrize("body", list(TIED.values()), ids=list(TIED))
def test_stays_tied(tmp_path: Path, gpt2: Path, body: str) -> None:
    result, folder = compiled(tmp_path, gpt2, body)
    assert not any("no longer tied" in s.note for step in result.plan.steps for s in step.sites)
    module: Any = surgery.load(folder)
    assert module.get_parameter(HEAD) is module.get_parameter(TOKENS)
    assert HEAD not in stored(folder) and TOKENS in stored(folder)
    assert module.config.tie_word_embeddings is True
    assert json.loads((folder / "config.json").read_text("utf-8")).get("tie_word_embeddings", True) is True


UNTIED = {
    "rewritten": "adapt pissa(rank = 2) on head",
    "folded": "adapt lora(rank = 2) on head\nfold all on head",
    "masked": "prune mask(ratio = 50%) on head",
}


@pytest.mark.parametrize("name", list(UNTIED))
def test_what_unties_says_so_everywhere(tmp_path: Path, gpt2: Path, name: str) -> None:
    result, folder = compiled(tmp_path, gpt2, UNTIED[name])
    notes = [s.note for step in result.plan.steps for s in step.sites]
    assert any("no longer tied" in n and "3,168 parameters more" in n for n in notes), notes
    module: Any = surgery.load(folder)
    assert module.get_parameter(HEAD) is not module.get_parameter(TOKENS)
    assert {HEAD, TOKENS} <= stored(folder)
    assert module.config.tie_word_embeddings is False
    assert json.loads((folder / "config.json").read_text("utf-8"))["tie_word_embeddings"] is False
    plan = surgery.plan("surg 1\n\nfreeze all on head\n", str(folder))  # a second spec sees the head as it is
    before = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert plan.totals is not None
    own = 99 * 32 if module.get_parameter(HEAD).requires_grad else 0
    added = sum(p.numel() for n, p in module.named_parameters() if p.requires_grad and n.startswith("lm_head.") and n != HEAD)
    assert plan.totals.trainable == before - own - added
    tokens = ids(2, 7)
    with torch.no_grad():
        got = module(tokens).logits
        want = surgery.load(folder)(tokens).logits
    assert torch.equal(got, want)


def test_a_line_below_sees_the_untied_head(gpt2: Path) -> None:
    """`freeze all on head` after the head was untied freezes the head's tensor, not the embedding's."""
    spec = "surg 1\n\nadapt lora(rank = 2) on head\nfold all on head\nunfreeze all on head\n"
    plan = surgery.plan(spec, str(gpt2))
    assert plan.totals is not None and plan.totals.trainable == 99 * 32
    assert plan.totals.params_after == plan.totals.params_before + 99 * 32


def test_onnx_holds_a_tied_table_once(tmp_path: Path, gpt2: Path) -> None:
    compiled(tmp_path, gpt2, "freeze norms on layers", onnx=True)
    assert tables(tmp_path / "out.onnx") == 1
    (tmp_path / "b").mkdir()
    compiled(tmp_path / "b", gpt2, UNTIED["folded"], onnx=True)
    assert tables(tmp_path / "b" / "out.onnx") == 2
