"""Experts in every layout: two dimensions, one by one, behind other routers; what a loop over them means, and what peft reaches of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeSparseMLP

import surgery
from surgery.model.capture import capture_module, materialise
from surgery.opening import open_program
from tests.caching import capture_cache
from tests.test_capture_families import CASES, LLAMA4, LM

PHIMOE = dict(
    LM, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, intermediate_size=16, num_local_experts=4,
    num_experts_per_tok=2, max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", str(capture_cache(tmp_path_factory)))
        yield


def test_experts_in_two_dimensions(tmp_path: Path) -> None:
    """DBRX stores its experts as ``[experts * units, width]``: here they are ``[experts, units, width]``, and a plain checkpoint has them as the class does."""
    live: Any = CASES["dbrx"].entry.make_model()
    with torch.no_grad():
        for tensor in live.parameters():
            tensor.mul_(6.0)  # so that experts matter to the outputs
    live.save_pretrained(tmp_path / "base")
    text = (
        'surg 1\nprune experts(keep = 3) on layers[0].ffn\nprune ffn(ratio = 25%) on layers[0].ffn.experts\nemit transformers to "plain"\n'
    )
    result = surgery.compile(text, str(tmp_path / "base"), out=tmp_path)
    claims = {c["claim"]: c for c in result.certificates}
    assert all(c["ok"] for c in result.certificates) and "from_pretrained = program" in claims
    loaded: Any = transformers.DbrxForCausalLM.from_pretrained(tmp_path / "plain")
    assert loaded.config.ffn_config.moe_num_experts == 3 and loaded.config.ffn_config.ffn_hidden_size == 18
    prefix = "transformer.blocks.0.ffn.experts.mlp."
    old, own, new = (dict(m.named_parameters()) for m in (live, result.module, loaded))
    for name in ("w1", "v1", "w2"):
        whole = own[prefix + name]
        assert whole.shape == (3, 18, 16) and torch.equal(new[prefix + name], whole.flatten(0, 1))
        rows = {tuple(r.tolist()) for r in old[prefix + name]}
        assert all(tuple(r.tolist()) in rows for r in new[prefix + name])
    # the experts that stay are those whose rows of the router stay
    kept = [
        int((old["transformer.blocks.0.ffn.router.layer.weight"] == row).all(1).nonzero())
        for row in new["transformer.blocks.0.ffn.router.layer.weight"]
    ]
    whole_old = old[prefix + "w2"].view(4, 24, 16)
    assert all({tuple(r.tolist()) for r in own[prefix + "w2"][i]} <= {tuple(r.tolist()) for r in whole_old[e]} for i, e in enumerate(kept))


class Residual(nn.Module):
    """One feed-forward block of DBRX on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.ffn = nn.LayerNorm(16), CASES["dbrx"].entry.make_model().transformer.blocks[0].ffn  # type: ignore[union-attr,operator]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.ffn(self.norm(x))
        return out


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Residual()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_adapters_on_experts_in_two_dimensions_fold_and_are_exported(tmp_path: Path) -> None:
    model, x = Layers().eval(), torch.randn(2, 9, 16)
    text = 'surg 1\nprune experts(keep = 3) on layers[0].ffn\nadapt lora(rank = 2) on layers[0].ffn.experts.{up, gate, down}\nemit torch to "here"\n'
    result = surgery.compile(text, model, inputs={"x": x}, out=tmp_path)
    module = surgery.load(tmp_path / "here").eval()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 3 * 3 * 2 * (16 + 24) and all(c["ok"] for c in result.certificates)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        before = module(x)
        for tensor in trained.values():
            tensor.copy_(0.3 * torch.randn(tensor.shape, generator=generator))
        moved = module(x)
    surgery.save(module, tmp_path / "trained")
    folded = surgery.compile('surg 1\nfold all\nemit onnx to "m.onnx"\n', str(tmp_path / "trained"), out=tmp_path)
    with torch.no_grad():
        again = folded.module.eval()(x)
    assert float((again - moved).abs().max()) <= 1e-5 < 1e-3 < float((moved - before).abs().max())
    claims = [c for c in folded.certificates if c["claim"] == "torch = onnx"]
    assert claims and all(c["ok"] for c in folded.certificates)
    assert {tuple(p.shape) for n, p in folded.module.named_parameters() if "experts" in n} == {(3, 24, 16)}


