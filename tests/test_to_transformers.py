"""The transformers backend: what it writes loads with ``from_pretrained`` and computes the same, or the statement that prevents it is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

import surgery as api
from surgery.backends.protocol import EmitRequest
from surgery.backends.to_transformers import BACKEND
from surgery.core.diagnostics import SurgeryError
from surgery.model.live import Tensors
from surgery.passes import registry
from tests.captured_programs import live_model, zoo_program
from tests.driver_support import checkpoint, debris, surgery, tree, write
from tests.zoo import ZOO

FAMILIES = [family for family, entry in ZOO.items() if entry.capturable]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_as_its_own_class(family: str, tmp_path: Path) -> None:
    program, _ = zoo_program(family)
    found = BACKEND.emit(program, EmitRequest(target=tmp_path / "out", params={}, tensors=Tensors(registry.function)))
    assert found.certificates[0]["ok"] and found.certificates[0]["max_abs_error"] == 0.0
    loaded = getattr(transformers, ZOO[family].architecture).from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    inputs = ZOO[family].inputs(2, 9)
    with torch.no_grad():
        want, got = live_model(family)(**ZOO[family].inputs(2, 9)), loaded(**inputs)
    want, got = want[0], got[0]
    assert torch.equal(want, got)


SPEC = """surg 1
adapt lora(rank = 4) on {where}
emit transformers{params} to "out"
"""


def compiled(family: str, text: str) -> api.driver.Result:
    return api.compile(write("a.surg", text), checkpoint(family), force=True)


def test_adapters_are_folded_into_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = compiled("llama", SPEC.format(where="layers[*].attn.{q, v}", params=""))
    assert {c["claim"] for c in result.certificates} >= {"folded = unfolded", "from_pretrained = program"}
    trained = result.module
    with torch.no_grad():
        for name, p in trained.named_parameters():
            if "lora" in name:
                p.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    api.save(trained, "trained")
    write("b.surg", 'surg 1\nfold all on layers[*].**\nemit transformers to "plain"\n')
    api.compile("b.surg", "trained")
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    plain = transformers.LlamaForCausalLM.from_pretrained("plain", dtype=torch.float32).eval()
    with torch.no_grad():
        difference = (trained.eval()(ids).logits - plain(ids).logits).abs().max()
        unchanged = transformers.LlamaForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
        assert (unchanged(ids).logits - plain(ids).logits).abs().max() > 1e-2
    assert float(difference) <= 1e-5


def test_the_type_of_the_weights_is_a_parameter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compiled("bert", SPEC.format(where="layers[*].attn.q", params="(dtype = bf16)"))
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    with safe_open("out/model.safetensors", "pt") as file:
        assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.bfloat16}


def test_tied_names_are_stored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compiled("gpt2", SPEC.format(where="layers[*].attn.q", params=""))
    with safe_open("out/model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys() and "transformer.wte.weight" in file.keys()


def test_what_stays_in_the_graph_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint("bert")
    write("a.surg", 'surg 1\ninsert bottleneck(width = 4) after layers[0].attn\nemit transformers to "out"\n')
    with pytest.raises(SurgeryError) as caught:
        api.compile("a.surg", checkpoint("bert"))
    assert [d.code for d in caught.value.diagnostics] == ["S0861"]
    assert not Path("out").exists() and not debris(".")


def test_a_module_without_a_config_has_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SurgeryError) as caught:
        api.compile(
            'surg 1\nfreeze all on "0"\nemit transformers to "out"\n',
            torch.nn.Sequential(torch.nn.Linear(4, 4)),
            inputs=(torch.randn(2, 4),),
        )
    assert [d.code for d in caught.value.diagnostics] == ["S0860"]


def test_the_same_spec_replaces_its_own_output_and_no_other_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ref = checkpoint("bert")
    write("a.surg", SPEC.format(where="layers[*].attn.q", params=""))
    assert surgery("compile", "a.surg", ref).code == 0
    first = tree("out")
    assert surgery("compile", "a.surg", ref).code == 0
    assert tree("out") == first
    write("b.surg", SPEC.format(where="layers[*].attn.k", params=""))
    ran = surgery("compile", "b.surg", ref)
    assert ran.code == 2 and ran.codes == ["S0803"] and tree("out") == first


@pytest.mark.parametrize(
    ("family", "text", "changes"),
    [
        ("bert", "prune ffn(ratio = 50%) on layers[*].ffn", {"intermediate_size": [64, 32]}),
        ("gpt2", "prune ffn(ratio = 25%) on layers[*].ffn", {"n_inner": [None, 96]}),
        ("llama", "prune kv_groups(keep = 1) on layers[*].attn", {"num_attention_heads": [4, 2], "num_key_value_heads": [2, 1]}),
        ("llama", "prune heads(keep = 2) on layers[*].attn", {"num_attention_heads": [4, 2]}),
        ("llama", "prune layers(count = 1, score = magnitude) on layers", {"num_hidden_layers": [3, 2]}),
        ("mixtral", "prune experts(keep = 2) on layers[*].ffn", {"num_local_experts": [4, 2]}),
        ("qwen3", "prune ffn(keep = 40) on layers[*].ffn", {"intermediate_size": [64, 40]}),
        ("t5", "prune ffn(keep = 40) on encoder.layers[*].ffn, decoder.layers[*].ffn", {"d_ff": [64, 40]}),
        ("bart", "prune ffn(keep = 40) on decoder.layers[*].ffn", {"decoder_ffn_dim": [64, 40]}),
        ("bart", "prune layers(count = 1, score = magnitude) on decoder.layers", {"decoder_layers": [3, 2]}),
        ("vit", "prune ffn(keep = 40) on layers[*].ffn", {"intermediate_size": [64, 40]}),
        ("llama", "convert moe(experts = 4, top_k = 2) on layers[*].ffn", {"num_local_experts": None}),
        # read by the class, though the config does not declare it
        ("phi3", "prune kv_groups(keep = 1) on layers[*].attn", {"num_key_value_heads": [2, 1], "head_dim": [None, 8]}),
        ("vit", "prune heads(keep = 2) on layers[*].attn", {"num_attention_heads": [4, 2], "head_dim": [None, 8]}),
        ("wav2vec2-conformer", "prune ffn(keep = 40) on layers[*].ffn[*]", {"intermediate_size": [64, 40]}),
        (
            "convnext",
            "prune width(ratio = 25%)\nprune ffn(ratio = 25%) on stages[*].layers[*].ffn",
            {"hidden_sizes": [[8, 16], [6, 12]]},
        ),
    ],
)  # fmt: skip
def test_sizes_that_the_config_can_say(
    family: str, text: str, changes: dict[str, list[int] | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = compiled(family, f'surg 1\n{text}\nemit transformers to "out"\n')
    claim = next(c for c in result.certificates if c["claim"] == "from_pretrained = program")
    assert claim["ok"] and claim["max_abs_error"] <= 1e-5
    config, record = json.loads(Path("out/config.json").read_text()), json.loads(Path("out/surgery-export.json").read_text())
    for name, pair in changes.items():
        if pair is None:
            assert config["model_type"] == "mixtral" and config[name] == 4
        else:
            assert config[name] == pair[1] and record["changes"][name] == pair
    cls = getattr(transformers, config["architectures"][0])
    loaded = cls.from_pretrained("out", dtype=torch.float32)
    assert sum(p.numel() for p in loaded.parameters()) == result.plan.totals.params_after


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("bert", "prune heads(keep = 2) on layers[*].attn"),
        ("llama", "prune ffn(ratio = 50%) on layers[0].ffn"),
        ("llama", "share layers(groups = 1) on layers[*]"),
        ("llama", "skip bypass on layers[1].attn"),
    ],
)
def test_what_no_config_can_say_names_the_statement(family: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SurgeryError) as caught:
        compiled(family, f'surg 1\n{text}\nemit transformers to "out"\n')
    (found,) = caught.value.diagnostics
    assert found.code == "S0862" and any(label.span.text.startswith(text.split("(")[0].split(" on ")[0]) for label in found.labels[1:])
    assert not Path("out").exists()


LAYERED = dict(
    vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64,
    num_key_value_heads=2, head_dim=8, pad_token_id=0,
)  # fmt: skip


def written(family: str, architecture: str, **config: object) -> str:
    """A tiny config whose family says some sizes layer by layer."""
    Path(f"{family}.json").write_text(
        json.dumps({"model_type": family, "architectures": [architecture], **LAYERED, **config}), encoding="utf-8"
    )
    return f"config:{family}.json"


def test_a_list_by_layer_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Laguna's config lists the heads of each layer; a layer that goes takes its entry with it."""
    monkeypatch.chdir(tmp_path)
    model = written("laguna", "LagunaForCausalLM", num_attention_heads_per_layer=[4] * 3, mlp_layer_types=["dense"] * 3)
    text = 'surg 1\nprune heads(keep = 2) on layers[1..2].attn\n{}emit transformers to "{}"\n'
    for more, out, heads in (("", "three", [4, 2, 2]), ("prune layers(count = 1, score = random) on layers[1..2]\n", "two", [4, 2])):
        result = api.compile(text.format(more, out), model)
        config = json.loads(Path(out, "config.json").read_text())
        assert config["num_attention_heads_per_layer"] == heads and config["num_hidden_layers"] == len(heads)
        loaded = transformers.LagunaForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert [layer.self_attn.q_proj.out_features for layer in loaded.model.layers] == [8 * h for h in heads]
        assert next(c for c in result.certificates if c["claim"] == "from_pretrained = program")["ok"]


def test_heads_of_two_sizes_by_layer_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gemma 4's layers with full attention have larger heads, which its config says in `per_layer_config`; so may its kv heads be."""
    monkeypatch.chdir(tmp_path)
    model = written(
        "gemma4_text", "Gemma4ForCausalLM", global_head_dim=16, vocab_size_per_layer_input=99, hidden_size_per_layer_input=8,
        num_kv_shared_layers=0, sliding_window=8, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )  # fmt: skip
    result = api.compile('surg 1\nprune ffn(keep = 40) on layers[*].ffn\nemit transformers to "out"\n', model)
    config = json.loads(Path("out/config.json").read_text())
    assert config["intermediate_size"] == 40 and config["per_layer_config"] == {"2": {"head_dim": 16}}
    assert next(c for c in result.certificates if c["claim"] == "from_pretrained = program")["ok"]


def test_one_number_for_all_layers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SurgeryError) as caught:
        compiled("llama", 'surg 1\nprune ffn(keep = 40) on layers[0].ffn\nemit transformers to "out"\n')
    (found,) = caught.value.diagnostics
    assert found.code == "S0862" and "LlamaForCausalLM reads `intermediate_size` once for all layers" in found.notes
