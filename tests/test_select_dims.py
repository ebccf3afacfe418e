"""``surgery select --dims``: the classes of what a selector names, and what goes with one of their units."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.driver_support import model, surgery


def classes(selector: str, ref: str) -> dict[str, dict]:
    ran = surgery("select", selector, "--model", ref, "--dims", "--format", "json")
    assert ran.code == 0, ran.err
    document = ran.json
    answer = document.get("result", document)
    return {c["name"][0]: c for c in answer["classes"]}


def test_a_hidden_unit_takes_its_row_and_its_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = classes("layers[1].ffn.up", model("bert"))
    unit = found["F"]["unit"]
    assert found["F"]["size"] == 64 and found["F"]["fixed"] is None and unit["refusal"] == ""
    assert {(m["parameter"], m["axis"]): m["removed"] for m in unit["members"]} == {
        ("encoder.layer.1.intermediate.dense.weight", 0): [[0, 1]],
        ("encoder.layer.1.intermediate.dense.bias", 0): [[0, 1]],
        ("encoder.layer.1.output.dense.weight", 1): [[0, 1]],
    }


def test_a_slice_has_the_classes_of_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ref = model("gpt2")
    query, value = classes("layers[0].attn.q", ref), classes("layers[0].attn.v", ref)
    assert query["H"]["unit"]["members"] == value["H"]["unit"]["members"]
    (heads,) = [m for m in query["H"]["unit"]["members"] if m["parameter"] == "transformer.h.0.attn.c_attn.weight"]
    assert heads["removed"] == [[0, 8], [32, 40], [64, 72]] and heads["axis"] == 1
    widths = {c["name"] for c in (query["d"], value["d"])}
    assert len(widths) == 2  # scores and values have widths of their own


def test_the_text_lists_members_and_constants(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = surgery("select", "layers[0].attn.k", "--model", model("llama"), "--dims")
    assert ran.code == 0
    assert "model.layers.0.self_attn.k_proj.weight axis 0: [0:8]" in ran.out and "constants of the graph change" in ran.out
