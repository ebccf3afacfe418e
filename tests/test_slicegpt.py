"""`prune slicegpt`: exact before the cut, equal to projections of the live model's stream after it, and everything goes on behind it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery as api
from surgery.core.diagnostics import SurgeryError
from surgery.model.claims import Claim
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.model.runtime import build_module
from surgery.model.study import Study
from surgery.passes import registry
from surgery.passes.expect import parameter_sizes
from surgery.passes.kinds.rotate_write import ShortcutModule
from surgery.passes.prune.slicegpt import Slicegpt
from surgery.passes.verify import verify
from tests.captured_programs import live_model, zoo_program
from tests.data_support import text_model, write_lines, zoo_rows, zoo_samples
from tests.driver_support import surgery, write
from tests.workbench import difference, fold_all, operation, perturb, run

FAMILIES = ["llama", "qwen3", "phi3", "gpt2", "vit"]


def sliced(family: str, count: int = 5, **params: Any) -> tuple[Program, list[Claim]]:
    program, _ = zoo_program(family)
    claims: list[Claim] = []
    op = operation(program, "prune", "slicegpt", [], **{"round_to": 4, **params})
    data = zoo_samples(program, family, count=count, batch=2)
    run(program, replace(op, sites=(), study=Study(Tensors(registry.function)), data=data, claim=claims.append))
    verify(program, "slicegpt")
    return program, claims


def outputs(program: Program, flat: list[Tensor]) -> list[Tensor]:
    module = build_module(program, Tensors(registry.function).all(program))
    with torch.no_grad():
        return [t for t in module.run_flat(list(flat)) if t.is_floating_point()]  # type: ignore[operator]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_before_the_cut(family: str) -> None:
    before, flat = zoo_program(family)
    program, (claim,) = sliced(family, ratio=0.0)
    assert difference(outputs(program, flat), outputs(before, flat)) <= 1e-5
    tensors = Tensors(registry.function)
    assert difference(claim.found(tensors, flat), claim.expected(tensors, flat)) <= 1e-5
    shortcuts = [m for m in program.graph.modules() if isinstance(m, ShortcutModule)]
    assert len(shortcuts) == 2 * program.anatomy.stacks[0].layers
    values = [tensors.of(program, n) for n in program.weights if "shortcut" in n]
    for value in values:
        torch.testing.assert_close(value @ value.T, torch.eye(len(value)), atol=1e-5, rtol=0)
        assert not torch.allclose(value, torch.eye(len(value)), atol=0.1)  # the bases do differ


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_is_measured_before_and_counts_are_as_stated(family: str) -> None:
    before, flat = zoo_program(family)
    program, (claim,) = sliced(family, ratio=0.25)
    assert claim.text == "rotated = as it was, before the cut"
    assert difference(claim.found(Tensors(registry.function), flat), claim.expected(Tensors(registry.function), flat)) <= 1e-5
    got, want = outputs(program, flat), outputs(before, flat)
    assert [t.shape for t in got] == [t.shape for t in want] and difference(got, want) > 1e-3
    layers = program.anatomy.stacks[0].layers
    sizes = parameter_sizes(program)
    assert sum(n for name, n in sizes.items() if "shortcut" in name) == 2 * layers * 24**2
    assert all(32 not in program.weights[n].shape or "restore" in n or 32 in before.weights.get(n, program.weights[n]).shape for n in sizes)


def test_counts_of_a_llama() -> None:
    """By the formula: every matrix loses its share of the stream, norms go, 2 L d'^2 come."""
    before, _ = zoo_program("llama")
    program, _ = sliced("llama", ratio=0.25)
    expected = 0
    for name, size in parameter_sizes(before).items():
        norm = "norm" in name
        expected += 0 if norm else size * 24 // 32
    assert sum(parameter_sizes(program).values()) == expected + 2 * 3 * 24 * 24


