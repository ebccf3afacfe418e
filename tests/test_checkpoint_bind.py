"""Stored tensors to parameters: against transformers' own loader, bit for bit, and every misfit with its diagnostic."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import core_model_loading as hf

from surgery.core.diagnostics import SurgeryError
from surgery.model.checkpoint import Checkpoint, open_checkpoint
from surgery.model.checkpoint_bind import bind
from surgery.model.checkpoint_config import meta_model
from surgery.model.checkpoint_convert import Lazy, Unsupported
from surgery.model.realise import Realiser, check_twins, realise
from surgery.model.weights import Concat, Init, Load, Weights, loads

transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 8}
DEEPSEEK = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
}  # fmt: skip
WAV = {"conv_dim": [8, 8], "conv_kernel": [3, 3], "conv_stride": [2, 2], "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("BertConfig", SMALL),
    "GPT2LMHeadModel": ("GPT2Config", GPT2),
    "LlamaForCausalLM": ("LlamaConfig", SMALL),
    "MixtralForCausalLM": ("MixtralConfig", {**SMALL, "num_local_experts": 4}),
    "Qwen2MoeForCausalLM": (
        "Qwen2MoeConfig",
        {**SMALL, "num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", {**SMALL, **DEEPSEEK}),
    "T5ForConditionalGeneration": ("T5Config", T5),
    "CLIPModel": ("CLIPConfig", {"text_config": SMALL, "vision_config": VISION, "projection_dim": 16}),
    "ViTForImageClassification": ("ViTConfig", VISION),
    "ResNetForImageClassification": ("ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "Wav2Vec2Model": ("Wav2Vec2Config", {**SMALL, **WAV}),
}


def make(name: str, **more: Any) -> Any:
    config, values = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**{**values, **more}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def bound(checkpoint: Checkpoint, dtype: str | None = None) -> tuple[Weights, dict[str, str]]:
    model = meta_model(checkpoint)
    ties = dict(model.all_tied_weights_keys)
    wanted = {
        k: (tuple(v.shape), (dtype or checkpoint.dtype) if v.is_floating_point() else str(v.dtype)[6:])
        for k, v in model.state_dict().items()
        if k not in ties
    }
    return bind(checkpoint, wanted, ties, model=model), ties


def assert_loads_like_transformers(path: Path, strict: bool = True) -> Weights:
    checkpoint = open_checkpoint(str(path))
    weights, ties = bound(checkpoint)
    check_twins(weights)
    reference = getattr(transformers, checkpoint.architecture).from_pretrained(path).state_dict()
    assert set(weights) | set(ties) == set(reference)
    for name, value in Realiser(weights).items():
        assert torch.equal(value, reference[name]), name
    return weights


@pytest.mark.parametrize("original", [True, False], ids=["original", "own"])
@pytest.mark.parametrize("name", MODELS)
def test_loads_like_transformers(tmp_path: Path, name: str, original: bool) -> None:
    make(name).save_pretrained(tmp_path, save_original_format=original)
    weights = assert_loads_like_transformers(tmp_path)
    if name == "MixtralForCausalLM" and original:
        fused = weights["model.layers.0.mlp.experts.gate_up_proj"]
        assert isinstance(fused, Concat)
        assert len(loads(fused)) == 8


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "BertForMaskedLM"])
def test_sharded(tmp_path: Path, name: str) -> None:
    make(name).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(open_checkpoint(str(tmp_path)).files) > 1
    assert_loads_like_transformers(tmp_path)


def test_half_precision_is_kept_and_cast_on_request(tmp_path: Path) -> None:
    make("LlamaForCausalLM").to(torch.bfloat16).save_pretrained(tmp_path)
    weights = assert_loads_like_transformers(tmp_path)
    assert {e.dtype for e in weights.values()} == {"bfloat16"}
    wide, _ = bound(open_checkpoint(str(tmp_path)), "float32")
    assert all(torch.equal(realise(e), realise(weights[n]).float()) for n, e in wide.items())


def test_the_dtype_of_a_capture_stands_for_the_checkpoints_own(tmp_path: Path) -> None:
    make("LlamaForCausalLM").half().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    model = meta_model(checkpoint)
    wanted = {k: (tuple(v.shape), "float32" if "norm" in k else "bfloat16") for k, v in model.state_dict().items()}
    weights = bind(checkpoint, wanted, model=model, own_dtype="bfloat16")
    assert {k: e.dtype for k, e in weights.items()} == {k: "float32" if "norm" in k else "float16" for k in wanted}
    assert checkpoint.dtype == "float16"


def test_mixed_dtypes_are_cast_without_a_word(tmp_path: Path) -> None:
    make("LlamaForCausalLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].half()
    save_file(tensors, tmp_path / "model.safetensors")
    weights, _ = bound(open_checkpoint(str(tmp_path)))
    assert (weights["model.norm.weight"].dtype, weights.notes) == ("float32", [])


# ---------------------------------------------------------------- names


def rewrite(path: Path, rename: Any, architecture: str | None = None) -> None:
    """Save the tensors of ``path`` under other names (None drops one)."""
    tensors = {}
    for name, value in load_file(path / "model.safetensors").items():
        new = rename(name)
        if new is not None:
            tensors[new] = value
    save_file(tensors, path / "model.safetensors")
    if architecture:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))


def test_headed_checkpoint_in_a_base_model_notes_what_it_drops(tmp_path: Path) -> None:
    make("BertForMaskedLM").save_pretrained(tmp_path)
    model = transformers.BertModel(transformers.BertConfig(**MODELS["BertForMaskedLM"][1]))
    extra = {f"bert.{k}": v for k, v in model.state_dict().items() if k.startswith("pooler")}
    save_file({**load_file(tmp_path / "model.safetensors"), **extra}, tmp_path / "model.safetensors")
    rewrite(tmp_path, lambda n: n, "BertModel")
    weights = assert_loads_like_transformers(tmp_path)
    assert [n.code for n in weights.notes] == ["S0720"]
    assert weights.notes[0].message.startswith("BertModel has no place for 5 tensors of the checkpoint's heads: `cls.predictions.bias`")


def test_base_checkpoint_in_a_headed_model_names_the_head(tmp_path: Path) -> None:
    make("BertForMaskedLM").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda n: n.removeprefix("bert.") if n.startswith("bert.") else None)
    found = refused(tmp_path)
    assert [d.code for d in found.diagnostics] == ["S0715"]
    assert found.diagnostics[0].message == (
        "the checkpoint has no weights for 4 tensors of the head of BertForMaskedLM: `cls.predictions.bias`, "
        "`cls.predictions.transform.dense.weight`, `cls.predictions.transform.dense.bias`, `cls.predictions.transform.LayerNorm.weight` and 1 more"
    ).replace("4 tensors", "5 tensors")


def test_legacy_norm_names(tmp_path: Path) -> None:
    make("BertForMaskedLM").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))
    assert "bert.embeddings.LayerNorm.gamma" in open_checkpoint(str(tmp_path)).tensors
    assert_loads_like_transformers(tmp_path)


def test_weight_norm_names(tmp_path: Path) -> None:
    make("Wav2Vec2Model").save_pretrained(tmp_path)
    rewrite(
        tmp_path,
        lambda n: n.replace(".parametrizations.weight.original0", ".weight_g").replace(".parametrizations.weight.original1", ".weight_v"),
    )
    assert any(n.endswith("weight_g") for n in open_checkpoint(str(tmp_path)).tensors)
    assert_loads_like_transformers(tmp_path)


def test_buffers_that_old_checkpoints_stored_are_passed_over(tmp_path: Path) -> None:
    make("LlamaForCausalLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(tensors, tmp_path / "model.safetensors")
    assert assert_loads_like_transformers(tmp_path).notes == []


@pytest.mark.parametrize("kept", ["shared.weight", "lm_head.weight", "encoder.embed_tokens.weight"])
def test_a_tied_tensor_may_be_stored_under_any_of_its_names(tmp_path: Path, kept: str) -> None:
    make("T5ForConditionalGeneration").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda n: kept if n == "shared.weight" else n)
    weights, _ = bound(open_checkpoint(str(tmp_path)))
    stored = load_file(tmp_path / "model.safetensors")[kept]
    assert torch.equal(realise(weights["shared.weight"]), stored)


def test_tied_names_that_are_stored_with_different_values_are_refused(tmp_path: Path) -> None:
    make("GPT2LMHeadModel").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    weights, _ = bound(open_checkpoint(str(tmp_path)))
    assert len(weights.twins) == 1
    check_twins(weights)
    tensors["lm_head.weight"][3, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    weights, _ = bound(open_checkpoint(str(tmp_path)))
    with pytest.raises(SurgeryError) as caught:
        check_twins(weights)
    assert caught.value.diagnostics[0].code == "S0726"


# ---------------------------------------------------------------- misfits


def refused(path: Path) -> SurgeryError:
    with pytest.raises(SurgeryError) as caught:
        bound(open_checkpoint(str(path)))
    return caught.value


def test_all_misfits_are_reported_together_before_any_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("LlamaForCausalLM").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.o_proj.weight"]
    tensors["model.layers.1.self_attn.out_proj.weight"] = torch.ones(32, 32)
    tensors["model.norm.weight"] = torch.ones(31)
    tensors["model.layers.0.input_layernorm.weight"] = torch.ones(32, dtype=torch.int8)
    save_file(tensors, tmp_path / "model.safetensors")
    monkeypatch.setattr("surgery.model.stored._read_into", lambda *a: pytest.fail("a weight was read"))
    found = {d.code: d for d in refused(tmp_path).diagnostics}
    assert {c: d.message for c, d in found.items()} == {
        "S0714": "1 of 21 tensors of LlamaForCausalLM is not in the checkpoint: `model.layers.1.self_attn.o_proj.weight`",
        "S0716": "1 tensor of the checkpoint has no place in LlamaForCausalLM: `model.layers.1.self_attn.out_proj.weight`",
        "S0717": "`model.norm.weight` is 31 in the checkpoint but 32 in the model",
        "S0718": "`model.layers.0.input_layernorm.weight` is stored as int8 but the model needs a floating-point tensor",
    }
    assert found["S0714"].notes == ("the checkpoint has `model.layers.1.self_attn.out_proj.weight`",)


def test_an_expert_that_is_missing_shows_in_the_fused_shape(tmp_path: Path) -> None:
    make("MixtralForCausalLM").save_pretrained(tmp_path)
    rewrite(tmp_path, lambda n: None if ".experts.3." in n and "layers.1" in n else n)
    found = refused(tmp_path).diagnostics
    assert [d.code for d in found] == ["S0717", "S0717"]
    assert found[0].message == "`model.layers.1.mlp.experts.gate_up_proj` is 3x96x32 in the checkpoint but 4x96x32 in the model"
    rewrite(tmp_path, lambda n: None if n.endswith("layers.1.block_sparse_moe.experts.2.w1.weight") else n)
    assert "S0719" in {d.code for d in refused(tmp_path).diagnostics}


def test_a_conversion_without_expression_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("MixtralForCausalLM").save_pretrained(tmp_path)

    def convert(self: Any, input_dict: Any, **more: Any) -> Any:
        return {k: [torch.cumsum(t, 0) for t in v] for k, v in input_dict.items()}

    monkeypatch.setattr(hf.MergeModulelist, "convert", convert)
    found = refused(tmp_path).diagnostics[0]
    assert found.code == "S0719"
    assert "MergeModulelist then Concatenate uses aten.cumsum, which has no expression" in found.message


# ---------------------------------------------------------------- operations


class Config:
    num_attention_heads = 2


def run_op(op: Any, inputs: dict[str, Any], targets: list[str]) -> dict[str, Any]:
    shaped = {k: list(v) if isinstance(v, list) else v for k, v in inputs.items()}
    return dict(op.convert(shaped, source_patterns=list(inputs), target_patterns=targets, config=Config(), full_layer_name="t"))


OPS: dict[str, tuple[Any, dict[str, list[tuple[int, ...]]], list[str]]] = {
    "merge": (hf.MergeModulelist(0), {"a": [(2, 3)] * 3}, ["t"]),
    "merge last": (hf.MergeModulelist(-1), {"a": [(2, 3)] * 3}, ["t"]),
    "split list": (hf.SplitModulelist(0), {"a": [(4, 2, 3)]}, ["t.*"]),
    "concatenate": (hf.Concatenate(1), {"a": [(2, 3)], "b": [(2, 4)]}, ["t"]),
    "chunk": (hf.Chunk(0), {"a": [(6, 2)]}, ["q", "k", "v"]),
    "chunk uneven": (hf.Chunk(-1), {"a": [(2, 7)]}, ["q", "k"]),
    "transpose": (hf.Transpose(1, 2), {"a": [(2, 3, 4)]}, ["t"]),
    "interleave": (hf.Interleave(1), {"a": [(3, 6, 2)]}, ["t"]),
    "interleave back": (hf.Interleave(0, inverse=True), {"a": [(6, 2)]}, ["t"]),
    "rope": (hf.PermuteForRope(), {"a": [(8, 3)]}, ["t"]),
    "rope bias": (hf.PermuteForRope(inverse=True), {"a": [(8,)]}, ["t"]),
    "conv3d": (hf.Conv3dToLinear(3, (1, 2, 2)), {"a": [(4, 3, 1, 2, 2)]}, ["t"]),
    "to conv3d": (hf.LinearToConv3d(3, (1, 2, 2)), {"a": [(4, 12)]}, ["t"]),
    "ernie": (hf.ErnieFuseAndSplitTextVisionExperts(), {"a": [(2, 3)] * 4, "b": [(2, 3)] * 4}, ["x", "y"]),
    "ernie back": (hf.ErnieSplitAndDecoupleTextVisionExperts(), {"a": [(3, 4, 2)], "b": [(3, 4, 2)]}, ["x.*", "y.*"]),
}


@pytest.mark.parametrize("name", OPS)
def test_operations_give_the_same_values_on_expressions(tmp_path: Path, name: str) -> None:
    """Each conversion of transformers, run on tensors and on stand-ins that are realised afterwards."""
    op, shapes, targets = OPS[name]
    torch.manual_seed(0)
    real = {k: [torch.randn(s) for s in v] for k, v in shapes.items()}
    save_file({f"{k}.{i}": t for k, v in real.items() for i, t in enumerate(v)}, tmp_path / "x.safetensors")
    from surgery.model.checkpoint_headers import read_header

    stored = read_header(tmp_path / "x.safetensors").tensors
    lazy = {k: [Lazy(stored[f"{k}.{i}"].load()) for i in range(len(v))] for k, v in real.items()}
    expected, made = run_op(op, real, targets), run_op(op, lazy, targets)
    assert list(made) == list(expected)
    assert len(made) >= len(targets)
    for key, value in expected.items():
        assert torch.equal(realise(made[key].expr), value), key


def test_stand_ins_refuse_arithmetic_on_values() -> None:
    with pytest.raises(Unsupported):
        torch.exp(Lazy(Init((2,), "float32", "ones")))


# ---------------------------------------------------------------- random weights


def random_weights(tmp_path: Path, seed: int = 0) -> Weights:
    make("LlamaForCausalLM").config.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(f"config:{tmp_path}", seed=seed)
    model = meta_model(checkpoint)
    return bind(checkpoint, {k: (tuple(v.shape), "float32") for k, v in model.state_dict().items()}, model.all_tied_weights_keys)


def test_config_references_get_seeded_weights(tmp_path: Path) -> None:
    first, again, other = random_weights(tmp_path), random_weights(tmp_path), random_weights(tmp_path, seed=1)
    name = "layers.0.mlp.up_proj.weight"
    assert first == again
    assert not any(isinstance(e, Load) for e in first.values())
    value = realise(first[name])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(value, realise(again[name]))
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(value, realise(other[name]))
    assert not torch.equal(value, realise(first[name.replace("layers.0", "layers.1")]))
    assert abs(value.std().item() - 0.02) < 0.002
    assert torch.equal(realise(first["norm.weight"]), torch.ones(32))
