"""Packages of AOTInductor: what they compute, what they say about themselves, that the same spec gives the same bytes. Two compilations in all."""

from __future__ import annotations

import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import surgery
from surgery.backends import aoti, pt2_ops, served, to_pt2
from surgery.backends.fuse.engine import fuse
from surgery.backends.fuse.rule import Target
from surgery.backends.protocol import EmitRequest, check_target, owner_mark, owns
from surgery.benching import bench
from surgery.core.diagnostics import SurgeryError
from surgery.model import cost
from surgery.model.live import Tensors, live_root
from surgery.model.pytree import leaves_in
from surgery.model.sample import sample_inputs
from surgery.passes import registry
from tests.programs import LM, live, padded, program_for

SPEC = (
    "surg 1\nprune heads(ratio = 50%) on layers[*].attn\nadapt lora(rank = 2) on layers[*].attn.q\ninsert prompt(length = 2, std = 1) on embed.tokens\n"
    'insert prefix(length = 3, width = 4) on layers[*].attn\nemit pt2 to "model.pt2"\n'
)
SMALL = dict(vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64)


def bert() -> Any:
    return live(BertModel, BertConfig(**SMALL))


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """The code around the kernels is compiled without optimization: what it computes is the same."""
    usual = aoti.defaults
    with patch.object(
        aoti, "defaults", lambda place, target="cpu": {**usual(place, target), "aot_inductor.compile_wrapper_opt_level": "O0"}
    ):
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, a spec, the package of it, and a torch artifact of the same, folded."""
    folder = tmp_path_factory.mktemp("pt2")
    bert().save_pretrained(folder / "bert")
    (folder / "spec.surg").write_text(SPEC.replace("surg 1\n", 'surg 1\nmodel "bert"\n'))
    surgery.compile(folder / "spec.surg", out=folder)
    surgery.compile(SPEC.replace('emit pt2 to "model.pt2"', 'fold all\nemit torch to "module"'), str(folder / "bert"), out=folder)
    return folder


def test_a_package_computes_what_the_module_does(place: Path) -> None:
    """Called by keyword through torch alone; batches and lengths that it was not compiled with; padding."""
    package = torch._inductor.aoti_load_package(str(place / "model.pt2"))
    module = surgery.load(place / "module").eval()
    for batch, length in ((1, 1), (2, 16), (5, 61)):
        ids, mask = padded(batch, length)
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        with torch.no_grad():
            want, got = module(**inputs), package(**inputs)
        assert type(got) is dict and list(got) == ["last_hidden_state", "pooler_output"]
        for name, value in got.items():
            assert value.shape == want[name].shape and float((value - want[name]).abs().max()) < 1e-5


def test_a_package_says_what_it_is(place: Path) -> None:
    record = aoti.read_record(place / "model.pt2")
    assert record is not None and record["schema"] == "surgery.served/1"
    assert [i["name"] for i in record["inputs"]] == ["input_ids", "attention_mask", "token_type_ids"]
    assert record["inputs"][0]["shape"] == ["batch", "sequence"] and record["inputs"][0]["below"] == 99
    ours = [c for c in record["certificates"] if c["claim"] == "torch = pt2"]
    assert {c["case"] for c in ours} == {"random", "padded", "single"} and all(
        c["ok"] and c["max_abs_error"] <= c["tolerance"] for c in ours
    )
    assert any(c["claim"] == "folded = unfolded" for c in record["certificates"])
    assert {f["rule"] for f in record["fusions"] if f["fired"]}, "nothing was fused"


def test_the_polynomial_of_the_record_is_the_count(place: Path) -> None:
    """FLOPs at lengths that the record does not state, those of the pruned model."""
    record = aoti.read_record(place / "model.pt2")
    from surgery.opening import open_program

    program, _ = open_program(str(place / "module"))
    assert record is not None
    for length in (1, 20, 61):
        assert served.operations(record, 3, length) == 3 * cost.count(program, length).total
    assert record["params"] == cost.parameters(program)


def test_no_path_of_this_machine_is_inside(place: Path) -> None:
    data = (place / "model.pt2").read_bytes()
    for text in (str(place), "/tmp/", "site-packages", str(Path(surgery.__file__).parent.parent), ".cpp:"):
        assert text.encode() not in data, text


def test_the_same_spec_gives_the_same_bytes_and_may_replace_them(place: Path) -> None:
    """Compiled again, with other settings of torch around it, over what stands there."""
    before = (place / "model.pt2").read_bytes()
    assert owns(place / "model.pt2", owner_mark("spec.surg")) and not owns(place / "model.pt2", owner_mark("other.surg"))
    with pytest.raises(SurgeryError) as other:
        check_target(place / "model.pt2", "pt2", False, owner_mark("other.surg"))
    assert other.value.diagnostics[0].code == "S0803"
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    torch.manual_seed(5)
    try:
        surgery.compile(place / "spec.surg", out=place)
    finally:
        torch.set_num_threads(threads)
    assert (place / "model.pt2").read_bytes() == before
    assert sorted(p.name for p in place.iterdir() if "model.pt2" in p.name) == ["model.pt2"]


def test_bench_runs_a_package_beside_the_module(place: Path) -> None:
    found = bench(
        [str(place / "model.pt2")], str(place / "module"), batches=[2], lengths=[7], rounds=2, arms=["eager"], prompts=[1, 7], memory=False, threads=1,
    )  # fmt: skip
    (cells,) = found.cells.values()
    first, second = cells.values()
    assert first.error is None and second.error is not None and second.error < 1e-5
    assert second.flops and second.flops == first.flops
    shown = found.as_json()
    assert shown["shapes"][0]["best_artifact"].endswith("model.pt2 [AOTInductor]")
    assert set(shown["arms"][1]["ideal"]["first_token_ms"]) == {"1", "7"} and shown["arms"][1]["ideal"]["token_ms"] is None
    json.dumps(shown)


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_graph_moves_with_all_that_it_reads(model: str) -> None:
    """Fused for a device and moved, it runs on inputs there alone: nothing it reads or makes stays behind. Meta tensors refuse others."""
    made = bert() if model == "bert" else live(LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2, **LM))
    program = program_for(made)
    root = live_root(program, Tensors(registry.function), dtype=torch.float16).eval().requires_grad_(False)
    graph = to_pt2.on_device(fuse(program, root, Target(backend="pt2", device="cuda", precision="fp16")).graph, "meta")
    inputs = sample_inputs(program, batch=2, length=7, seed=1, padding=True, dtype=torch.float16, past=3)
    outputs = graph(*(t.to("meta") for t in inputs))
    assert all(t.device.type == "meta" for t in outputs)
    assert all(t.device.type == "meta" for t in (*graph.parameters(), *graph.buffers()))


def test_a_package_that_takes_its_process_along_is_refused(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aoti.try_apart(place / "model.pt2")
    (tmp_path / "broken.pt2").write_bytes(b"PK")
    with pytest.raises(SurgeryError, match=r"S0894.*exit code 1"):
        aoti.try_apart(tmp_path / "broken.pt2")
    (tmp_path / "python").write_text("#!/bin/sh\nkill -SEGV $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SurgeryError, match=r"S0894.*SIGSEGV"):
        aoti.try_apart(place / "model.pt2")


def test_experts_become_an_operation_of_torch() -> None:
    """Also in odd sizes and types that torch's own would not be traced in: a package is run where this one is not installed."""

    class Experts(torch.nn.Module):
        def forward(self, x: torch.Tensor, weight: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = torch.ops.surgery.grouped_mm(x, weight.transpose(-2, -1), ends)
            return made

    ends = torch.tensor([3, 3, 11], dtype=torch.int32)
    for inner, outer in ((16, 8), (6, 5)):
        given = torch.randn(11, inner), torch.randn(3, outer, inner), ends
        exported = torch.export.export(Experts(), given, dynamic_shapes=({0: torch.export.Dim.DYNAMIC}, None, None))
        assert pt2_ops.left(exported) == ["surgery.grouped_mm.default"]
        plain = pt2_ops.plain(exported)
        assert not pt2_ops.left(plain)
        torch.testing.assert_close(plain.module()(*given), Experts()(*given))
    assert pt2_ops.plain(plain) is plain


def test_a_failed_certificate_leaves_what_stood_there(place: Path) -> None:
    before = (place / "model.pt2").read_bytes()
    wrong = torch.nn.Linear(1, 1)

    def broken(**inputs: Any) -> Any:
        rows = inputs["input_ids"].shape
        return {"last_hidden_state": torch.zeros(*rows, 32), "pooler_output": wrong.weight.expand(rows[0], 32)}

    with (
        patch.object(aoti, "build", lambda *what, **more: []),
        patch.object(aoti, "package", lambda *what: None),
        patch.object(aoti, "load", lambda path: broken),
        pytest.raises(SurgeryError) as found,
    ):
        surgery.compile(place / "spec.surg", out=place)
    assert [d.code for d in found.value.diagnostics] == ["S0894"]
    assert (place / "model.pt2").read_bytes() == before


def test_without_a_compiler_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "there-is-no-such-compiler")
    program = program_for(bert())
    with pytest.raises(SurgeryError) as found:
        to_pt2.BACKEND.emit(program, EmitRequest(target=tmp_path / "x.pt2", params={}, tensors=Tensors(registry.function)))
    assert found.value.diagnostics[0].code == "S0890" and found.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_decoder_is_called_with_layers_of_keys_and_values() -> None:
    """The graph that is compiled, run as it is: names, nesting and order are those of the flat graph, with and without a past."""
    config = LlamaConfig(**SMALL, num_key_value_heads=2, **LM)
    program = program_for(live(LlamaForCausalLM, config))
    root = live_root(program, Tensors(registry.function), dtype=torch.float32).eval()
    tree, out = served.input_tree(program), program.signature.out_spec
    module = to_pt2.wrapped(root, tree, out)
    for past in (0, 4):
        flat = sample_inputs(program, batch=2, length=3, past=past, padding=False)
        nested = served.nest(iter(flat), tree)
        assert len(nested["past_key_values"]) == 1 and [t.shape[2] for t in nested["past_key_values"][0]] == [past, past]
        with torch.no_grad():
            got, want = module(**nested), root(*flat)
        assert list(got) == ["logits", "past_key_values"] and got["past_key_values"][0][0].shape[2] == past + 3
        assert all(torch.equal(a, b) for a, b in zip(served.flat(got, out), want, strict=True))


