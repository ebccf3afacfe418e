"""What is kept of a class's conversions of stored tensors: where none applies no model is built, where one does it is still made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery import opening
from surgery.core.diagnostics import SurgeryError
from surgery.model.naming import Naming, naming_of, read_naming, write_naming
from surgery.model.realise import realise
from surgery.model.samegraph import difference
from tests.driver_support import checkpoint
from tests.zoo import ZOO


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(opening, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def stored(cache: Path) -> Path:
    (found,) = (cache / "captures").glob("*.naming.json")
    return found


def no_model(*args: object) -> None:
    raise AssertionError("a model was built")


def test_names_that_stay_need_no_model(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opening.open_program(checkpoint("llama"))[0]
    monkeypatch.setattr(opening, "meta_model", no_model)
    monkeypatch.setattr("surgery.model.checkpoint_bind.meta_model", no_model)
    again = opening.open_program(checkpoint("llama"))[0]
    assert {n: e.identity for n, e in first.weights.items()} == {n: e.identity for n, e in again.weights.items()}
    stored(cache).write_text('{"schema": "surgery.naming/1", "patterns": ["("]}')
    with pytest.raises(AssertionError, match="a model was built"):
        opening.open_program(checkpoint("llama"))
    monkeypatch.undo()


def test_conversions_and_findings_are_as_before(cache: Path, tmp_path: Path) -> None:
    """Renamed tensors are still found, a missing and a strange one still refused, once the naming is kept."""
    opening.open_program(checkpoint("bert"))
    folder = tmp_path / "old"
    ZOO["bert"].make_model().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for n, t in tensors.items()}
    assert set(old) != set(tensors)
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    program = opening.open_program(str(folder))[0]
    name = next(n for n in program.weights if n.endswith("LayerNorm.weight"))
    assert torch.equal(realise(program.weights[name]), tensors[name])
    for change, code in (({name: None}, "S0714"), ({"strange.weight": torch.ones(2)}, "S0716")):
        made = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        save_file(made, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(SurgeryError) as caught:
            opening.open_program(str(folder))
        assert caught.value.diagnostics[0].code == code


def test_prefixes_and_patterns_are_held_against_a_name() -> None:
    names = {"model.a.weight": 0, "model.b.weight": 0, "head": 0}
    plain = Naming("model", (r"gamma(?!\w)",))
    assert plain.keeps(names, names)
    assert not plain.keeps(["a.weight"], names)  # the prefix is due
    assert not plain.keeps(["b.gamma"], {"b.gamma": 0})
    assert not plain.keeps(["model.head"], {"model.head": 0, "head": 0})  # and here it would go


def test_patterns_of_experts_match_what_is_converted(tmp_path: Path) -> None:
    naming = naming_of(ZOO["mixtral"].make_model())
    assert naming is not None
    key = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    assert not naming.keeps([key], {key: 0})
    write_naming(tmp_path, "key", naming)
    assert read_naming(tmp_path, "key") == naming and read_naming(tmp_path, "other") is None
    file = tmp_path / "captures" / "key.naming.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "key": "other"}))
    assert read_naming(tmp_path, "key") is None


def test_checkpoints_of_one_config_share_a_capture_and_no_graph(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captures: dict[str, object] = {}
    first = opening.open_program(checkpoint("llama"), captures=captures)[0]
    monkeypatch.setattr("surgery.model.capture.capture_config", no_model)
    second = opening.open_program(checkpoint("llama"), captures=captures)[0]
    assert difference(first.graph, second.graph) == ""
    del first.graph._modules["lm_head"]
    third = opening.open_program(checkpoint("llama"), captures=captures)[0]
    assert "lm_head" in second.graph._modules and third.graph is second.graph and third.weights is not second.weights
