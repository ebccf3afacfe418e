"""Removing units: which go (against direct computations on the weights), how many, budgets and shared units."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import surgery
from surgery.core.diagnostics import SurgeryError
from surgery.model import cost
from surgery.model.program import Program
from surgery.model.study import Study
from surgery.model.weights import Held
from surgery.passes.kinds.slice_scores import marginal
from tests.captured_programs import zoo_program
from tests.cutting import Cutting, kept, roles, state
from tests.zoo import ZOO

# ---------------------------------------------------------------- which units


@pytest.mark.parametrize("score", ["magnitude", "l2"])
def test_heads_and_units_are_those_of_a_direct_computation(score: str) -> None:
    weights, size = state("bert"), (np.abs if score == "magnitude" else np.square)
    heads = Cutting("bert", "heads", roles("layers[{}].attn"), keep=("layers[1]",), ratio=0.5, score=score)
    heads.run()
    units = Cutting("bert", "ffn", roles("layers[{}].ffn"), ratio=0.25, score=score)
    units.run()
    for i in range(3):
        at = f"encoder.layer.{i}.attention."
        per_head = np.zeros(4)
        for part in ("self.query", "self.key", "self.value"):
            per_head += size(weights[f"{at}{part}.weight"]).reshape(4, 8 * 32).sum(1)
            per_head += size(weights[f"{at}{part}.bias"]).reshape(4, 8).sum(1)
        per_head += size(weights[f"{at}output.dense.weight"]).reshape(32, 4, 8).sum((0, 2))
        stay = range(4) if i == 1 else sorted(np.argsort(per_head, kind="stable")[2:])
        rows = [h * 8 + j for h in stay for j in range(8)]
        assert kept(heads.value(f"{at}self.value.weight"), weights[f"{at}self.value.weight"]) == rows
        assert kept(heads.value(f"{at}output.dense.weight"), weights[f"{at}output.dense.weight"], 1) == rows
        at = f"encoder.layer.{i}."
        per_unit = size(weights[f"{at}intermediate.dense.weight"]).sum(1) + size(weights[f"{at}intermediate.dense.bias"])
        per_unit += size(weights[f"{at}output.dense.weight"]).sum(0)
        assert kept(units.value(f"{at}output.dense.weight"), weights[f"{at}output.dense.weight"], 1) == sorted(np.argsort(per_unit)[16:])


def test_every_group_keeps_its_own_query_heads_and_whole_groups_take_everything() -> None:
    """Grouped attention: the lowest heads of each group by rows of the query and columns of the output; groups by all four."""
    weights = state("llama")
    ragged = Cutting("llama", "heads", roles("layers[{}].attn"), ratio=0.5)
    ragged.run()
    groups = Cutting("llama", "kv_groups", roles("layers[{}].attn"), keep=(), ratio=0.5)
    groups.run()
    different = 0
    for i in range(3):
        at = f"model.layers.{i}.self_attn."
        q, k, v, o = (weights[f"{at}{x}_proj.weight"] for x in "qkvo")
        head = np.abs(q).reshape(2, 2, 8 * 32).sum(2) + np.abs(o).reshape(32, 2, 2, 8).sum((0, 3))
        stay = head.argmax(1)
        different += stay[0] != stay[1]
        rows = [(2 * g + int(stay[g])) * 8 + j for g in range(2) for j in range(8)]
        assert kept(ragged.value(f"{at}q_proj.weight"), q) == rows
        assert kept(ragged.value(f"{at}o_proj.weight"), o, 1) == rows
        assert kept(ragged.value(f"{at}k_proj.weight"), k) == list(range(16))
        group = head.sum(1) + np.abs(k).reshape(2, 256).sum(1) + np.abs(v).reshape(2, 256).sum(1)
        best = int(group.argmax())
        assert kept(groups.value(f"{at}k_proj.weight"), k) == list(range(8 * best, 8 * best + 8))
        assert kept(groups.value(f"{at}q_proj.weight"), q) == list(range(16 * best, 16 * best + 16))
    assert different, "the groups must be free to keep different heads"


def test_shared_heads_add_up_over_the_layers_and_the_table() -> None:
    weights = state("t5")
    cut = Cutting("t5", "heads", roles("encoder.layers[{}].attn"), keep=(), ratio=0.5)
    changes = cut.run()
    total = np.zeros(4)
    for i in range(3):
        at = f"encoder.block.{i}.layer.0.SelfAttention."
        total += sum(np.abs(weights[f"{at}{x}.weight"]).reshape(4, -1).sum(1) for x in "qkv")
        total += np.abs(weights[f"{at}o.weight"]).reshape(32, 4, 8).sum((0, 2))
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    total += np.abs(weights[table]).sum(0)
    assert kept(cut.value(table), weights[table], 1) == sorted(np.argsort(total)[2:])
    assert [c.removed for c in changes] == [3 * 2 * 4 * 8 * 32 + 2 * 8, 0, 0]
    assert any("one decision" in line for line in cut.told)


def test_channels_of_the_stream_count_embeddings_norms_and_heads() -> None:
    weights = state("gpt2")
    cut = Cutting("gpt2", "width", [], ratio=0.25)
    cut.run()
    total = np.zeros(32)
    for name, w in weights.items():
        if name.endswith(("wte.weight", "wpe.weight")) or ".c_proj.weight" in name:
            total += np.abs(w).sum(0)
        elif ".c_attn.weight" in name or ".c_fc.weight" in name:
            total += np.abs(w).sum(1)
        elif ".ln_" in name or ".c_proj.bias" in name:
            total += np.abs(w)
    assert kept(cut.value("transformer.wte.weight"), weights["transformer.wte.weight"], 1) == sorted(np.argsort(total)[8:])


def test_equal_scores_go_by_index_and_plans_take_the_last() -> None:
    program = zoo_program("bert")[0]
    for name, expr in list(program.weights.items()):
        program.weights[name] = Held(expr.shape, expr.dtype, f"{name}=1", torch.ones(expr.shape))
    cut = Cutting(program, "heads", ["layers[0].attn"], ratio=0.5)
    cut.run()
    assert "removed: 0, 1 of layers[0].attn" in cut.told
    plan = Cutting("bert", "heads", ["layers[0].attn"], ratio=0.5, study=False)
    changes = plan.run()
    assert (changes[0].shape_before, changes[0].shape_after, changes[0].removed) == ((4,), (2,), 2 * 1048)
    assert any("compile chooses" in line for line in plan.told) and not plan.claims


def test_random_choices_follow_the_seed_of_the_statement() -> None:
    def removed(seed: int, study: bool) -> str:
        cut = Cutting("bert", "heads", roles("layers[{}].attn"), ratio=0.5, score="random", seed=seed, study=study)
        cut.run()
        return next(line for line in cut.told if line.startswith("removed"))

    assert removed(0, False) == removed(0, True)
    assert len({removed(seed, False) for seed in range(6)}) > 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_do_not_depend_on_threads_or_layout(dtype: torch.dtype) -> None:
    value = torch.randn(37, 5, 211, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            found.append([marginal(value, axis, squared=False) for axis in range(3)])
    finally:
        torch.set_num_threads(before)
    exact = value.double().abs()
    for axis, (one, other) in enumerate(zip(*found, strict=True)):
        assert np.array_equal(one, other)
        assert np.allclose(one, exact.sum([a for a in range(3) if a != axis]).numpy(), rtol=1e-12)
    assert np.allclose(marginal(value, 1, squared=True), value.double().square().sum((0, 2)).numpy(), rtol=1e-12)
    assert np.allclose(marginal(value.movedim(0, 2), 2, squared=False), found[0][0], rtol=1e-12)


# ---------------------------------------------------------------- how many


def test_shares_remove_exactly_their_whole_units_and_counts_keep_theirs() -> None:
    each = [{"ratio": 0.29}, {"ratio": 0.3}, {"ratio": 0.999}]
    cut = Cutting("bert", "ffn", roles("layers[{}].ffn"), each=each, study=False)
    assert [c.shape_after for c in cut.run()] == [(64 - int(Fraction("0.29") * 64),), (64 - 19,), (1,)]
    cut = Cutting("bert", "ffn", roles("layers[{}].ffn"), each=[{"keep": 5}, {"keep": 64}, {"keep": 24}], round_to=8, study=False)
    assert [c.shape_after for c in cut.run()] == [(8,), (64,), (24,)]


def test_all_sites_compete_by_their_normalised_scores() -> None:
    weights = state("bert")
    scores = []
    for i in range(3):
        at = f"encoder.layer.{i}."
        up, down = weights[f"{at}intermediate.dense.weight"], weights[f"{at}output.dense.weight"]
        scores.append(np.abs(up).sum(1) + np.abs(weights[f"{at}intermediate.dense.bias"]) + np.abs(down).sum(0))
    for how in ("mean", "max", "none"):
        scale = {"mean": np.mean, "max": np.max, "none": lambda s: 1.0}[how]
        flat = np.concatenate([s / scale(s) for s in scores])
        gone = np.bincount(np.argsort(flat, kind="stable")[: 3 * 16] // 64, minlength=3)
        cut = Cutting("bert", "ffn", roles("layers[{}].ffn"), ratio=0.25, scope="global", normalize=how)
        assert [c.shape_after for c in cut.run()] == [(64 - n,) for n in gone]
    even = Cutting("bert", "ffn", roles("layers[{}].ffn"), ratio=0.25, scope="global", study=False)
    assert [c.shape_after for c in even.run()] == [(48,)] * 3


def test_no_site_is_emptied_by_the_others() -> None:
    program = zoo_program("bert")[0]
    for name, expr in list(program.weights.items()):
        if "layer.1.attention" in name:
            program.weights[name] = Held(expr.shape, expr.dtype, f"{name}=0", torch.zeros(expr.shape))
    cut = Cutting(program, "heads", roles("layers[{}].attn"), ratio=0.5, scope="global", normalize="none")
    sizes = [c.shape_after[0] for c in cut.run()]
    assert sizes[1] == 1 and sum(sizes) == 6, "one head stays, and the rest comes from elsewhere"


@pytest.mark.parametrize("quantity", ["params", "flops"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_budget_is_the_smallest_cut_that_reaches_it(quantity: str, scope: str) -> None:
    measure = {"params": cost.parameters, "flops": cost.flops_per_token}[quantity]
    cut = Cutting("llama", "ffn", roles("layers[{}].ffn"), to=0.9, of=quantity, scope=scope)
    changes = cut.run()
    limit = 0.9 * cut.base[quantity]
    assert measure(cut.program) <= limit
    assert any(line.startswith(f"{quantity}: {measure(cut.program):,} are left, 90% of {cut.base[quantity]:,}") for line in cut.told)
    sizes = [c.shape_after[0] for c in changes]
    if scope == "layer":
        smaller = [{"keep": n + 1} for n in sizes]
    else:
        smaller = [{"keep": sizes[0] + 1}, *({"keep": n} for n in sizes[1:])]
    less = Cutting("llama", "ffn", roles("layers[{}].ffn"), each=smaller, study=False)
    less.run()
    assert measure(less.program) > limit


def test_llama_7b_at_a_quarter_has_its_published_size(here: Path) -> None:
    """LLM-Pruner's LLaMA-5.4B: a quarter of heads and hidden units of layers 4 to 29."""
    config = dict(
        model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=32000, hidden_size=4096, intermediate_size=11008,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=2048,
    )  # fmt: skip
    Path("llama.json").write_text(json.dumps(config), "utf-8")
    text = "surg 1\n\nprune heads(ratio = 25%) on layers[4..29].attn\nprune ffn(ratio = 25%) on layers[4..29].ffn\n"
    totals = surgery.plan(text, "config:llama.json").totals
    assert totals is not None
    assert (totals.params_before, totals.params_after) == (6_738_415_616, 5_422_977_024)
    assert totals.bytes_after == 4 * totals.params_after


