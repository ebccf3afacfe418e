"""``surgery explain --why-not``: reports of fusions in ONNX files, packages and folders, and files that have none."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import onnx
import pytest

from surgery.backends.fuse.engine import Fired, FusionEntry, rules
from surgery.backends.fuse.rule import Miss
from surgery.cli.why_not import known_rules
from surgery.dev import fusion_files
from tests.driver_support import surgery

ENTRIES = (
    FusionEntry(
        "skip_layer_norm", "a shortcut and its norm", 10, tuple(Fired(f"layer.{i}::add", "sum and norm") for i in range(10)),
        (Miss("embeddings::layer_norm", "the norm reads no sum of two values", "embedding"),), 2.5e-7, 3e-5,
    ),
    FusionEntry("gated_activation", "gates", 0, (), (Miss("a::mul", "no kernel", "SiLU"), Miss("b::mul", "no kernel", ""))),
    FusionEntry("rotary", "turns"),
)  # fmt: skip


def model(path: Path, report: Any = ENTRIES, weights: int = 0) -> Path:
    """An ONNX file with weights in front of its report, as emitted files have them."""
    held = [onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [weights], b"\1" * 4 * weights, raw=True)] if weights else []
    made = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], held))
    if report is not None:
        records = [e.record() for e in report]
        onnx.helper.set_model_props(made, {"surgery.certificate": "[]", "surgery.fusions": json.dumps(records), "surgery.spec": "x"})
    onnx.save(made, path)
    return path


def test_one_rule(here: Path) -> None:
    model(here / "model.onnx", weights=50_000)
    ran = surgery("explain", "--why-not", "skip_layer_norm", "model.onnx")
    assert ran.code == 0
    assert ran.out.splitlines()[0] == "model.onnx: skip_layer_norm fired at 10 places, not at 1 place that look like it"
    assert "  fired: sum and norm (10)\n    layer.0::add\n" in ran.out and "    and 2 more (`--format json` has all)" in ran.out
    assert "  not fired: the norm reads no sum of two values (1)\n    embeddings::layer_norm: embedding\n" in ran.out
    assert "error 2.5e-07 of the output's scale, allowed 3e-05" in ran.out
    both = surgery("explain", "--why-not", "gated_activation", "model.onnx").out
    assert "no kernel (2)\n    a::mul: SiLU\n    b::mul\n" in both
    assert "nothing in the graph is what it is about: turns" in surgery("explain", "--why-not", "rotary", "model.onnx").out
    assert "was not asked; it is a rule for pt2" in surgery("explain", "--why-not", "pack_gate_up", "model.onnx").out


def test_all_rules_and_json(here: Path) -> None:
    model(here / "model.onnx")
    lines = surgery("explain", "--why-not", "model.onnx").out.splitlines()
    assert lines[2].split() == ["skip_layer_norm", "10", "1", *"the norm reads no sum of two values".split()]
    assert lines[3].split() == ["gated_activation", "0", "2", "no", "kernel"]
    found = surgery("explain", "--why-not", "skip_layer_norm", "model.onnx", "--format", "json").json
    assert found["schema"] == "surgery.why-not/1" and found["rule"] == "skip_layer_norm"
    assert found["files"] == {"model.onnx": [json.loads(json.dumps(ENTRIES[0].record()))]}
    every = surgery("explain", "--why-not", "model.onnx", "--format", "json").json
    assert [r["rule"] for r in every["files"]["model.onnx"]] == [e.rule for e in ENTRIES]


def test_packages_parts_and_folders(here: Path) -> None:
    """A compiled package, the two parts of a pair under the name of the whole, and a folder with several files, one without a report."""
    with zipfile.ZipFile(here / "model.pt2", "w") as archive:
        archive.writestr("model/data/extra/surgery.json", json.dumps({"fusions": [ENTRIES[0].record()], "certificates": []}))
    assert surgery("explain", "--why-not", "skip_layer_norm", "model.pt2").out.startswith("model.pt2: skip_layer_norm fired at 10")
    model(here / "t5.encoder.onnx")
    model(here / "t5.decoder.onnx", ENTRIES[:1])
    parts = surgery("explain", "--why-not", "skip_layer_norm", "t5.onnx").out
    assert [line.split(":")[0] for line in parts.splitlines() if not line.startswith(" ") and line] == [
        "t5.decoder.onnx",
        "t5.encoder.onnx",
    ]
    model(here / "plain.onnx", None)
    found = surgery("explain", "--why-not", "rotary", ".", "--format", "json").json
    assert {name: len(records) for name, records in found["files"].items()} == {"model.pt2": 0, "t5.decoder.onnx": 0, "t5.encoder.onnx": 1}


@pytest.mark.parametrize(
    ("args", "code", "exit_code"),
    [
        (("skip_layer_norms", "model.onnx"), "S0885", 2),
        (("skip_layer_norm", "plain.onnx"), "S0886", 1),
        (("empty",), "S0886", 1),
        (("skip_layer_norm", "text.onnx"), "S0887", 2),
        (("skip_layer_norm", "short.onnx"), "S0887", 2),
        (("skip_layer_norm", "nothing.onnx"), "S0887", 2),
        (("skip_layer_norm", "zip.pt2"), "S0887", 2),
        (("skip_layer_norm", "absent.onnx"), "S0910", 2),
        (("skip_layer_norm",), "S0911", 2),
        (("a", "b", "c"), "S0911", 2),
    ],
)
def test_bad_input(here: Path, args: tuple[str, ...], code: str, exit_code: int) -> None:
    data = model(here / "model.onnx", weights=64).read_bytes()
    model(here / "plain.onnx", None)
    (here / "empty").mkdir()
    (here / "text.onnx").write_text("what fused?")
    (here / "short.onnx").write_bytes(data[:-40])
    (here / "nothing.onnx").write_bytes(b"")
    (here / "zip.pt2").write_bytes(b"PK\x03\x04 and then nothing that a zip has")
    ran = surgery("explain", "--why-not", *args)
    assert (ran.code, ran.codes) == (exit_code, [code])
    assert code != "S0885" or "did you mean `skip_layer_norm`" in ran.err


def test_pages_of_rules_are_those_of_the_registry(here: Path) -> None:
    """Packaged and written pages are made from the rules that run, in their order; ``explain RULE`` prints them."""
    assert list(known_rules()) == [r.name for r in rules()]
    assert len(set(known_rules())) == len(rules()) >= 18
    assert all(path.read_text("utf-8") == text for path, text in fusion_files().items())
    page = surgery("explain", "skip_layer_norm").out
    assert page.startswith("# fusion skip_layer_norm\n") and "SkipLayerNormalization" in page and "For: onnx." in page
    assert all(len(r["page"].splitlines()) > 5 for r in known_rules().values())