class Projected(nn.Module):
    """The live Llama with its stream projected at each place: what a cut in rotated bases must equal."""

    def __init__(self, model: Any, rows: list[dict[str, Tensor]], keep: int) -> None:
        super().__init__()
        self.model, self.keep = model, keep
        self.projections: list[Tensor] = []
        places: list[list[Tensor]] = [[] for _ in range(2 * len(model.model.layers) + 1)]
        self.run_places([r["input_ids"][None] for r in rows], places)
        for seen in places:
            x = torch.cat([s.reshape(-1, s.shape[-1]) for s in seen]).double()
            values, vectors = torch.linalg.eigh(x.T @ x)
            assert bool((values[1:] >= values[:-1]).all())
            q = vectors[:, -keep:]
            self.projections.append((q @ q.T).float())

    def run_places(self, batches: list[Tensor], places: list[list[Tensor]] | None = None) -> Tensor:
        with torch.no_grad():
            for ids in batches:
                logits = self.one(ids, places)
        return logits

    def one(self, ids: Tensor, places: list[list[Tensor]] | None) -> Tensor:
        inner = self.model.model
        h, at = inner.embed_tokens(ids), 0

        def place(h: Tensor) -> Tensor:
            nonlocal at
            at += 1
            if places is not None:
                places[at - 1].append(h)
                return h
            return h @ self.projections[at - 1]

        rope = inner.rotary_emb(h, torch.arange(ids.shape[1])[None])
        h = place(h)
        for layer in inner.layers:
            h = place(h + layer.self_attn(layer.input_layernorm(h), position_embeddings=rope, attention_mask=None)[0])
            h = place(h + layer.mlp(layer.post_attention_layernorm(h)))
        return self.model.lm_head(inner.norm(h))


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_the_cut_is_a_projection_of_the_stream_at_every_place(ratio: float) -> None:
    before, _ = zoo_program("llama")
    rows = zoo_rows(before, "llama", 5)
    program, _ = sliced("llama", ratio=ratio, round_to=8)
    reference = Projected(live_model("llama"), rows, int((1 - ratio) * 32))
    module = build_module(program, Tensors(registry.function).all(program))
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        plain = live_model("llama")(input_ids=ids).logits
        assert difference([reference.one(ids, [[] for _ in range(7)])], [plain]) <= 1e-5, "the reference is the model"
        got, want = module(input_ids=ids)[0], reference.one(ids, None)
    assert difference([got], [want]) <= 1e-4
    assert difference([want], [plain]) > 1e-2


def test_bases_are_orthogonal_with_the_best_axes_first() -> None:
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).double() @ torch.diag(torch.arange(1, 13).double())
    gram = x.T @ x
    q = Slicegpt().basis(gram)
    torch.testing.assert_close(q.T @ q, torch.eye(12).double(), atol=1e-10, rtol=0)
    energy = (q.T @ gram @ q).diagonal()
    assert bool((energy[:-1] >= energy[1:]).all())
    assert torch.equal(q, Slicegpt().basis(gram.clone()))


def test_widths_are_rounded_down() -> None:
    assert [Slicegpt(ratio=r).width(768) for r in (0.0, 0.25, 0.3, 0.29)] == [768, 576, 536, 544]
    assert Slicegpt(ratio=0.0).width(30) == 30


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_comes_behind(family: str) -> None:
    """Adapters fold, a later cut of the width takes the shortcuts along, and the anatomy knows the roles that it knew."""
    from surgery.model.cut import cut
    from surgery.model.program import Origin

    before, flat = zoo_program(family)
    program, _ = sliced(family, ratio=0.25)
    roles = {s.role for s in before.anatomy.sites if s.op != "norm"}
    assert {s.role for s in program.anatomy.sites if s.op != "norm"} == roles and program.anatomy.unresolved == before.anatomy.unresolved
    run(program, operation(program, "adapt", "lora", ["layers[0].attn.q", "layers[1].ffn.down", "head"], rank=2))
    perturb(program)
    expected = outputs(program, flat)
    other = program.copy()
    fold_all(program)
    verify(program, "the fold")
    assert difference(outputs(program, flat), expected) <= 1e-5
    name = next(s.weight for s in program.anatomy.sites if s.role == "embed.tokens")
    for each in (program, other):
        cut(each, each.dims.coupled(name, 1, [1, 20]), Origin())
        verify(each, "the cut")
        assert all(m.weight.shape == (22, 22) for m in each.graph.modules() if isinstance(m, ShortcutModule))
    assert difference(outputs(program, flat), outputs(other, flat)) <= 1e-5


@pytest.mark.parametrize(("family", "part"), [
    ("bert", "post-norm"), ("mixtral", "no linear map with a weight of its own"), ("gemma3_text", "one norm"),
])  # fmt: skip
def test_models_of_other_forms_are_refused(family: str, part: str) -> None:
    program, _ = zoo_program(family)
    weights = dict(program.weights)
    with pytest.raises(SurgeryError) as found:
        run(program, replace(operation(program, "prune", "slicegpt", []), sites=()))
    assert found.value.diagnostics[0].code == "S0467" and part in found.value.diagnostics[0].message
    assert dict(program.weights) == weights