# ---------------------------------------------------------------- scores from a file


@pytest.mark.parametrize("form", ["json", "safetensors"])
def test_scores_come_from_a_file(form: str, here: Path) -> None:
    table = {f"encoder.layers[{i}].attn": [float(x) for x in row] for i, row in enumerate([[4, 1, 2, 3], [0, 5, 0, 0], [0, 0, 9, 0]])}
    path = Path(f"scores.{form}")
    if form == "json":
        path.write_text(json.dumps(table), "utf-8")
    else:
        save_file({k: torch.tensor(v) for k, v in table.items()}, str(path))
    cut = Cutting("t5", "heads", list(table), ratio=0.5, score="file", scores=str(path), study=False)
    cut.run()
    assert "removed: 0, 3 of encoder.layers[0..2].attn" in cut.told  # sums 4, 6, 11, 3


# ---------------------------------------------------------------- warnings


def test_widths_that_kernels_do_not_like_are_warned_of() -> None:
    def codes(family: str, name: str, role: str, **params: Any) -> list[str]:
        cut = Cutting(family, name, [role] if role else [], study=False, **params)
        cut.run()
        return [d.code for d in cut.warned]

    assert codes("bert", "ffn", "layers[0].ffn", ratio=0.25) == []
    assert codes("bert", "ffn", "layers[0].ffn", ratio=0.05) == ["S0450"]
    assert codes("bert", "heads", "layers[0].attn", ratio=0.25) == [], "a head is 8 columns wide"
    assert codes("bert", "heads", "layers[0].attn", ratio=0.2) == ["S0449"]
    assert codes("llama", "width", "", ratio=0.25) == []
    assert codes("bert", "width", "", ratio=0.25) == ["S0452"]


