"""Dropped layers and bypassed branches: equal to what the model before computes without them, in every family."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import surgery
from surgery.core.diagnostics import SurgeryError
from surgery.core.site import Site
from surgery.core.source import NOWHERE
from surgery.model.live import Tensors, live_root
from surgery.model.program import Program
from surgery.model.realise import held
from surgery.model.runtime import build_module
from surgery.model.sample import sample_inputs
from surgery.passes import registry
from surgery.passes.kinds.drop_extract import Extraction, is_layer
from surgery.passes.kinds.drop_oracle import Bypassed
from surgery.passes.verify import verify
from tests.captured_programs import zoo_program
from tests.programs import LM, TEXT, emitted, ids, live, program_for
from tests.workbench import operation, run

TENSORS = Tensors(registry.function)


def floats(value: Any) -> list[Tensor]:
    value = value if isinstance(value, tuple | list) else (value,)
    return [t for t in value if isinstance(t, Tensor) and t.is_floating_point()]


def blocks(program: Program, kind: str) -> list[Site]:
    if kind == "layer":
        counts = {s.name: s.layers for s in program.anatomy.stacks}
        return [s for s in program.anatomy.sites if is_layer(s) and counts[s.stack] > 1]
    return [s for s in program.anatomy.sites if s.is_region and s.role == f"{s.stack}[{s.layer}].{kind}"]


def took(program: Program, sites: list[Site]) -> Extraction:
    out = Extraction(program, NOWHERE)
    out.run([s for s in sites if is_layer(s)], [s for s in sites if not is_layer(s)])
    return out


def parameters(program: Program) -> int:
    return sum(p.numel() for p in program.graph.parameters())


FAMILIES = ["bert", "gpt2", "llama", "gemma3_text", "mixtral", "t5", "bart", "vit", "swin", "clip", "resnet", "convnext"]
FIXED = {"encoder.layers[0]", "decoder.layers[0]"}


@pytest.mark.parametrize("kind", ["layer", "attn", "ffn", "cross"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_model_in_which_it_is_bypassed(family: str, kind: str) -> None:
    """The oracle runs the program before and replaces values as it runs; it shares nothing with the rewriting."""
    program, flat = zoo_program(family)
    before_all = floats(live_root(program, TENSORS, dtype=torch.float32).eval()(*flat))
    sites = blocks(program, kind)
    if not sites:
        pytest.skip("the family has none")
    for site in sites[1 % len(sites) :][:1] if kind != "layer" else (sites[1 % len(sites)], sites[-1]):
        before, changed = program.copy(), program.copy()
        try:
            out = took(changed, [site])
        except SurgeryError as exc:
            assert exc.diagnostics[0].code == "S0473" and family == "resnet", exc
            continue
        verify(changed, "the test")
        want = [t for i, t in enumerate(Bypassed(before, out.layers, out.branches).run(TENSORS, flat)) if i not in out.outputs]
        root = live_root(changed, TENSORS, dtype=torch.float32).eval()
        got = floats(root(*(t for i, t in enumerate(flat) if i not in out.inputs)))
        for x, y in zip(floats(want), got, strict=True):
            assert torch.allclose(x, y, atol=1e-5, rtol=1e-5)
        assert any(x.shape != y.shape or not torch.equal(x, y) for x, y in zip(before_all, got, strict=False))
        assert sum(out.removed.values()) == parameters(before) - parameters(changed) > 0
        stacks = {s.name: s.layers for s in changed.anatomy.stacks}
        for stack, count in stacks.items():  # roles are numbered without gaps, and paths are where they say
            layers = [s for s in changed.anatomy.sites if is_layer(s) and s.stack == stack]
            assert [s.layer for s in layers] == list(range(count))
            numbers = [s.path.rpartition(".")[2] for s in layers]
            assert not all(n.isdigit() for n in numbers) or numbers == [str(i) for i in range(count)]


@pytest.mark.parametrize("family", ["t5"])
def test_what_others_need_stays(family: str) -> None:
    program, _ = zoo_program(family)
    for role in sorted(FIXED):
        site = next(s for s in program.anatomy.sites if s.role == role)
        with pytest.raises(SurgeryError, match="needs something else that it computes"):
            took(program.copy(), [site])


# ------------------------------------------------------------------ the same by hand, on the live model


def deleted(model: nn.Module, path: str, gone: list[int]) -> nn.Module:
    """The live model without some elements of a list of modules, caches numbered anew, as one would do it by hand."""
    out = copy.deepcopy(model)
    layers = out.get_submodule(path)
    for i in sorted(gone, reverse=True):
        del layers[i]  # type: ignore[operator]
    for i, layer in enumerate(layers.children()):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i
    return out


@cache
def original(model: Any) -> Program:
    program = program_for(model)
    assert program.anatomy.stacks
    return program


def dropped(model: Any, roles: list[str]) -> Any:
    program = original(model).copy()
    took(program, [s for s in program.anatomy.sites if s.role in roles])
    verify(program, "the test")
    return program, build_module(program, TENSORS.all(program))


@cache
def causal(name: str) -> tuple[nn.Module, str, str]:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if name == "gpt2":
        config: Any = GPT2Config(vocab_size=99, n_embd=32, n_layer=4, n_head=4, n_positions=64, **LM)
        return live(GPT2LMHeadModel, config), "transformer.h", "n_layer"
    text = {**TEXT, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, **LM}
    if name == "llama":
        return live(LlamaForCausalLM, LlamaConfig(**text)), "model.layers", "num_hidden_layers"
    config = Gemma3TextConfig(**text, sliding_window=4, sliding_window_pattern=2, query_pre_attn_scalar=8)
    return live(Gemma3ForCausalLM, config), "model.layers", "num_hidden_layers"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("gone", [[0], [1, 2], [3]], ids=str)
def test_generates_as_the_live_model_without_these_layers(name: str, gone: list[int]) -> None:
    model, path, count = causal(name)
    program, module = dropped(model, [f"layers[{i}]" for i in gone])
    hand = deleted(model, path, gone)
    setattr(hand.config, count, 4 - len(gone))
    if "layer_types" in program.info.config:
        types = [t for i, t in enumerate(model.config.layer_types) if i not in gone]  # type: ignore[union-attr]
        hand.config.layer_types = types  # type: ignore[union-attr]
        assert program.info.config["layer_types"] == types
    assert program.info.config[count] == 4 - len(gone)
    tokens = ids(2, 7)
    with torch.no_grad():
        assert torch.equal(module(tokens).logits, hand(tokens).logits)
    again = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    want = hand.generate(tokens, **again)  # type: ignore[operator]
    assert torch.equal(module.generate(tokens, **again), want)
    assert torch.equal(module.generate(tokens, use_cache=False, **again), want)
    cache = module(tokens).past_key_values
    assert len(cache.layers) == 4 - len(gone)
    assert set(module.state_dict()) == set(hand.state_dict())  # numbered as the list of modules numbers them
    for key, value in hand.state_dict().items():
        assert torch.equal(module.state_dict()[key], value)


def test_generates_without_the_attention_of_a_layer() -> None:
    """The cache has one layer less; the live model's attention is replaced by one that adds nothing."""
    model, _, _ = causal("llama")
    program, module = dropped(model, ["layers[1].attn"])

    class Nothing(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
            return torch.zeros_like(hidden_states), None

    hand = copy.deepcopy(model)
    layers: Any = hand.get_submodule("model.layers")
    layers[1].self_attn = Nothing()
    for i, kept in enumerate([0, 2, 3]):
        layers[kept].self_attn.layer_idx = i
    tokens = ids(2, 7)
    again = {"max_new_tokens": 9, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(module.generate(tokens, **again), hand.generate(tokens, **again))  # type: ignore[operator]
    assert len(module(tokens).past_key_values.layers) == 3
    assert program.info.config["num_hidden_layers"] == 4 and program.anatomy.stacks[0].layers == 4


def test_a_layer_whose_branches_all_go_goes_whole() -> None:
    model, path, _ = causal("llama")
    program, module = dropped(model, ["layers[2].attn", "layers[2].ffn"])
    hand = deleted(model, path, [2])
    hand.config.num_hidden_layers = 3
    assert program.info.config["num_hidden_layers"] == 3
    assert set(module.state_dict()) == set(hand.state_dict())
    tokens = ids(2, 7)
    with torch.no_grad():
        assert torch.equal(module(tokens).logits, hand(tokens).logits)


def test_the_last_cache_stays() -> None:
    model, _, _ = causal("llama")
    program = original(model).copy()
    attn = [s for s in program.anatomy.sites if s.role.endswith(".attn")]
    with pytest.raises(SurgeryError, match="has no cache"):
        took(program, attn)


LIVE = {
    "bert": ("BertModel", dict(TEXT, num_hidden_layers=4), {"layers": ("encoder.layer", "num_hidden_layers", 4)}),
    "vit": (
        "ViTModel", dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4),
        {"layers": ("layers", "num_hidden_layers", 4)},
    ),
    "swin": (
        "SwinModel", dict(image_size=32, patch_size=2, embed_dim=8, depths=[2, 4], num_heads=[2, 4], window_size=4),
        {"stages[1].layers": ("encoder.layers.1.blocks", "depths", 4)},
    ),
    "bart": (
        "BartModel",
        dict(
            vocab_size=99, d_model=32, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, **{**LM, "decoder_start_token_id": 2},
        ),
        {"encoder.layers": ("encoder.layers", "encoder_layers", 4), "decoder.layers": ("decoder.layers", "decoder_layers", 4)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", list(LIVE))
def test_equals_the_live_model_without_these_layers(family: str) -> None:
    import transformers

    architecture, options, stacks = LIVE[family]
    config = transformers.AutoConfig.for_model(family, **options)
    model = live(getattr(transformers, architecture), config)
    for stack, (path, key, count) in stacks.items():
        program, module = dropped(model, [f"{stack}[1]", f"{stack}[2]"])
        hand = deleted(model, path, [1, 2])
        inputs: dict[str, Tensor]
        if family in ("vit", "swin"):
            inputs = {"pixel_values": torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))}
        elif family == "bart":
            inputs = {"input_ids": ids(2, 9), "decoder_input_ids": ids(2, 5, 1)}
        else:
            inputs = {"input_ids": ids(2, 9), "token_type_ids": torch.zeros(2, 9, dtype=torch.long)}
        with torch.no_grad():
            for a, b in zip(
                module(**inputs).to_tuple(), hand(**inputs, **({"use_cache": False} if len(stacks) > 1 else {})).to_tuple(), strict=True
            ):
                assert torch.allclose(a, b, atol=1e-5, rtol=1e-5)
        assert program.info.config[key] == ([2, 2] if family == "swin" else count - 2)
        others = {k: v for k, v in program.info.config.items() if k.endswith("layers") and k != key and isinstance(v, int)}
        assert all(v == getattr(config, k) for k, v in others.items() if k in ("encoder_layers", "decoder_layers", "num_decoder_layers"))


# ------------------------------------------------------------------ what stands on the layers


def test_adapters_move_up_with_their_layers(tmp_path: Path) -> None:
    """Trained adapters and inserted modules stay where they were; those of what goes go; the artifact opens and chains."""
    model, _, _ = causal("llama")
    program = original(model).copy()
    run(program, operation(program, "adapt", "lora", [f"layers[{i}].attn.{x}" for i in range(4) for x in "qo"], rank=2))
    run(
        program,
        operation(program, "insert", "bottleneck", [f"layers[{i}].{b}" for i in range(4) for b in ("attn", "ffn")], "after", width=4),
    )
    for i, name in enumerate(sorted({t for a in program.attachments for t in a.tensors})):
        value = torch.randn(program.weights[name].shape, generator=torch.Generator().manual_seed(i)) * 0.1
        program.weights[name] = held(value)
    before = program.copy()
    flat = sample_inputs(program, batch=2, length=6, seed=1)
    gone = [s for s in program.anatomy.sites if s.role in ("layers[1]", "layers[2].attn")]
    out = took(program, gone)
    verify(program, "the test")
    want = [t for i, t in enumerate(Bypassed(before, out.layers, out.branches).run(TENSORS, flat)) if i not in out.outputs]
    got = live_root(program, TENSORS, dtype=torch.float32).eval()(*(t for i, t in enumerate(flat) if i not in out.inputs))
    for x, y in zip(floats(want), floats(got), strict=True):
        assert torch.allclose(x, y, atol=1e-5, rtol=1e-5)
    roles = sorted(a.site.role for a in program.attachments if a.method.name == "lora")
    assert roles == ["layers[0].attn.o", "layers[0].attn.q", "layers[2].attn.o", "layers[2].attn.q"]
    assert {a.module.split(".")[2] for a in program.attachments} == {"0", "1", "2"}
    folder = emitted(program, tmp_path / "out")
    loaded: Any = surgery.load(folder)
    tokens = ids(2, 5)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, build_module(program, TENSORS.all(program))(tokens).logits)
    plan = surgery.plan("surg 1\n\nprune layers(count = 1, score = magnitude) on layers[1..2]\nfold all\n", str(folder))
    assert plan.totals is not None and plan.ok


# ------------------------------------------------------------------ what is refused


def test_refusals() -> None:
    program = original(causal("llama")[0])
    layers = [f"layers[{i}]" for i in range(4)]

    def refused(verb: str, name: str, roles: list[str], code: str, text: str, **params: Any) -> None:
        copied = program.copy()
        with pytest.raises(SurgeryError, match=text) as caught:
            run(copied, operation(copied, verb, name, roles, **params))
        assert caught.value.diagnostics[0].code == code
        assert list(copied.weights) == list(program.weights) and copied.signature == program.signature

    refused("skip", "bypass", layers, "S0477", "no layer would be left of `layers`")
    refused("skip", "bypass", ["layers[0].attn.q"], "S0475", "is no layer, attention or feed-forward block")
    refused("prune", "layers", ["layers[0].attn"], "S0475", "is no whole layer", count=1)
    refused("prune", "layers", layers, "S0273", "does not say how much")
    refused("prune", "layers", layers, "S0272", "both say how much", count=1, keep=2)
    refused("prune", "layers", layers, "S0476", "only 4 are selected", count=5, score="magnitude")
    refused("prune", "layers", layers, "S0476", "nothing would go", ratio=0.2, score="magnitude")
    refused("prune", "layers", layers, "S0477", "no layer would be left", count=4, score="random")
    refused("prune", "layers", layers, "S0274", "is computed from data", count=1)
    refused("prune", "layers", layers, "S0276", "names no file", count=1, score="file")
    refused("prune", "layers", ["layers[0]", "layers[2]"], "S0476", "no 2 layers in a row", count=2, score="random", contiguous=True)


# ------------------------------------------------------------------ scores


def test_block_influence_of_layers_and_branches(tmp_path: Path) -> None:
    """Against hooks on the live model: 1 - mean cos(x, y), of a layer from input to output, of a branch around its sum."""
    model, _, _ = causal("llama")
    folder = tmp_path / "model"
    model.save_pretrained(folder)  # type: ignore[operator]
    tokens = ids(6, 9)
    save_file({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, tmp_path / "calib.safetensors")
    into: list[Tensor] = []
    middle: list[Tensor] = []
    out: list[Tensor] = []
    hooks = []
    for layer in model.get_submodule("model.layers").children():
        hooks.append(layer.register_forward_pre_hook(lambda _, args: into.append(args[0])))
        norm = layer.get_submodule("post_attention_layernorm")
        hooks.append(norm.register_forward_pre_hook(lambda _, args: middle.append(args[0])))
        hooks.append(layer.register_forward_hook(lambda _, args, result: out.append(result[0] if isinstance(result, tuple) else result)))
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()

    def influence(a: list[Tensor], b: list[Tensor]) -> list[float]:
        return [1 - float(torch.cosine_similarity(x.double(), y.double(), dim=-1).mean()) for x, y in zip(a, b, strict=True)]

    layers, attn = influence(into, out), influence(into, middle)
    cosines = [torch.cosine_similarity(into[i][:, -1].double(), out[i + 1][:, -1].double(), dim=-1) for i in range(3)]
    angles = [float((c.arccos() / torch.pi).mean()) for c in cosines]

    def chosen(statement: str) -> list[str]:
        spec = f'surg 1\n\ndata text = tensors("calib.safetensors")\n{statement} using text\n'
        (tmp_path / "s.surg").write_text(spec, "utf-8")
        return [s.role for s in surgery.compile(tmp_path / "s.surg", str(folder), out=tmp_path).plan.steps[0].sites]

    lowest = min(range(4), key=layers.__getitem__)
    assert chosen("prune layers(count = 1) on layers") == [f"layers[{lowest}]"]
    ranked = sorted(range(4), key=attn.__getitem__)[:2]
    assert chosen("skip bypass(count = 2) on layers[*].attn") == [f"layers[{i}].attn" for i in sorted(ranked)]
    start = min(range(3), key=angles.__getitem__)
    assert chosen("prune layers(count = 2, score = angular) on layers") == [f"layers[{start}]", f"layers[{start + 1}]"]
    pairs = [layers[i] + layers[i + 1] for i in range(1, 3)]
    start = 1 + min(range(2), key=pairs.__getitem__)
    assert chosen("prune layers(count = 2, contiguous = true) on layers keep layers[0]") == [f"layers[{start}]", f"layers[{start + 1}]"]
