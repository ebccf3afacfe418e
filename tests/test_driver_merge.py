"""``merge`` from a spec to what is emitted: which tensors, which models, which layers, and what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery as api
from tests.driver_support import surgery, write
from tests.zoo import ZOO

HEAD = 'surg 1\nmodel "base" as base\ncheckpoint one = load("one")\ncheckpoint two = load("two")\n'


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three Llamas of one shape and one of another."""
    folder = tmp_path_factory.mktemp("merging")
    for seed, name in enumerate(("base", "one", "two")):
        ZOO["llama"].make_model(seed).save_pretrained(folder / name)
    import transformers

    wide = transformers.AutoConfig.for_model("llama", **{**ZOO["llama"].config, "vocab_size": 101})
    transformers.LlamaForCausalLM(wide).save_pretrained(folder / "wide")
    ZOO["gpt2"].make_model().save_pretrained(folder / "other")
    deep = transformers.AutoConfig.for_model("llama", **{**ZOO["llama"].config, "num_hidden_layers": 4})
    transformers.LlamaForCausalLM(deep).save_pretrained(folder / "deep")
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in load_file(folder / "model.safetensors").items()}


def emitted(models: Path, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, torch.Tensor]:
    monkeypatch.chdir(models)
    result = api.compile(HEAD + text + f'emit transformers to "{tmp_path}/out"\n')
    assert all(c["ok"] for c in result.certificates)
    return tensors(tmp_path / "out")


def close(a: torch.Tensor, b: torch.Tensor, within: float = 1e-6) -> bool:
    return float((a.double() - b.double()).abs().max()) <= within


