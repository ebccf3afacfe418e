"""Converting real captures: what stays equal, what is counted, and what later statements find."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from surgery.core.source import Source
from surgery.grammar.parser import parse
from surgery.model import cost
from surgery.model.live import Tensors, live_root
from surgery.model.program import Origin, Program
from surgery.model.sample import sample_inputs
from surgery.opening import open_program
from surgery.passes import registry
from surgery.passes.kinds import route
from surgery.passes.operation import Resolved, SiteChange
from surgery.passes.verify import verify
from tests.zoo import ZOO

D, F, E, K = 32, 64, 4, 2
FFN = 3 * D * F


@cache
def opened(family: str, folder: Path) -> Program:
    entry = ZOO[family]
    path = folder / f"{family}.json"
    path.write_text(json.dumps({"architectures": [entry.architecture], **entry.plain_config}), "utf-8")
    return open_program(f"config:{path}", use_cache=False)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def blocks(program: Program) -> list[Any]:
    return [s for s in program.anatomy.sites if s.is_region and f"{s.role}.up" in {o.role for o in program.anatomy.sites}]


def convert(program: Program, roles: list[str] | None = None, name: str = "moe", **params: Any) -> list[SiteChange]:
    """Applies the statement to some blocks (all), and verifies the program."""
    chosen = [s for s in blocks(program) if roles is None or s.role in roles]
    method = registry.get("convert", "moe")(**{"experts": E, **params})
    op = Resolved("convert", name, "on", tuple(chosen), (method,) * len(chosen), Origin(verb="convert", method="moe"), seed=method.seed)
    changes = route.apply(program, op)
    verify(program, "convert moe")
    return changes


def outputs(program: Program, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    root = live_root(program, Tensors(registry.function), dtype=dtype).eval()
    with torch.no_grad():
        found = root(*sample_inputs(program, batch=3, length=11, seed=3, padding=True, dtype=dtype))
    return [t for t in found if isinstance(t, Tensor) and t.is_floating_point()]


def difference(left: list[Tensor], right: list[Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(left, right, strict=True))


# ------------------------------------------------------------------ equal at the start

UNCHANGED: dict[str, dict[str, Any]] = {
    "copies": {},
    "copies, sum": {"router": "sum", "top_k": 3},
    "clusters, all chosen": {"split": "moefication", "top_k": E},
    "parts, mixtral from zero": {"split": "random", "router": "mixtral", "init": "zero", "top_k": E},
    "parts, switch from zero": {"split": "random", "router": "switch", "init": "zero", "top_k": E},
}


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "phi3", "swin"])
def test_unchanged_at_the_start(family: str, folder: Path) -> None:
    """Gated, plain with biases and stored transposed, fused, and on values of four axes."""
    base = opened(family, folder)
    before = outputs(base)
    picked = {"llama": list(UNCHANGED), "gpt2": ["copies", "parts, mixtral from zero"]}.get(family, ["clusters, all chosen"])
    for name, params in ((n, UNCHANGED[n]) for n in picked):
        program = base.copy()
        convert(program, **params)
        assert difference(outputs(program), before) <= 1e-5, name
        assert registry.get("convert", "moe")(experts=E, **params).identity == "exact"
        assert not [u for u in program.anatomy.unresolved if "expert" in u.path]


def test_what_changes_says_so(folder: Path) -> None:
    base = opened("llama", folder)
    before = outputs(base)
    for params in ({"split": "widenet"}, {"noise": 0.02}, {"split": "kmeans"}, {"capacity": 1.0, "top_k": 1}):
        program = base.copy()
        convert(program, **params)
        assert registry.get("convert", "moe")(experts=E, **params).identity == "changed"
        assert difference(outputs(program), before) > 1e-4, params


def test_a_switch_router_scales_the_output_by_its_probabilities(folder: Path) -> None:
    """From a router of zeros every probability is 1 / E: two of four copies give half of the block."""
    base = opened("llama", folder)
    half, whole = base.copy(), base.copy()
    convert(half, router="switch", init="zero", split="widenet")
    for name in [n for n in whole.weights if n.endswith("down_proj.weight")]:
        from surgery.model.weights import Scale

        expr = whole.weights[name]
        whole.weights[name] = Scale(expr.shape, expr.dtype, expr, K / E)
    assert difference(outputs(half), outputs(whole)) <= 1e-6


def test_parts_are_the_units_of_the_block(folder: Path) -> None:
    """Every row of the dense projection is in exactly one expert, with its gate and its column of the down projection."""
    base = opened("llama", folder)
    program = base.copy()
    convert(program, split="moefication")
    tensors = Tensors(registry.function)
    at = "model.layers.1.mlp"
    gate, up, down = (tensors.of(base, f"{at}.{n}_proj.weight") for n in ("gate", "up", "down"))
    fused, out = (tensors.of(program, f"{at}.experts.{n}") for n in ("gate_up_proj", "down_proj"))
    assert fused.shape == (E, 2 * F // E, D) and out.shape == (E, D, F // E)
    rows = fused[:, : F // E].reshape(F, D)
    where = torch.cdist(rows.double(), gate.double()).argmin(1)
    assert sorted(where.tolist()) == list(range(F))
    assert torch.equal(rows, gate[where]) and torch.equal(fused[:, F // E :].reshape(F, D), up[where])
    assert torch.equal(out.transpose(1, 2).reshape(F, D), down.t()[where])
    mean = torch.nn.functional.normalize(gate[where], dim=1).reshape(E, F // E, D).mean(1)
    torch.testing.assert_close(tensors.of(program, f"{at}.gate.weight"), mean)


# ------------------------------------------------------------------ counts


def test_adds_what_the_formulas_say(folder: Path) -> None:
    for family, params, each in (
        ("llama", {}, (E - 1) * FFN + D * E),
        ("llama", {"split": "random"}, D * E),
        ("bert", {"split": "kmeans"}, D * E + (E - 1) * D),
        ("gpt2", {"experts": 3, "split": "widenet"}, 2 * (2 * D * 128 + 128 + D) + 3 * D),
    ):
        program = opened(family, folder).copy()
        before, sites = cost.parameters(program), {s.role: s for s in blocks(program)}
        method = registry.get("convert", "moe")(**{"experts": E, **params})
        dense = route.dense_of(program, route.parts_of(program, sites["layers[0].ffn"]))
        assert method.count(dense) == each  # type: ignore[attr-defined]
        changes = convert(program, **params)
        assert [c.added for c in changes] == [each] * 3 and not any(c.removed for c in changes)
        assert cost.parameters(program) == before + 3 * each
    program = opened("llama", folder).copy()
    convert(program)
    assert cost.active_parameters(program) == cost.parameters(program) - 3 * (E - K) * FFN


def test_mistral_becomes_mixtral(folder: Path) -> None:
    """The published totals of Mixtral 8x7B, from the dense model of the same sizes; no weight is read."""
    config = {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "sliding_window": None,
    }  # fmt: skip
    path = folder / "mistral.json"
    path.write_text(json.dumps(config), "utf-8")
    program, _ = open_program(f"config:{path}", use_cache=False)
    assert cost.parameters(program) == 7_241_732_096
    changes = convert(program, experts=8, top_k=2)
    assert {c.added for c in changes} == {7 * 3 * 4096 * 14336 + 8 * 4096}
    assert cost.parameters(program) == 46_702_792_704
    assert cost.active_parameters(program) == 12_879_925_248


def test_llama_2_7b_layers_grow_by_the_published_size(folder: Path) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 1, "num_attention_heads": 32}  # fmt: skip
    path = folder / "llama-7b.json"
    path.write_text(json.dumps(config), "utf-8")
    program, _ = open_program(f"config:{path}", use_cache=False)
    assert [c.added for c in convert(program, experts=8)] == [7 * 135_266_304 + 8 * 4096]


# ------------------------------------------------------------------ what later statements see


def chosen(program: Program, text: str) -> list[str]:
    from surgery.core.diagnostics import Sink
    from surgery.passes.resolve import pick

    tree, problems = parse(Source("spec.surg", f"surg 1\nfreeze all on {text}\n"))
    assert not problems
    sink = Sink()
    found = pick(program, tree.statements[-1].selectors, sink)  # type: ignore[union-attr]
    sink.raise_if_failed()
    return [s.role for s in found]


def test_selectors_find_routers_and_experts(folder: Path) -> None:
    program = opened("llama", folder).copy()
    convert(program, ["layers[1].ffn", "layers[2].ffn"], name="wide")
    assert chosen(program, "layers[1..2].ffn.router") == ["layers[1].ffn.router", "layers[2].ffn.router"]
    assert chosen(program, "@wide") == ["layers[1].ffn", "layers[2].ffn"]
    assert chosen(program, "@wide.experts[*].{up, down}") == [f"layers[{i}].ffn.experts.{r}" for i in (1, 2) for r in ("up", "down")]
    assert chosen(program, "layers[1].ffn.experts[3].up") == ["layers[1].ffn.experts[3].up"]
    sites = {s.role: s for s in program.anatomy.sites}
    assert sites["layers[1].ffn"].facts["experts"] == E and sites["layers[1].ffn"].facts["top_k"] == K
    assert sites["layers[1].ffn.experts.gate"].rows == ((0, F),) and sites["layers[1].ffn.experts.up"].rows == ((F, 2 * F),)
    assert sites["layers[1].ffn.router"].path == "model.layers.1.mlp.gate"


def test_frozen_blocks_give_frozen_experts(folder: Path) -> None:
    program = opened("llama", folder).copy()
    first = [n for n in program.weights if n.startswith("model.layers.0.mlp")]
    second = [n for n in program.weights if n.startswith("model.layers.1.mlp")]
    program.frozen.update([*first, *second])
    for name in second:
        program.journal.record(name, Origin(verb="freeze", method="all"))
    changes = convert(program)
    at = "model.layers.{}.mlp"
    assert {f"{at.format(0)}.experts.{n}" for n in ("gate_up_proj", "down_proj")} == {n for n in program.frozen if ".0." in n}
    assert f"{at.format(1)}.gate.weight" in program.frozen and not any(".2.mlp" in n for n in program.frozen)
    assert [c.trainable for c in changes] == [D * E, 0, E * FFN + D * E]


def test_masks_of_half_precision_and_float64(folder: Path) -> None:
    program = opened("bert", folder).copy()
    convert(program, split="kmeans", top_k=E)
    exact = outputs(program, torch.float64)
    assert difference(exact, outputs(program)) < 1e-4
    half = outputs(program, torch.bfloat16)
    assert all(t.dtype == torch.bfloat16 for t in half) and difference(half, exact) < 0.1


def test_shared_layers_share_their_experts(folder: Path) -> None:
    program = opened("albert", folder).copy()
    assert [c.added for c in convert(program)] == [(E - 1) * (2 * D * F + F + D) + D * E]
    shared = opened("llama", folder).copy()
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        first, other = (f"model.layers.{i}.mlp.{leaf}.weight" for i in (0, 1))
        shared.graph.get_submodule(other.rpartition(".")[0]).weight = shared.graph.get_parameter(first)
        shared.aliases[other] = first
        del shared.weights[other]
    shared.touch()
    before, total = outputs(shared), cost.parameters(shared)
    convert(shared)
    assert shared.aliases["model.layers.1.mlp.experts.down_proj"] == "model.layers.0.mlp.experts.down_proj"
    assert cost.parameters(shared) == total + 2 * ((E - 1) * FFN + D * E)
    assert difference(outputs(shared), before) <= 1e-5
    alone = opened("llama", folder).copy()
    alone.aliases, alone.weights = dict(alone.aliases), type(alone.weights)(alone.weights)
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        first, other = (f"model.layers.{i}.mlp.{leaf}.weight" for i in (0, 1))
        alone.graph.get_submodule(other.rpartition(".")[0]).weight = alone.graph.get_parameter(first)
        alone.aliases[other] = first
        del alone.weights[other]
    alone.touch()
    convert(alone, ["layers[0].ffn"])  # the other layer keeps the dense block, now its own
    assert "model.layers.1.mlp.up_proj.weight" in alone.weights and cost.parameters(alone) == total + E * FFN + D * E
    assert difference(outputs(alone), before) <= 1e-5


def test_units_and_experts_can_be_cut(folder: Path) -> None:
    """The classes of a converted block are free: an expert goes with its router row and biases, a unit with its gate."""
    program = opened("bert", folder).copy()
    convert(program, split="widenet", capacity=1.2)
    at = "encoder.layer.1.moe"
    group = program.dims.coupled(f"{at}.experts.down_proj", 0, [2])
    assert {(m.parameter, m.axis) for m in group.members} == {
        (f"{at}.{n}", 0) for n in ("gate.weight", "experts.up_proj", "experts.up_proj_bias", "experts.down_proj", "experts.down_proj_bias")
    }
    group = program.dims.coupled(f"{at}.experts.down_proj", 2, [5])
    assert {(m.parameter, m.axis) for m in group.members} == {
        (f"{at}.experts.up_proj", 1), (f"{at}.experts.up_proj_bias", 1), (f"{at}.experts.down_proj", 2)
    }  # fmt: skip


def test_equal_blocks_are_captured_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.passes.kinds import route_splice

    calls, real = [], route_splice.capture_module
    monkeypatch.setattr(route_splice, "capture_module", lambda *a, **k: calls.append(1) or real(*a, **k))
    program = opened("llama", folder).copy()
    convert(program)
    assert len(calls) == 1
