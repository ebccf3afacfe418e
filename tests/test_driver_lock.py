"""The lock beside a spec: written, the same everywhere, and what `--locked` says when something is no longer as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.driver_support import Ran, checkpoint, surgery, tree, write

SPEC = """surg 1

model "bert"
param r = 4
adapt lora(rank = r) on layers[*].attn.{q, v}
emit torch to "out"
"""


@pytest.fixture
def compiled(here: Path) -> Path:
    checkpoint("bert")
    write("a.surg", SPEC)
    assert surgery("compile", "a.surg").code == 0
    return here


def locked(*more: str) -> Ran:
    return surgery("compile", "a.surg", "--locked", *more)


def test_what_stands_in_it(compiled: Path) -> None:
    lock = json.loads(Path("a.surg.lock").read_text("utf-8"))
    roles = [f"layers[{i}].attn.{x}" for i in range(3) for x in "qv"]
    assert sorted(lock["model"]) == ["content", "hash", "ref"] and lock["model"]["ref"] == "bert"
    assert lock["model"]["hash"] != lock["model"]["content"] and len(lock["weights"]) == 64
    assert {k: v for k, v in lock.items() if k not in ("model", "weights")} == {
        "schema": "surgery.lock/1", "spec": "a.surg", "edition": 1, "data": {}, "params": {"r": "4"}, "methods": {"adapt/lora": 1},
        "seeds": {"1: adapt lora": 0}, "sites": {"1: adapt lora": roles},
    }  # fmt: skip
    assert Path("out/spec.surg.lock").read_text("utf-8") == Path("a.surg.lock").read_text("utf-8")


def test_nothing_drifted(compiled: Path) -> None:
    before = tree("a.surg.lock"), tree("out")
    stamp = Path("a.surg.lock").stat().st_mtime_ns
    assert locked().code == 0
    assert (tree("a.surg.lock"), tree("out")) == before
    assert surgery("compile", "a.surg").code == 0
    assert (tree("a.surg.lock"), tree("out")) == before
    assert Path("a.surg.lock").stat().st_mtime_ns == stamp, "an equal lock is not written again"


def test_the_same_bytes_from_any_folder(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the lock nor an output names the folder that it was made in, however spec and model are called."""
    lock, out = tree("a.surg.lock"), tree("out")
    other = compiled / "else" / "where"
    other.mkdir(parents=True)
    for name in ("bert", "a.surg"):
        shutil.move(name, other / name)
    monkeypatch.chdir(compiled / "else")
    ran = surgery("compile", other / "a.surg", other / "bert", "--out", "made")
    assert ran.code == 0
    assert tree(other / "a.surg.lock") == lock
    assert tree("made/out") == out
    home = str(compiled).encode()
    assert not [name for name, data in (lock | out).items() if home in data]
    assert surgery("compile", other / "a.surg", "--locked", "--out", "made").code == 0


def test_no_lock(compiled: Path) -> None:
    before = tree("out")
    Path("a.surg.lock").unlink()
    ran = locked()
    assert (ran.code, ran.codes) == (1, ["S0405"])
    assert not Path("a.surg.lock").exists() and tree("out") == before


@pytest.mark.parametrize(
    "text",
    [
        "", "{}", "[]", "null", "not json", '{"schema": "surgery.lock/1"}', "[" * 100_000,
        '{"schema":"surgery.lock/1","spec":"a.surg","edition":1,"model":[],"data":{},"params":{},"seeds":{},"methods":{},"sites":{},"weights":""}',
        '{"schema":"surgery.lock/1","spec":"a.surg","edition":1,"model":{},"data":3,"params":{},"seeds":{},"methods":{},"sites":{},"weights":""}',
    ],
)  # fmt: skip
def test_garbage_for_a_lock(compiled: Path, text: str) -> None:
    write("a.surg.lock", text)
    ran = locked()
    assert (ran.code, ran.codes) == (1, ["S0406"])
    assert Path("a.surg.lock").read_text("utf-8") == text
    Path("a.surg.lock").write_bytes(b"\xff\xfe\x00")
    assert locked().codes == ["S0406"]
    Path("a.surg.lock").unlink()
    Path("a.surg.lock").mkdir()
    assert locked().codes == ["S0406"]


def drifted(ran: Ran) -> list[str]:
    assert (ran.code, ran.codes, ran.out) == (1, ["S0407"], "")
    return [line.removeprefix("note: ") for line in ran.err.splitlines() if line.startswith("note: ")]


def test_a_parameter_drifted(compiled: Path) -> None:
    before = tree("out")
    assert drifted(locked("--set", "r=8")) == ["param `r`: locked 4, now 8"]
    assert tree("out") == before


def test_the_weights_of_the_model_drifted(compiled: Path) -> None:
    """The same shapes, one other value: config and headers are what they were."""
    file = Path("bert/model.safetensors")
    tensors = load_file(file)
    tensors["encoder.layer.0.attention.self.query.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    found = drifted(locked())
    assert len(found) == 1 and found[0].startswith("model `content`: locked ")


def test_the_config_of_the_model_drifted(compiled: Path) -> None:
    file = Path("bert/config.json")
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**config, "layer_norm_eps": 1e-3}), "utf-8")
    assert any(line.startswith("model `hash`: locked ") for line in drifted(locked()))


