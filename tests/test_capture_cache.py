"""Captures on disk: a hit is the same capture, a damaged entry is replaced, another config is another entry."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from surgery.model.capture import Captured, capture_config, materialise, pipeline
from surgery.model.retarget import graphs_of
from tests.capture_support import assert_bitwise, captured, flat_inputs, flat_outputs
from tests.zoo import CAPTURABLE, ZOO


def _no_trace(*_: object, **__: object) -> None:
    raise AssertionError("traced again")


def _same(a: Captured, b: Captured) -> None:
    assert [(p, str(g.graph)) for p, g in graphs_of(a.graph)] == [(p, str(g.graph)) for p, g in graphs_of(b.graph)]
    assert a.signature == b.signature and a.aliases == b.aliases and a.parameters == b.parameters
    assert list(a.constants) == list(b.constants) and all(torch.equal(a.constants[k], b.constants[k]) for k in a.constants)
    for (_, x), (_, y) in zip(graphs_of(a.graph), graphs_of(b.graph), strict=True):
        assert [n.meta["spec"] for n in x.graph.nodes] == [n.meta["spec"] for n in y.graph.nodes]


@pytest.mark.parametrize("family", CAPTURABLE)
def test_hit_equals_miss(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, first = ZOO[family], captured(family)
    monkeypatch.setattr(pipeline, "_capture_hf", lambda config, cls: first)
    assert capture_config(entry.make_config(), entry.architecture, cache_dir=tmp_path) is first
    monkeypatch.setattr(pipeline, "_capture_hf", _no_trace)
    hit = capture_config(entry.make_config(), entry.architecture, cache_dir=tmp_path)
    _same(hit, first)
    model = entry.make_model()
    inputs = entry.inputs(2, 9)
    with torch.no_grad():
        assert_bitwise(materialise(hit, model.state_dict())(*flat_inputs(hit, inputs)), flat_outputs(hit, model(**inputs)))


def test_damage_is_repaired(tmp_path: Path) -> None:
    entry = ZOO["vit"]
    first = capture_config(entry.make_config(), entry.architecture, cache_dir=tmp_path)
    (plain,) = (tmp_path / "captures").glob("*.json")
    good = plain.read_bytes()
    for bad in (b"", b"{", good[:-20], good.replace(b"gelu", b"relu"), b"[]"):
        plain.write_bytes(bad)
        _same(capture_config(entry.make_config(), entry.architecture, cache_dir=tmp_path), first)
        assert plain.read_bytes() == good
    assert sorted(p.suffix for p in (tmp_path / "captures").iterdir()) == [".json", ".safetensors"]


def test_key_depends_on_config_and_class(tmp_path: Path) -> None:
    entry = ZOO["vit"]
    capture_config(entry.make_config(), entry.architecture, cache_dir=tmp_path)
    capture_config({**entry.plain_config, "hidden_act": "relu"}, entry.architecture, cache_dir=tmp_path)
    capture_config(entry.make_config(), "ViTForImageClassification", cache_dir=tmp_path)
    assert len(list((tmp_path / "captures").glob("*.json"))) == 3


def test_unwritable_folder_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    entry = ZOO["vit"]
    assert capture_config(entry.make_config(), entry.architecture, cache_dir=tmp_path / "file").fallback == ""
