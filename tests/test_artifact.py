"""The artifact folder: what is written, what comes back, and what a damaged or crafted one is refused with."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import asdict

import pytest
import torch
import transformers as T

from surgery.core.diagnostics import SurgeryError
from surgery.core.source import Source, Span
from surgery.model import artifact, artifact_open, graphjson
from surgery.model.program import Attachment, Origin
from surgery.model.realise import Realiser
from surgery.model.running import difference
from surgery.passes import registry
from tests.programs import TEXT, emitted, ids, live, padded, program_for

SPEC = 'surg 1\nmodel "x"\nadapt lora(rank = 2) on layers[*].attn.q\n'


@pytest.fixture(scope="module")
def model():
    return live(T.BertForMaskedLM, T.BertConfig(**TEXT))


@pytest.fixture(scope="module")
def program(model):
    made = program_for(model)
    made.frozen = {"bert.embeddings.position_embeddings.weight"}
    made.journal.record(
        "bert.encoder.layer.0.attention.self.query.weight", Origin(Span(Source("x.surg", SPEC), 17, 22), "adapt", "lora", "new")
    )
    return made


@pytest.fixture(scope="module")
def home(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    (folder / "vocab.txt").write_text("a\nb\n")
    return emitted(program, folder / "artifact", files=(folder / "vocab.txt",), spec=Source("x.surg", SPEC))


@pytest.fixture
def folder(home, tmp_path):
    return shutil.copytree(home, tmp_path / "artifact")


def refused(code: str, folder, match: str = "", read=artifact.load):
    with pytest.raises(SurgeryError, match=match) as caught:
        read(folder)
    found = caught.value.diagnostics[0]
    assert found.code == code, found
    return found


def edit(folder, change, *, sign: bool = True) -> None:
    """Change the manifest as an attacker would who knows how it is signed."""
    path = folder / artifact.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    if sign:
        manifest["digest"] = artifact.manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


def edit_graph(folder, change) -> None:
    path = folder / artifact.GRAPH
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    edit(folder, lambda m: m["files"][artifact.GRAPH].update(bytes=path.stat().st_size, sha256=artifact.file_digest(path)))


# --- round trips --------------------------------------------------------------------------------------------------------------------


def test_a_loaded_module_is_the_live_model(model, home):
    module = artifact.load(home)
    tokens, mask = padded(3, 13)
    assert torch.equal(model(tokens, attention_mask=mask).logits, module(tokens, attention_mask=mask).logits)
    assert not module.training
    assert {n for n, p in module.named_parameters() if not p.requires_grad} == {"bert.embeddings.position_embeddings.weight"}
    assert artifact.load(home, dtype="bfloat16").dtype == torch.bfloat16


def test_the_bytes_are_the_same_every_time(program, home, tmp_path):
    other = emitted(program, tmp_path / "again", files=(home / "vocab.txt",), spec=Source("x.surg", SPEC))
    names = sorted(p.name for p in home.iterdir())
    assert names == sorted(p.name for p in other.iterdir()) and "vocab.txt" in names and "spec.surg" in names
    assert all((home / n).read_bytes() == (other / n).read_bytes() for n in names)


def test_the_certificate_is_in_the_manifest(home):
    (entry,) = json.loads((home / artifact.MANIFEST).read_text())["certificates"]
    assert entry["claim"] == "loaded = program" and entry["ok"] and entry["max_abs_error"] <= 1e-6


def test_a_program_comes_back_for_the_next_spec(program, home):
    again = artifact.read_artifact(home, resolver=registry.get)
    assert json.dumps(graphjson.dump(again.graph)) == json.dumps(graphjson.dump(program.graph))
    assert again.signature == program.signature and again.aliases == program.aliases and again.frozen == program.frozen
    assert json.dumps(asdict(again.info)) == json.dumps(asdict(program.info)) and set(again.weights) == set(program.weights)
    values = Realiser(again.weights)
    assert all(torch.equal(values[n], e.tensor) for n, e in program.weights.items())
    (origin,) = again.journal.of("bert.encoder.layer.0.attention.self.query.weight")
    assert origin.span.text == "adapt" and origin.span.line == 3 and origin.method == "lora"


def test_attachments_come_back_with_their_methods_and_sites(program, tmp_path):
    site = next(s for s in program.anatomy.sites if s.role == "layers[1].attn.q")
    cls = registry.get("adapt", "lora")
    method = cls(rank=3)
    named = next(n.name for n in program.graph.graph.nodes if n.op == "call_module")
    from surgery.core.site import NodeRef

    program = program_for(live(T.BertForMaskedLM, T.BertConfig(**TEXT)))
    program.attachments.append(Attachment("lora", method, site, "x.lora", NodeRef("", named), ("x.lora.a",), Origin(verb="adapt")))
    record = artifact.record_of(program)
    again = artifact.program_of(json.loads(json.dumps(record)), program.weights, registry.get)
    (found,) = again.attachments
    assert found.method == method and found.site == site and found.node == NodeRef("", named)
    with pytest.raises(SurgeryError, match="made with the method 'adapt lora', which is not installed") as caught:
        artifact.program_of(record, program.weights, lambda verb, name: {}[verb])
    assert caught.value.diagnostics[0].code == "S0834"


def test_a_trained_module_is_saved_loaded_and_goes_on(home, tmp_path):
    module = artifact.load(home).train()
    optimiser = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    tokens = ids(4, 9)
    for _ in range(2):
        optimiser.zero_grad()
        module(tokens, labels=tokens).loss.backward()
        optimiser.step()
    module.eval()
    saved = artifact.save_trained(module, tmp_path / "trained")
    again = artifact.load(saved)
    assert torch.equal(again(tokens).logits, module(tokens).logits)
    assert not torch.equal(again(tokens).logits, artifact.load(home)(tokens).logits)
    assert (saved / "vocab.txt").exists() and (saved / "spec.surg").read_text() == SPEC
    assert [n for n, p in again.named_parameters() if not p.requires_grad] == ["bert.embeddings.position_embeddings.weight"]
    manifest = json.loads((saved / artifact.MANIFEST).read_text())
    assert manifest["certificates"] == [] and manifest["trained"] is True
    assert artifact.read_artifact(saved, resolver=registry.get).info.family == "bert"
    artifact.save_trained(again, saved)
    with pytest.raises(SurgeryError, match="S0803"):
        artifact.save_trained(again, home)


def test_a_part_of_a_model_is_not_saved(home, tmp_path):
    with pytest.raises(SurgeryError, match="S0820: a Linear cannot be saved as an artifact"):
        artifact.save_trained(artifact.load(home).cls.predictions.transform.dense, tmp_path / "part")


def test_other_files_beside_the_artifact_do_not_matter(folder):
    (folder / "trainer_state.json").write_text("{}")
    artifact.load(folder)


# --- damaged and crafted folders ------------------------------------------------------------------------------------------------------


def test_no_artifact(tmp_path):
    refused("S0820", tmp_path, "it has no surgery.json")
    refused("S0820", tmp_path / "nowhere", "it has no surgery.json")


def test_a_missing_file(folder):
    (folder / "graph.json").unlink()
    refused("S0820", folder, "graph.json is missing")


def test_a_newer_format(folder):
    edit(folder, lambda m: m.update(format=9, surgery="7.1"))
    assert "7.1" in refused("S0821", folder, "has format 9, this surgery reads up to 1").help[0]


def test_an_edited_manifest(folder):
    edit(folder, lambda m: m.update(frozen=[]), sign=False)
    refused("S0822", folder, "the manifest of .* was changed after surgery wrote it")


@pytest.mark.parametrize("name", ["graph.json", "config.json", "vocab.txt"])
def test_an_edited_file(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    refused("S0822", folder, f"{name} in .* is not the file that surgery wrote")


def test_edited_weights_are_found_when_asked_for(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    artifact.load(folder)
    refused("S0822", folder, "model.safetensors", read=lambda f: artifact.load(f, verify="all"))


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "a/../../secret", "..", "a//b", "", "C:\\secret", "a\\..\\b", ".hidden", "x\x00y", "graph.json/x/y/z/w"],
)
def test_paths_stay_inside(folder, name):
    edit(folder, lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}}))
    refused("S0823", folder, "which is not a file in the folder")


@pytest.mark.parametrize("name", ["graph.json", "model.safetensors", "surgery.json"])
def test_links_are_not_followed(folder, tmp_path, name):
    target = tmp_path / "elsewhere"
    shutil.move(folder / name, target)
    os.symlink(target, folder / name)
    refused("S0823", folder, "is a link or no regular file")


def test_a_linked_folder_inside(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_text("x")
    os.symlink(outside, folder / "sub")
    edit(folder, lambda m: m["files"].update({"sub/f": {"bytes": 1, "sha256": "0"}}))
    refused("S0823", folder, "sub/f in .* is a link")


def test_an_oversized_manifest(folder, monkeypatch):
    monkeypatch.setattr(artifact_open, "MAX_JSON", 100)
    refused("S0828", folder, "more than any artifact needs")


@pytest.mark.parametrize("text", ["", "[1", "{}", "[]", "null", '{"format": "1"}', "[" * 100_000, "\xff"])
def test_a_manifest_that_is_none(folder, text):
    (folder / artifact.MANIFEST).write_text(text)
    found = refused(("S0820" if text in ("{}", "[]", "null", '{"format": "1"}') else "S0826"), folder)
    assert len(found.message) < 300


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(files=[]),
        lambda m: m["files"]["graph.json"].pop("sha256"),
        lambda m: m.update(signature=None),
        lambda m: m["signature"].update(parameters=["a; import os"]),
        lambda m: m["signature"].update({"in": {"type": "tensor"}}),
        lambda m: m["signature"].update({"out": {"type": "magic"}}),
        lambda m: m.update(aliases=[1]),
        lambda m: m.update(dtype="system"),
        lambda m: m["info"].update(family="no_such_family"),
        lambda m: m["info"].update(architecture="a b"),
        lambda m: m["info"].update(config="x"),
        lambda m: m.update(frozen=7),
    ],
)
def test_a_damaged_manifest_is_one_diagnostic(folder, change):
    edit(folder, change)
    refused("S0826", folder)


@pytest.mark.parametrize(
    "name",
    ["os:system", "subprocess:Popen", "transformers.modeling_outputs:dataclass", "transformers.models.x.modeling_y:Z", "torch:Tensor"],
)
def test_output_classes_come_from_transformers_only(folder, name):
    edit(folder, lambda m: m["signature"]["out"].update({"class": name}))
    refused("S0829", folder, "output class")


def test_an_unknown_operation(folder):
    def change(data):
        next(n for m in data["modules"] for n in m.get("nodes", ()) if n[1] == "fn")[2] = "aten.from_file.default"

    edit_graph(folder, change)
    refused("S0824", folder, "the operation aten.from_file.default")


def test_an_unknown_module_class(folder):
    edit_graph(folder, lambda data: next(m for m in data["modules"] if "tag" in m).update(tag="pickle:loads"))
    refused("S0825", folder, "the module class 'pickle:loads'")


def test_a_lying_tensor_header(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    first = next(k for k in header if k != "__metadata__")
    header[first]["data_offsets"][1] += 4
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    path.write_bytes(raw[:8] + text + raw[8 + length :])
    found = refused("S0709", folder)
    assert first in found.message


def test_a_missing_tensor(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    del tensors["cls.predictions.transform.dense.bias"]
    save_file(tensors, path)
    edit(folder, lambda m: m["files"]["model.safetensors"].update(bytes=path.stat().st_size))
    refused("S0833", folder, "there is no tensor for cls.predictions.transform.dense.bias")
    refused("S0833", folder, "cls.predictions.transform.dense.bias", read=lambda f: artifact.read_artifact(f, resolver=registry.get))


def test_a_failed_emission_leaves_what_stood_there(program, home, tmp_path, monkeypatch):
    target = shutil.copytree(home, tmp_path / "a")
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    monkeypatch.setattr(artifact, "add_certificates", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        emitted(program, target, force=True)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ["a"]
    with pytest.raises(SurgeryError, match="S0803"):
        emitted(program, target)


def test_what_is_no_number_differs_from_everything() -> None:
    """As the checks of what was written see it: the largest of several differences must not pass over it."""
    one = torch.ones(3)
    for odd in (torch.tensor([1.0, float("nan"), 1.0]), torch.ones(4)):
        assert difference(one, odd)[0] == difference(odd, one)[0] == float("inf")
    assert difference(one, 3 * one) == (2.0, 1.0) and difference(3 * one, one) == (2.0, 3.0)