def test_a_rotated_model_is_not_rotated_again() -> None:
    program, _ = sliced("llama", ratio=0.25)
    with pytest.raises(SurgeryError) as found:
        run(program, replace(operation(program, "prune", "slicegpt", []), sites=()))
    assert found.value.diagnostics[0].code == "S0467" and "rotated already" in found.value.diagnostics[0].message


def test_adapters_and_masks_are_in_the_way() -> None:
    for verb, name in (("adapt", "lora"), ("prune", "mask")):
        program, _ = zoo_program("llama")
        run(program, operation(program, verb, name, ["layers[0].attn.q"]))
        with pytest.raises(SurgeryError) as found:
            run(program, replace(operation(program, "prune", "slicegpt", []), sites=()))
        assert found.value.diagnostics[0].code == "S0468"


def test_from_a_spec_to_torch_onnx_and_a_second_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = text_model("llama", tmp_path)
    write_lines(tmp_path / "calib.txt", 9)
    write(
        "a.surg",
        'surg 1\n\ndata text = lines("calib.txt")\nprune slicegpt(ratio = 25%, round_to = 4) using text\n'
        'adapt lora(rank = 2) on layers[*].attn.q\nemit torch to "out"\nemit onnx to "out.onnx"\n',
    )
    planned = surgery("plan", "a.surg", folder, "--format", "json")
    assert planned.code == 0, planned.err
    ran = surgery("compile", "a.surg", folder, "--format", "json")
    assert ran.code == 0, ran.err + ran.out
    totals = [r.json["totals"] if "totals" in r.json else r.json["plan"]["totals"] for r in (planned, ran)]
    assert totals[0] == totals[1]
    claims = {c["claim"]: c for c in ran.json["certificates"]}
    assert claims["rotated = as it was, before the cut"]["ok"] and claims["rotated = as it was, before the cut"]["max_abs_error"] <= 1e-5
    module = api.load("out").train()
    trained = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    module(input_ids=torch.tensor([[5, 6, 7]]))[0].square().mean().backward()
    trained.step()
    api.save(module, "trained")
    write("b.surg", 'surg 1\n\nfold all\nexpect same_output(at = fold) within 1e-5\nemit torch to "folded"\n')
    ran = surgery("compile", "b.surg", "trained")
    assert ran.code == 0, ran.err + ran.out


def test_weights_of_16_bits_are_rotated_before_they_are_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim is about the rotation: rounding the turned weights to bfloat16 moves outputs by more than it allows."""
    monkeypatch.chdir(tmp_path)
    folder = text_model("llama", tmp_path)
    for file in folder.glob("*.safetensors"):
        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), "utf-8")
    write_lines(tmp_path / "calib.txt", 9)
    write("a.surg", 'surg 1\n\ndata text = lines("calib.txt")\nprune slicegpt(ratio = 25%) using text\nemit torch to "out"\n')
    ran = surgery("compile", "a.surg", folder, "--format", "json")
    assert ran.code == 0, ran.err + ran.out
    claim = next(c for c in ran.json["certificates"] if c["claim"] == "rotated = as it was, before the cut")
    assert claim["ok"] and claim["max_abs_error"] <= 1e-5
    assert {p.dtype for p in api.load("out").parameters()} == {torch.bfloat16}


def test_rows_that_are_flattened_on_their_way_are_the_same_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT lays its rows out as [batch * length, width] in front of each feed-forward block: unturned it computes what the live model does."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32
    )  # fmt: skip
    live = transformers.OPTForCausalLM(config).eval()
    live.save_pretrained("opt")
    save_file({"input_ids": torch.randint(3, 90, (5, 9))}, "rows.safetensors")
    start = 'surg 1\n\ndata rows = tensors("rows.safetensors", batch = 2)\n'
    write("a.surg", start + 'prune slicegpt(ratio = 0%, round_to = 1) using rows\nemit torch to "out"\n')
    write(
        "b.surg", start + 'prune slicegpt(ratio = 25%, round_to = 4) using rows\nexpect runs(batch = 2, length = 5)\nemit torch to "cut"\n'
    )
    for name in ("a.surg", "b.surg"):
        ran = surgery("compile", name, "opt", "--format", "json")
        assert ran.code == 0, ran.err + ran.out
    tokens = torch.randint(3, 90, (2, 7))
    with torch.no_grad():
        assert torch.allclose(api.load("out")(tokens).logits, live(tokens).logits, atol=1e-5, rtol=1e-5)
    assert {p.shape[-1] for n, p in api.load("cut").named_parameters() if "embed" in n} == {24}