def test_linear_and_task_arithmetic_of_checkpoints(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, one, two = (tensors(models / n) for n in ("base", "one", "two"))
    got = emitted(models, "merge linear of base * 1, one * 2, two * 1\n", monkeypatch, tmp_path)
    assert set(got) == set(base)
    assert all(close(got[n], base[n] / 4 + one[n] / 2 + two[n] / 4) for n in got)
    got = emitted(models, "merge task_arithmetic(scale = 0.5) of one * 1, two * -1\n", monkeypatch, tmp_path / "b")
    assert all(close(got[n], base[n] + 0.5 * (one[n] - two[n])) for n in got)


def test_parameters_may_differ_by_layer_and_parts_may_be_named(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, one, two = (tensors(models / n) for n in ("base", "one", "two"))
    got = emitted(models, "merge slerp(t = [0, 1, 0]) of one, two\n", monkeypatch, tmp_path)
    assert torch.equal(got["model.layers.0.mlp.up_proj.weight"], one["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(got["model.layers.1.mlp.up_proj.weight"], two["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(got["lm_head.weight"], one["lm_head.weight"])
    got = emitted(models, "merge linear of one on layers[1].ffn, layers[2].attn.q\n", monkeypatch, tmp_path / "b")
    changed = {n for n in got if not torch.equal(got[n], base[n])}
    assert changed == {"model.layers.1.mlp.gate_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.layers.2.self_attn.q_proj.weight"}  # fmt: skip
    assert all(torch.equal(got[n], one[n]) for n in changed)


def test_a_tied_checkpoint_in_a_model_that_is_not(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its one tensor counts for the embedding and for the head, and the plan says so."""
    import transformers

    torch.manual_seed(5)
    tied = transformers.AutoConfig.for_model("llama", **{**ZOO["llama"].config, "tie_word_embeddings": True})
    transformers.LlamaForCausalLM(tied).save_pretrained(tmp_path / "tied")
    text = f'checkpoint tied = load("{tmp_path}/tied")\nmerge linear of base, tied\n'
    got = emitted(models, text, monkeypatch, tmp_path)
    base, other = tensors(models / "base"), tensors(tmp_path / "tied")
    assert "lm_head.weight" not in other
    assert close(got["lm_head.weight"], (base["lm_head.weight"] + other["model.embed_tokens.weight"]) / 2)
    assert close(got["model.embed_tokens.weight"], (base["model.embed_tokens.weight"] + other["model.embed_tokens.weight"]) / 2)
    said = [f for step in api.plan(HEAD + text).steps for f in step.facts if "ties" in f]
    assert said == ["tied ties `lm_head.weight` to `model.embed_tokens.weight`, the model does not: its one tensor is merged into both"]


def test_ties_trims_over_the_whole_model(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, one, two = (tensors(models / n) for n in ("base", "one", "two"))
    got = emitted(models, "merge ties(density = 20%) of one, two\n", monkeypatch, tmp_path)
    names = [n for n in base]
    deltas = []
    for other in (one, two):
        flat = torch.cat([(other[n] - base[n]).flatten() for n in names])
        keep = torch.zeros_like(flat)
        order = torch.argsort(flat.abs(), descending=True, stable=True)[: int(0.2 * flat.numel())]
        keep[order] = flat[order]
        deltas.append(keep)
    total = deltas[0] + deltas[1]
    sign = torch.sign(total)
    sign[sign == 0] = torch.sign(sign.sum())
    agree = [(torch.sign(d) == sign) & (d != 0) for d in deltas]
    count = (agree[0].float() + agree[1].float()).clamp_min(1)
    mean = (deltas[0] * agree[0] + deltas[1] * agree[1]) / count
    at = 0
    for n in names:
        size = base[n].numel()
        assert close(got[n], base[n] + mean[at : at + size].reshape(base[n].shape)), n
        at += size


def test_a_merged_model_takes_adapters_and_plans_without_weights(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(models)
    text = (
        HEAD
        + "merge dare_ties(density = 30%, seed = 3) of one * 1, two * 0.5\nadapt lora(rank = 2) on layers[*].attn.q\nexpect trainable == 384\n"
    )
    plan = api.plan(text)
    assert plan.ok and [s.verb for s in plan.steps] == ["merge", "adapt"]
    first = api.compile(text + f'emit torch to "{tmp_path}/a"\n')
    second = api.compile(text + f'emit torch to "{tmp_path}/b"\n')
    a, b = dict(first.module.named_parameters()), dict(second.module.named_parameters())
    assert all(torch.equal(a[n], b[n]) for n in a)
    write(tmp_path / "again.surg", f'surg 1\nmodel "{tmp_path}/a"\nfold all on layers[*].**\nemit onnx to "{tmp_path}/c.onnx"\n')
    assert surgery("compile", tmp_path / "again.surg").code == 0


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('checkpoint wide = load("wide")\nmerge linear of base, wide\n', "S0778"),
        ('checkpoint other = load("other")\nmerge linear of base, other\n', "S0774"),
        ('checkpoint deep = load("deep")\nmerge linear of base, deep\n', "S0797"),
        ("merge linear of one * 1, two * -1\n", "S0775"),
        ("merge slerp of one\n", "S0776"),
        ("merge model_stock of one * 2, two\n", "S0775"),
        ("merge slerp of one * 2, two\n", "S0775"),
        ("merge della(density = 10%, epsilon = 20%) of one\n", "S0250"),
        ("merge ties(density = 0%) of one\n", "S0250"),
        ("merge dare(density = {0..: 0%}) of one\n", "S0250"),
        ("merge ties(density = {0: 20%, 1..: 80%}) of one\n", "S0250"),  # a global trim has one
        ("merge slerp(t = {0..9: 1}) of one, two\n", "S0303"),
    ],
)  # fmt: skip
def test_what_does_not_fit(models: Path, monkeypatch: pytest.MonkeyPatch, text: str, code: str) -> None:
    monkeypatch.chdir(models)
    found = [d.code for d in api.plan(HEAD + text).diagnostics]
    assert found == [code]


def test_a_deeper_checkpoint_lends_the_parts_that_are_named(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, deep = tensors(models / "base"), tensors(models / "deep")
    text = 'checkpoint deep = load("deep")\nmerge linear of base, deep on layers[0].ffn\n'
    got = emitted(models, text, monkeypatch, tmp_path)
    changed = {n for n in got if not torch.equal(got[n], base[n])}
    assert changed == {f"model.layers.0.mlp.{p}_proj.weight" for p in ("up", "gate", "down")}
    assert all(torch.equal(got[n], (base[n] + deep[n]) / 2) for n in changed)


def test_a_checkpoint_that_is_not_there(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    text = 'surg 1\nmodel "base" as base\ncheckpoint gone = load("nowhere")\nmerge linear of base, gone\n'
    ran = surgery("plan", write("gone.surg", text))
    assert ran.code != 0 and ran.codes == ["S0701"]


# ------------------------------------------------------------------ factors by layer, other types, other vocabularies


def test_factors_may_differ_by_layer(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One list, table or ramp for each model; what is outside of the layers takes the first layer's."""
    one, two = (tensors(models / n) for n in ("one", "two"))
    got = emitted(models, "merge linear(weights = [ramp(1, 0), {0: 0, 1: 0.5, 2: 1}]) of one, two\n", monkeypatch, tmp_path)
    for layer, (a, b) in enumerate(((1, 0), (0.5, 0.5), (0, 1))):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert close(got[name], a * one[name] + b * two[name]), layer
    assert torch.equal(got["lm_head.weight"], one["lm_head.weight"])
    text = (
        "merge slerp(t = [0, 1]) of one, two on layers[1..2].ffn\nmerge linear(weights = [[3, 1], 1]) of one, two on layers[0..1].attn.q\n"
    )
    got = emitted(models, text, monkeypatch, tmp_path / "b")
    assert torch.equal(got["model.layers.1.mlp.up_proj.weight"], one["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(got["model.layers.2.mlp.up_proj.weight"], two["model.layers.2.mlp.up_proj.weight"])
    q = "model.layers.0.self_attn.q_proj.weight"
    assert close(got[q], 0.75 * one[q] + 0.25 * two[q])
    for wrong, code in (
        ("merge linear(weights = [1]) of one, two\n", "S0775"),
        ("merge linear(weights = [1, [1, -1, 1]]) of one, one * 2\n", "S0775"),
        ("merge linear(weights = [1, [-1, 0, 0]]) of one, two\n", "S0775"),
        ("merge linear(weights = [1, [1, 2]]) of one, two\n", "S0307"),
        ("merge linear(weights = [1, cosine]) of one, two\n", "S0220"),
    ):
        try:
            found = [d.code for d in api.plan(HEAD + wrong).diagnostics if d.is_error]
        except api.SurgeryError as exc:
            found = [d.code for d in exc.diagnostics]
        assert found == [code], wrong


def test_other_types_are_computed_in_float32_and_said(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(models)
    base, one = ({k: v.bfloat16() for k, v in tensors(models / "base").items()}, tensors(models / "one"))
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(models / "base", tmp_path / "half")
    save_file(base, tmp_path / "half/model.safetensors", {"format": "pt"})
    text = f'surg 1\nmodel "{tmp_path}/half" as base\ncheckpoint one = load("one")\nmerge linear of base, one\n'
    plan = api.plan(text)
    assert any("types differ: one has 30 tensors of float32; computed in float32, stored as bfloat16" in f for f in plan.steps[0].facts)
    api.compile(text + f'emit transformers to "{tmp_path}/out"\n')
    got = tensors(tmp_path / "out")
    # rounded once: the wider checkpoint is not rounded before it is added
    assert all(torch.equal(got[n], (0.5 * base[n].float() + 0.5 * one[n]).bfloat16()) for n in got)


def test_a_larger_vocabulary_is_merged_where_it_is_the_same(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, wide = tensors(models / "base"), tensors(models / "wide")
    text = 'checkpoint wide = load("wide")\nmerge linear(vocab = common) of base, wide\n'
    got = emitted(models, text, monkeypatch, tmp_path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert close(got[name], (base[name] + wide[name][:99]) / 2)
    monkeypatch.chdir(models)
    text = 'surg 1\nmodel "wide" as wide\ncheckpoint base = load("base")\nmerge linear(vocab = common) of wide, base\n'
    plan = api.compile(text + f'emit transformers to "{tmp_path}/b"\n').plan
    got = tensors(tmp_path / "b")
    assert torch.equal(got["lm_head.weight"][99:], wide["lm_head.weight"][99:])
    assert close(got["lm_head.weight"][:99], (base["lm_head.weight"] + wide["lm_head.weight"][:99]) / 2)
    assert "lm_head.weight: the first 99 of 101 rows are merged, the others stay the model's" in plan.steps[0].facts


@pytest.mark.parametrize("method", ["linear", "ties(trim = tensor)", "ties", "model_stock", "weight_matching"])
def test_nan_is_named_and_nothing_is_written(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str) -> None:
    import shutil

    from safetensors.torch import save_file

    shutil.copytree(models / "two", tmp_path / "bad")
    values = tensors(tmp_path / "bad")
    values["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(values, tmp_path / "bad/model.safetensors", {"format": "pt"})
    monkeypatch.chdir(models)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/kept.txt").write_text("before")
    text = f'checkpoint bad = load("{tmp_path}/bad")\nmerge {method} of one, bad\nemit transformers to "{tmp_path}/out"\n'
    with pytest.raises(api.SurgeryError) as caught:
        api.compile(HEAD + text, force=True)
    first = caught.value.diagnostics[0]
    assert (first.code, first.message) == ("S0798", "`model.layers.1.mlp.up_proj.weight` of bad is not finite")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["kept.txt"] and not list(tmp_path.glob(".out*"))


def test_a_sum_that_the_type_cannot_hold() -> None:
    from surgery.passes import registry

    big = torch.full((3, 4), 60000.0).half()
    with pytest.raises(api.SurgeryError) as caught:
        registry.function("merge/linear:merged")(
            big, big, weights=(1.0, 1.0), seed=0, normalize=False, dtype="float16", tensor="w", of=("one", "two")
        )
    assert caught.value.diagnostics[0].message == "merging `w` gives values that float16 cannot hold"


def test_a_config_that_uses_the_weights_otherwise_is_said(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(models)
    shutil.copytree(models / "one", tmp_path / "turned")
    config = json.loads((tmp_path / "turned/config.json").read_text())
    config["rms_norm_eps"], config["rope_parameters"]["rope_theta"], config["bos_token_id"] = 0.25, 99.0, 7
    (tmp_path / "turned/config.json").write_text(json.dumps(config))
    text = f'checkpoint turned = load("{tmp_path}/turned")\n'
    plan = api.plan(HEAD + text + "merge linear of base, turned, two\n")
    (told,) = [f for f in plan.steps[-1].facts if "config" in f]
    assert "of turned" in told and "`rms_norm_eps` is 0.25 there" in told and "rope_theta" in told and "bos" not in told
    found = api.plan(HEAD + text + "merge stack of base, turned\n").diagnostics
    assert [d.code for d in found] == ["S0799"] and "rope_parameters" in found[0].message
