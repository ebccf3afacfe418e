"""Broken checkpoints and artifacts through the command line: the code, the exit code, no traceback, nothing written."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.driver_support import LORA, checkpoint, model, surgery, tree, write

FILE = Path("bert/model.safetensors")


def header(change: Callable[[dict[str, Any]], None]) -> None:
    data = FILE.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found = json.loads(data[8 : 8 + length])
    change(found)
    text = json.dumps(found).encode()
    FILE.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def first(found: dict[str, Any]) -> dict[str, Any]:
    return next(v for k, v in found.items() if k != "__metadata__")  # type: ignore[no-any-return]


def tensors(change: Callable[[dict[str, Any]], object]) -> None:
    found = load_file(FILE)
    change(found)
    save_file(found, FILE, metadata={"format": "pt"})


NAME = "encoder.layer.0.attention.self.query.weight"

CHECKPOINT: dict[str, tuple[Callable[[], object], str]] = {
    "truncated": (lambda: FILE.write_bytes(FILE.read_bytes()[:-100]), "S0707"),
    "empty": (lambda: FILE.write_bytes(b""), "S0707"),
    "garbage": (lambda: FILE.write_bytes(b"\xff" * 4096), "S0708"),
    "a header longer than the file": (lambda: FILE.write_bytes(struct.pack("<Q", 1 << 40) + FILE.read_bytes()[8:]), "S0708"),
    "offsets past the end": (lambda: header(lambda h: first(h).update(data_offsets=[0, 1 << 40])), "S0709"),
    "a shape that lies": (lambda: header(lambda h: first(h).update(shape=[7, 7])), "S0709"),
    "an unknown dtype": (lambda: header(lambda h: first(h).update(dtype="Q7")), "S0710"),
    "a missing tensor": (lambda: tensors(lambda t: t.pop(NAME)), "S0714"),
    "another shape": (lambda: tensors(lambda t: t.update({NAME: t[NAME][:5].contiguous()})), "S0717"),
    "a pickle": (lambda: (FILE.unlink(), Path("bert/pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))), "S0705"),
    "no weights": (lambda: FILE.unlink(), "S0706"),
    "a missing shard": (
        lambda: (FILE.unlink(), write("bert/model.safetensors.index.json", json.dumps({"weight_map": {NAME: "model-00001-of-00002.safetensors"}}))), "S0706",
    ),
    "a shard outside": (
        lambda: (FILE.rename("outside.safetensors"), write("bert/model.safetensors.index.json", json.dumps({"weight_map": {NAME: "../outside.safetensors"}}))),
        "S0711",
    ),
    "a config that is no JSON": (lambda: write("bert/config.json", "{"), "S0702"),
    "a family that nobody knows": (lambda: write("bert/config.json", '{"model_type": "nothing", "architectures": ["X"]}'), "S0703"),
}  # fmt: skip


NOT_THERE = ("no weights", "a missing shard", "a config that is no JSON", "no manifest content", "a missing file")
"""Input that is not there, not all there or cannot be read ends with 2, as for a spec; what is there and is wrong with 1."""


@pytest.mark.parametrize("name", CHECKPOINT)
def test_checkpoints(here: Path, name: str) -> None:
    change, code = CHECKPOINT[name]
    checkpoint("bert")
    write("a.surg", LORA + 'emit torch to "out"\n')
    change()
    before = tree(here)
    for verb in ("plan", "compile"):
        ran = surgery(verb, "a.surg", "./bert")
        assert (ran.code, ran.codes) == (2 if name in NOT_THERE else 1, [code])
        assert tree(here) == before


def manifest(change: Callable[[dict[str, Any]], object], seal: bool = True) -> None:
    """Edits the manifest of `out`; with ``seal`` the digest is made to fit, as someone who means harm would."""
    from surgery.model.artifact_open import manifest_digest

    path = Path("out/surgery.json")
    data = json.loads(path.read_text("utf-8"))
    change(data)
    if seal:
        data["digest"] = manifest_digest(data)
    write(path, json.dumps(data))


def graph(old: str, new: str) -> None:
    path = Path("out/graph.json")
    text = path.read_text("utf-8")
    assert old in text
    write(path, text.replace(old, new))
    data = path.read_bytes()
    manifest(lambda m: m["files"]["graph.json"].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest()))


ARTIFACT: dict[str, tuple[Callable[[], object], str]] = {
    "an edited manifest": (lambda: manifest(lambda m: m.update(frozen=[]), seal=False), "S0822"),
    "an edited file": (lambda: write("out/graph.json", Path("out/graph.json").read_text("utf-8").replace("aten", "atem", 1)), "S0822"),
    "a path outside": (lambda: manifest(lambda m: m["files"].update({"../a.surg": {"bytes": 1, "sha256": "0" * 64}})), "S0823"),
    "an absolute path": (lambda: manifest(lambda m: m["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}})), "S0823"),
    "an unknown operation": (lambda: graph('"aten.', '"os.system.'), "S0824"),
    "a newer format": (lambda: manifest(lambda m: m.update(schema="surgery.artifact/99", format=99)), "S0821"),
    "no manifest content": (lambda: write("out/surgery.json", "{}"), "S0820"),
    "a missing file": (lambda: Path("out/graph.json").unlink(), "S0820"),
    "truncated weights": (lambda: Path("out/model.safetensors").write_bytes(Path("out/model.safetensors").read_bytes()[:-64]), "S0707"),
    "a link": (lambda: (Path("out/graph.json").rename("graph.json"), Path("out/graph.json").symlink_to("../graph.json")), "S0823"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARTIFACT)
def test_artifacts(here: Path, name: str) -> None:
    import surgery as api

    change, code = ARTIFACT[name]
    write("a.surg", LORA + 'emit torch to "out"\n')
    assert surgery("compile", "a.surg", model("bert")).code == 0
    write("b.surg", 'surg 1\nfold all on layers[*].**\nemit torch to "folded"\n')
    change()
    before = tree(here)
    for command in (["show", "out"], ["plan", "b.surg", "out"], ["compile", "b.surg", "out"]):
        ran = surgery(*command)
        assert (ran.code, ran.codes) == (2 if name in NOT_THERE else 1, [code])
        assert tree(here) == before
    with pytest.raises(api.SurgeryError) as caught:
        api.load("out")
    wanted = "S0822" if name == "truncated weights" else code  # found by the manifest, where the others read the headers first
    assert [d.code for d in caught.value.diagnostics] == [wanted]


@pytest.mark.parametrize(
    "line",
    [
        "prune heads(keep = 2) on layers[*].attn",  # scored by finite weights, measured on outputs that are not
        "prune layers(count = 1, score = random) on layers",
        "share layers(groups = all, weights = mean) on layers",
        "convert moe(experts = 4, top_k = 2) on layers[*].ffn",
        "convert moe(experts = 4, top_k = 2, split = moefication) on layers[*].ffn",
    ],
)
def test_weights_that_are_not_finite_are_named_by_what_measures(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path(checkpoint("llama"))
    found = load_file(folder / "model.safetensors")
    for name in found:
        if name.endswith("mlp.gate_proj.weight"):
            found[name][3, 3] = float("nan")
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    write("a.surg", f'surg 1\n\n{line}\nemit torch to "out"\n')
    ran = surgery("compile", "a.surg", folder)
    assert ran.code == 1 and ran.codes == ["S0752"], ran.err
    assert "moefication" in line or (
        "a.surg:3:1" in ran.err and line.split("(")[0] in ran.err
    )  # clusters are computed when they are written
    assert not Path("out").exists()