@pytest.mark.parametrize(("family", "why"), [("dbrx", "in two dimensions"), ("switch_transformers", "one by one")])
def test_peft_does_not_reach_such_experts(family: str, why: str, tmp_path: Path) -> None:
    """Which the plan says; an adapter on attention goes into a folder that peft loads onto them."""
    case = CASES[family]
    case.entry.make_model().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    where = "layers" if family == "dbrx" else "encoder.layers"
    plan = surgery.plan(f'surg 1\nadapt lora(rank = 2) on {where}[0].ffn.experts.up\nemit peft to "p"\n', str(tmp_path / "base"))
    assert not plan.ok and [d.code for d in plan.diagnostics] == ["S0793"] and why in plan.diagnostics[0].message
    result = surgery.compile(f'surg 1\nadapt lora(rank = 2) on {where}[0].attn.q\nemit peft to "p"\n', str(tmp_path / "base"), out=tmp_path)
    (claim,) = [c for c in result.certificates if c["claim"] == "peft = program"]
    assert claim["ok"]


@pytest.mark.parametrize(
    ("family", "architecture", "config", "role"),
    [
        ("llama4_text", "Llama4ForCausalLM", LLAMA4 | {"num_local_experts": 4}, "layers[0].ffn[0].router"),
        ("phimoe", "PhimoeForCausalLM", PHIMOE, "layers[0].ffn.router"),
    ],
)
def test_routers_without_a_top_k_or_behind_a_weighting(
    family: str, architecture: str, config: dict[str, Any], role: str, here: Path
) -> None:
    """Phimoe picks the largest score twice, Llama 4 weighs what goes into its experts: the router is what gives a score to each of them."""
    Path("model.json").write_text(json.dumps({"model_type": family, "architectures": [architecture], **config}), "utf-8")
    program, _ = open_program("config:model.json")
    site = next(s for s in program.anatomy.sites if s.role == role)
    assert site.shape == (4, 16) and site.facts["top_k"] == config["num_experts_per_tok"]
    block = role.removesuffix(".router")
    text = f"surg 1\nprune experts(keep = 2) on {block}\n"
    plan = surgery.plan(text, "config:model.json")
    assert plan.ok and [x.removed for x in plan.steps[0].sites] == [
        2 * (3 * 16 * 16 + 16)
    ]  # gate, up and down of an expert, and its row of the router
    if family == "llama4_text":
        result = surgery.compile(text, "config:model.json")
        assert all(c["ok"] and c["max_abs_error"] <= 1e-5 for c in result.certificates)
        assert tuple(dict(result.module.named_parameters())[site.weight].shape) == (2, 16)


class OneByOne(nn.Module):
    """A loop over the experts that were chosen, as many as there are layers; a dropout stands among them."""

    def __init__(self, norm: bool) -> None:
        super().__init__()
        made = [nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4) if norm else nn.ReLU()) for _ in range(2)]
        self.router, self.experts = nn.Linear(4, 2), nn.ModuleDict({f"expert_{i}": m for i, m in enumerate(made)})
        self.experts["dropout"] = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(1)
        mask = nn.functional.one_hot(chosen, num_classes=2).permute(2, 1, 0)
        out = torch.zeros_like(x)
        for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            choice, token = torch.where(mask[expert].squeeze(0))
            out.index_add_(0, token, self.experts[f"expert_{expert[0]}"](x[token]) * weights[token, choice, None])
        return x + out


def test_a_loop_over_experts_takes_the_experts_of_its_own_layer() -> None:
    """And something in an expert that is not known for all of them at once is refused, not taken from the first one."""
    for norm in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(*(nn.ModuleList([OneByOne(norm), OneByOne(norm)]))).eval(), torch.randn(9, 4)
        if norm:
            with pytest.raises(surgery.SurgeryError) as caught:
                capture_module(model, (x,))
            assert caught.value.diagnostics[0].code == "S0502"
            continue
        graph = materialise(capture_module(model, (x,)), model.state_dict())
        with torch.no_grad():
            assert float((graph(x)[0] - model(x)).abs().max()) <= 1e-6


def test_experts_of_nllb_are_those_that_transformers_takes() -> None:
    """It takes the ones of a mask for numbers of experts, so that the first two get everything, and does something else in training."""
    torch.manual_seed(0)
    model = NllbMoeSparseMLP(transformers.NllbMoeConfig(d_model=16, num_experts=4, expert_capacity=3, encoder_ffn_dim=24), 24).eval()
    captured = capture_module(model, (torch.randn(2, 9, 16),))
    assert len(captured.notes) == 1 and "NllbMoeTop2Router, NllbMoeExperts" in captured.notes[0]
    graph = materialise(captured, model.state_dict())
    for batch, length in ((2, 9), (1, 5), (3, 17)):
        x = torch.randn(batch, length, 16)
        with torch.no_grad():
            assert float((graph(x)[0] - model(x)).abs().max()) <= 1e-6


def test_a_width_of_experts_that_transformers_cannot_multiply(here: Path) -> None:
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], **PHIMOE}
    Path("model.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.compile('surg 1\nprune ffn(keep = 10) on layers[*].ffn\nemit transformers to "plain"\n', "config:model.json")
    found = caught.value.diagnostics[-1]
    assert found.code == "S0863" and "cannot run it" in found.message and "round_to" in found.help[0] and not Path("plain").exists()