# ---------------------------------------------------------------- scores from data


def test_element_scores_sum_over_members_and_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed scores are added within a tensor and count by their size; scores of some axes count on those axes alone."""
    names: list[str] = []

    def signed(study: Study, program: Program, samples: Any, score: str, wanted: list[str], *, span: Any = None) -> Any:
        for name in wanted:
            names.append(name)
            size = torch.Size(program.weights[name].shape)
            if score == "activation":
                if name.endswith("output.dense.weight"):
                    yield name, torch.arange(64, 0, -1, dtype=torch.float64), (1,)
                continue
            values = torch.zeros(size, dtype=torch.float64)
            if name.endswith("intermediate.dense.weight"):
                values[:, 0] = torch.arange(1.0, 65.0)
                values[3, 1] = -4.0  # 4 - 4: the unit is worth nothing
            elif name.endswith("output.dense.weight"):
                values[0, 0], values[0, 3] = -100.0, 1.0
            yield name, values, tuple(range(len(size)))

    monkeypatch.setattr("surgery.model.scores.element_scores", signed)
    for score, gone in (("taylor_signed", [1, 2, 3, 4]), ("activation", [60, 61, 62, 63])):
        cut = Cutting("bert", "ffn", ["layers[0].ffn"], keep=(), ratio=0.0625, score=score)
        cut.op = replace(cut.op, data=object())
        cut.run()
        assert f"removed: {', '.join(map(str, gone))} of layers[0].ffn" in cut.told
    assert names[:3] == [f"encoder.layer.0.{x}" for x in ("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight")]


def test_a_spec_with_data_cuts_by_gradients(here: Path) -> None:
    Path("bert.json").write_text(json.dumps({"architectures": ["BertModel"], **ZOO["bert"].plain_config}), "utf-8")
    save_file({"input_ids": torch.randint(3, 90, (6, 8), generator=torch.Generator().manual_seed(0))}, "ids.safetensors")
    text = (
        'surg 1\n\ndata few = tensors("ids.safetensors")\n\n'
        "prune heads(ratio = 50%, score = taylor, scope = global) on layers[*].attn using few keep layers[0]\n"
    )
    result = surgery.compile(text, "config:bert.json")
    step = result.plan.steps[0]
    assert [s.role for s in step.sites] == ["layers[1].attn", "layers[2].attn"]
    assert sum(s.shape_before[0] - s.shape_after[0] for s in step.sites) == 4
    assert sum(s.removed for s in step.sites) == 4 * 1048
    assert [c["ok"] for c in result.certificates if c["claim"] == "removed = masked"] == [True]
    assert surgery.compile(text, "config:bert.json").plan.steps[0].facts == step.facts


def test_units_that_a_score_says_nothing_of_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def some(study: Study, program: Program, samples: Any, score: str, wanted: list[str], *, span: Any = None) -> Any:
        yield from ((n, torch.ones(program.weights[n].shape).double(), (0, 1)) for n in wanted if "layer.0." in n and n.endswith("weight"))

    monkeypatch.setattr("surgery.model.scores.element_scores", some)
    cut = Cutting("bert", "ffn", ["layers[0].ffn", "layers[1].ffn"], ratio=0.25, score="wanda")
    cut.op = replace(cut.op, data=object())
    before = dict(cut.program.weights)
    with pytest.raises(SurgeryError) as error:
        cut.run()
    found = error.value.diagnostics[0]
    assert found.code == "S0453" and "`wanda`" in found.message and "layers[1].ffn" in found.message
    assert dict(cut.program.weights) == before


# ---------------------------------------------------------------- after other statements


def test_shared_layers_are_one_decision_and_the_message_shows_who_shared_them(here: Path) -> None:
    Path("bert.json").write_text(json.dumps({"architectures": ["BertModel"], **ZOO["bert"].plain_config}), "utf-8")
    share = "surg 1\n\nshare layers(groups = pairs) on layers[0..1]\n"
    with pytest.raises(SurgeryError) as error:
        surgery.compile(share + "prune heads(ratio = 25%) on layers[0].attn\n", "config:bert.json")
    found = error.value.diagnostics[0]
    assert found.code == "S0445"
    assert [(label.span.line, label.text) for label in found.labels] == [
        (4, "not selected: `layers[1].attn`"), (3, "shared by this statement"),
    ]  # fmt: skip
    plan = surgery.plan(share + "prune heads(ratio = 25%) on layers[*].attn\n", "config:bert.json")
    assert [s.removed for s in plan.steps[1].sites] == [1048, 0, 1048]


def test_heads_are_not_mistaken_for_the_width_of_values() -> None:
    """BLOOM stores query, key and value of one head beside each other and has fewer heads than a head has columns."""
    from surgery.opening import open_program
    from tests.dims_models import MODELS

    model, inputs = MODELS["bloom"]()
    program, _ = open_program(model.eval(), inputs=inputs)
    cut = Cutting(program, "heads", ["layers[0].attn", "layers[1].attn"], ratio=0.5, study=False)
    region = cut.op.sites[0]
    units = cut.op.method.units(program, region)  # type: ignore[attr-defined]
    assert (units.size, region.heads, region.head_dim) == (4, 4, 6)
    assert [(c.shape_before, c.shape_after) for c in cut.run()] == [((4,), (2,))] * 2
