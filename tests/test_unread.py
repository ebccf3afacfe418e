"""What a statement names and nothing reads: optional selectors that match nothing, parameters, entries of score files, hollow samples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import surgery as api
from surgery.idle import NOTHING
from tests.data_support import text_model, write_lines
from tests.driver_support import model, surgery, write

STATEMENTS = (
    "adapt lora(rank = ramp(2, 4)) on layers[*].cross.{q, v}?",
    "adapt bitfit on layers[*].cross?",
    "insert bottleneck(width = [2, 3]) after layers[*].cross?",
    "insert prefix(length = 2) on layers[*].cross?",
    "insert prompt(length = 2) on embed.patch?",
    "freeze all on layers[*].cross?",
    "fold all on layers[*].cross?",
    "prune heads(keep = 2) on layers[*].cross?",
    "prune width(keep = 16) on layers[*].cross?",
    "prune mask(ratio = 20%) on layers[*].cross.q?",
    "prune layers(count = 1, score = random) on decoder.layers[*]?",
    "prune slicegpt(ratio = 25%) on layers[*].cross? using text",
    "skip bypass on layers[*].cross?",
    "share layers(groups = pairs) on decoder.layers[*]?",
    "convert moe(experts = 2) on layers[*].cross?",
    "train power(batch = 32) on layers[*].cross?",
    "merge linear of twin on layers[*].cross?",
    "merge linear of news on layers[*].cross?",
)


def test_optional_selectors_that_match_nothing_do_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They neither fail nor mean the whole model, and the plan says so of each."""
    from tests.adapters import example

    monkeypatch.chdir(tmp_path)
    folder = text_model("bert", tmp_path)
    write_lines(tmp_path / "calib.txt", 4)
    example("news", tmp_path)
    head = f'surg 1\n\ndata text = lines("calib.txt")\nadapter news = load("news")\ncheckpoint twin = load("{folder.name}")\n'
    path = write("a.surg", head + "\n".join(STATEMENTS) + "\n")
    plan = api.plan(path, str(folder))
    assert [s.facts for s in plan.steps] == [(NOTHING,)] * len(STATEMENTS)
    assert plan.totals is not None and plan.totals.params_before == plan.totals.params_after == plan.totals.trainable
    assert surgery("plan", path, folder, "--format", "json").json["steps"][0]["sites"] == []
    result = api.compile(path, str(folder))
    assert not result.certificates and {n for n, _ in result.module.named_parameters()} == {
        n for n, _ in api.compile("surg 1\n", str(folder)).module.named_parameters()
    }


def test_parameters_that_nothing_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, name in (
        ("ratio = 25%, of = bytes", "of"),
        ("keep = 3, normalize = max", "normalize"),
        ("keep = 3, scope = global, normalize = max", ""),
    ):
        write("a.surg", f"surg 1\n\nprune heads({given}) on layers[*].attn\n")
        ran = surgery("plan", "a.surg", model("bert"))
        assert ran.codes == (["S0279"] if name else []) and (not name or f"reads `{name}` here" in ran.err)


def test_scores_of_parts_that_are_not_cut_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = text_model("bert", tmp_path)
    write("ffn.json", json.dumps({f"layers[{i}].ffn": list(range(64)) for i in (0, 1, 7)}))
    write("layers.json", json.dumps({f"layers[{i}]": i + 0.5 for i in range(4)}))
    write(
        "a.surg",
        'surg 1\n\nprune ffn(keep = 32, score = file, scores = "ffn.json") on layers[0].ffn\n'
        'prune layers(count = 1, score = file, scores = "layers.json") on layers\n',
    )
    ran = surgery("compile", "a.surg", folder)
    assert ran.code == 0, ran.err
    told = " ".join((ran.out + ran.err).split())
    assert "ffn.json also has scores of parts that this statement does not cut: `layers[1, 7].ffn`" in told
    assert "layers.json also has scores of parts that this statement does not choose from: `layers[3]`" in told
    write("layers.json", '{"layers[0]": 1, "layers[1]": NaN, "layers[2]": 2}')
    assert surgery("compile", "a.surg", folder).codes == ["S0479"]


def test_samples_without_a_token_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("a.surg", 'surg 1\n\ndata rows = tensors("rows.safetensors")\nprune ffn(keep = 32, score = wanda) on layers[*].ffn using rows\n')
    ids, mask = torch.ones(3, 4, dtype=torch.long), torch.ones(3, 4, dtype=torch.long)
    mask[1] = 0
    for tensors, text in (
        ({"input_ids": ids[:, :0]}, "has the shape [3, 0]"),
        ({"input_ids": ids, "attention_mask": mask}, "leaves sample 1 without"),
    ):
        save_file({n: t.contiguous() for n, t in tensors.items()}, "rows.safetensors")
        ran = surgery("plan", "a.surg", model("bert"))
        assert ran.codes == ["S0741"] and text in ran.err


def test_a_part_that_was_bypassed_is_told_of_by_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its layer has another number by then; a dropped layer's place is the next one's."""
    monkeypatch.chdir(tmp_path)
    write("scores.json", json.dumps({f"layers[{i}]": i for i in range(3)}))
    drop = 'prune layers(count = 1, score = file, scores = "scores.json") on layers\n'
    write("a.surg", f"surg 1\n\nskip bypass on layers[2].attn\n{drop}adapt lora(rank = 2) on layers[*].attn.q\n")
    ran = surgery("plan", "a.surg", model("bert"))
    assert ran.codes == ["S0402"] and "layers[1].attn was bypassed here\n --> a.surg:3:1" in ran.err, ran.err
    write("a.surg", f"surg 1\n\nskip bypass on layers[0].attn\n{drop}adapt lora(rank = 2) on layers[*].attn.q\n")
    assert surgery("plan", "a.surg", model("bert")).code == 0


def test_factors_of_an_adapter_are_no_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.adapters import bert, low
    from tests.adapters import write as write_adapter

    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "whole", {n: t.round().int() for n, t in low(bert("query"), 4).items()})
    write("a.surg", 'surg 1\n\nadapter whole = load("whole")\nmerge linear of whole * 1 as x\n')
    ran = surgery("plan", "a.surg", model("bert"))
    assert ran.codes == ["S0783"] and "is int32, where a trained factor is expected" in ran.err