def test_the_sites_drifted(compiled: Path) -> None:
    write("a.surg", SPEC.replace("{q, v}", "{q, k}"))
    found = drifted(locked())
    assert len(found) == 1
    assert found[0].startswith(
        "sites of `1: adapt lora`: no longer layers[0].attn.v, layers[1].attn.v, layers[2].attn.v; now also layers[0].attn.k"
    )


def test_a_method_drifted(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.passes import registry

    monkeypatch.setattr(registry.get("adapt", "lora"), "version", 2)
    assert drifted(locked()) == ["version of `adapt/lora`: locked 1, now 2"]


def test_the_seed_and_the_values_drifted(compiled: Path) -> None:
    write("a.surg", SPEC.replace("rank = r", "rank = r, seed = 3"))
    assert drifted(locked()) == ["seed of `1: adapt lora`: locked 0, now 3"]
    write("a.surg", SPEC.replace("rank = r", "rank = 2"))
    found = drifted(locked())
    assert len(found) == 1 and found[0].startswith("weights: locked expressions ")


def test_a_statement_more(compiled: Path) -> None:
    write("a.surg", SPEC.replace("emit", "freeze all on embed.**\nemit"))
    found = drifted(locked())
    assert "version of `freeze/all`: locked nothing, now 1" in found
    assert any(line.startswith("sites of `2: freeze all`: locked nothing, now 4 sites") for line in found)


def test_an_edited_lock(compiled: Path) -> None:
    lock = json.loads(Path("a.surg.lock").read_text("utf-8"))
    write("a.surg.lock", json.dumps({**lock, "model": {**lock["model"], "content": "0" * 64}, "edition": 2}))
    found = drifted(locked())
    assert found[0] == "edition: locked 2, now 1" and found[1].startswith("model `content`: locked 0000000000000000..., now ")


def test_an_artifact_that_was_trained_further_drifts(compiled: Path) -> None:
    """A second spec on an artifact pins the artifact, not the model that it was made from."""
    import surgery as api

    write("a.surg", 'surg 1\nfold all on layers[*].**\nemit torch to "folded"\n')
    assert surgery("compile", "a.surg", "out").code == 0
    assert surgery("compile", "a.surg", "out", "--locked").code == 0
    module = api.load("out")
    with torch.no_grad():
        next(p for p in module.parameters() if p.requires_grad).add_(1.0)
    api.save(module, "out", force=True)
    found = drifted(surgery("compile", "a.surg", "out", "--locked"))
    assert [line.split(":")[0] for line in found] == ["model `content`", "model `hash`"]


def test_a_text_has_no_lock(here: Path) -> None:
    import surgery as api

    with pytest.raises(api.SurgeryError) as caught:
        api.compile(SPEC, checkpoint("bert"), locked=True)
    assert [d.code for d in caught.value.diagnostics] == ["S0405"]


def test_a_spec_in_a_folder_that_is_not_writable_compiles_without_a_lock(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    write("fixed/a.surg", SPEC.replace('"bert"', '"../bert"'))
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode, **k: False if Path(path).name == "fixed" else real(path, mode, **k))
    ran = surgery("compile", "fixed/a.surg", "--out", "made", "--format", "json")
    assert ran.code == 0 and ran.json["lock"] is None
    assert sorted(p.name for p in Path("fixed").iterdir()) == ["a.surg"]


@pytest.mark.parametrize(("lock", "code"), [(None, "S0405"), ("{", "S0406"), ("drifted", "S0407")])
def test_annotations_stand_at_the_spec(compiled: Path, lock: str | None, code: str) -> None:
    """A service that annotates lines needs a file and a line for what concerns the spec as a whole: its edition line."""
    file = Path("a.surg.lock")
    if lock is None:
        file.unlink()
    elif lock != "drifted":
        write(file, lock)
    more = ["--set", "r=8"] if lock == "drifted" else []
    ran = locked("--format", "github", *more)
    (line,) = [row for row in ran.err.splitlines() if row.startswith("::error ")]
    assert line.startswith("::error file=a.surg,line=1,endLine=1,col=1,endColumn=7,title=" + code)
    data = locked("--format", "sarif", *more).json["runs"][0]["results"][0]
    assert data["ruleId"] == code and data["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "a.surg"


def test_a_file_that_is_not_text_is_annotated_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.surg").write_bytes(b"surg 1\n\n# caf\xe9\n")
    ran = surgery("check", "a.surg", "--format", "github")
    (line,) = [row for row in (ran.err + ran.out).splitlines() if row.startswith("::error ")]
    assert ran.code == 2 and line.startswith("::error file=a.surg,line=3,endLine=3,col=6,endColumn=7,title=S0142")
    found = surgery("check", "a.surg", "--format", "sarif").json["runs"][0]["results"][0]
    place = found["locations"][0]["physicalLocation"]
    assert found["ruleId"] == "S0142" and place["artifactLocation"]["uri"] == "a.surg" and place["region"]["startLine"] == 3
    Path("b.surg").write_bytes("surg 1".encode("utf-16"))
    assert "file=b.surg,line=1," in surgery("check", "b.surg", "--format", "github").err