LEAF: dict[str, Any] = {"type": "tensor"}
CONST: dict[str, Any] = {"type": "const", "value": 1}
CACHES: list[dict[str, Any]] = [{"type": "cache", "class": c, "layers": n} for c in ("DynamicCache", "EncoderDecoderCache") for n in (1, 3)]


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
@pytest.mark.parametrize("cache", CACHES, ids=lambda c: f"{c['class']}-{c['layers']}")
def test_flat_undoes_nest(kind: str, cache: dict[str, Any]) -> None:
    inner: list[dict[str, Any]] = [LEAF, CONST, cache, {"type": "tuple", "items": [LEAF, LEAF]}, LEAF]
    tree = {"type": kind, "items": inner, **({"keys": list("abcde")} if kind == "dict" else {})}
    leaves = list(range(leaves_in(tree)))
    nested = served.nest(iter(leaves), tree)
    assert served.flat(nested, tree) == leaves
    layers = nested["c" if kind == "dict" else 2]
    assert len(layers) == cache["layers"] and layers[0][0] == 1 and layers[0][1] == 1 + cache["layers"], (
        "all keys come first, then all values"
    )
    assert ("b" not in nested) if kind == "dict" else nested[1] is None


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_what_is_no_package_has_no_record(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.pt2"
    if content is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("model/extra/surgery.json", "[1, 2")
    else:
        path.write_bytes(content)
    assert aoti.read_record(path) is None
