"""Scores: the published worked numbers, and the same statistics as hooks on live models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.core.diagnostics import SurgeryError
from surgery.core.site import NodeRef, Site
from surgery.model.data import Samples
from surgery.model.influence import cosine
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.model.realise import no_functions
from surgery.model.scores import SCORES, element_scores, layer_scores, run_scores
from surgery.model.study import Study
from surgery.opening import capture
from tests.captured_programs import live_model, zoo_program
from tests.data_support import codes, zoo_samples


def study() -> Study:
    return Study(Tensors(no_functions))


def scores(program: Program, samples: Samples | None, score: str, *names: str) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    return {name: (value, axes) for name, value, axes in element_scores(study(), program, samples, score, names)}


class One(nn.Module):
    """One linear map of given weight."""

    def __init__(self, weight: list[list[float]]) -> None:
        super().__init__()
        self.map = nn.Linear(len(weight[0]), len(weight), bias=False)
        self.map.weight.data = torch.tensor(weight, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


def near(found: Tensor, want: Any, tolerance: float = 1e-6) -> bool:
    return found.dtype == torch.float64 and bool((found - torch.tensor(want, dtype=torch.float64)).abs().max() < tolerance)


# ---------------------------------------------------------------- worked numbers


def test_wanda_of_the_published_example() -> None:
    program = capture(One([[1, -2, 3, 0.5], [4, 0.1, -1, 2]]), {"x": torch.ones(2, 3, 4)})
    x = torch.tensor([[1.0, 0, 2, 1], [1, 1, 0, 3]])
    (value, axes) = scores(program, Samples([{"x": x}]), "wanda", "map.weight")["map.weight"]
    assert axes == (0, 1) and near(value, [[1.414214, 2, 6, 1.581139], [5.656854, 0.1, 2, 6.324555]], 1e-5)
    (mean, axes) = scores(program, Samples([{"x": x}]), "activation", "map.weight")["map.weight"]
    assert axes == (1,) and near(mean, [1, 0.5, 1, 2])


def test_wanda_does_not_depend_on_how_samples_are_batched() -> None:
    program = capture(One([[1, -2, 3, 0.5], [4, 0.1, -1, 2]]), {"x": torch.ones(2, 3, 4)})
    rows = [{"x": torch.randn(2, 4, generator=torch.Generator().manual_seed(i))} for i in range(5)]
    one, four = (scores(program, Samples(rows, batch=n), "wanda", "map.weight")["map.weight"][0] for n in (1, 4))
    assert (one - four).abs().max() < 1e-12


def test_sizes() -> None:
    program = capture(One([[1, -2], [3, 0.5]]), {"x": torch.ones(2, 3, 2)})
    assert near(scores(program, None, "magnitude", "map.weight")["map.weight"][0], [[1, 2], [3, 0.5]])
    assert near(scores(program, None, "l2", "map.weight")["map.weight"][0], [[1, 4], [9, 0.25]])


class Given(Study):
    """A study whose gradients are given, for the algebra on top of them."""

    def each_gradient(self, program: Program, samples: Samples, names: Any, **more: Any) -> Any:
        parts = [[[0.5, -0.1], [0.2, 0.4]]] if not more["per_sample"] else [[[0.5, -0.3], [0.0, 0.4]], [[0.0, 0.2], [0.2, 0.0]]]
        for i, g in enumerate(parts):
            yield "map.weight", torch.tensor(g, dtype=torch.float64), i if more["per_sample"] else -1


def test_taylor_of_the_published_example() -> None:
    """W = [[1, 2], [3, -1]], g = [[.5, -.1], [.2, .4]]: rows .7 and 1.0 (sums of sizes), .3 and .2 (sizes of sums)."""
    program = capture(One([[1, 2], [3, -1]]), {"x": torch.ones(2, 3, 2)})
    given, samples = Given(Tensors(no_functions)), Samples([{}, {}])
    ((_, value, axes),) = element_scores(given, program, samples, "taylor", ["map.weight"])
    assert axes == (0, 1) and near(value.sum(1), [0.7, 1.0])
    ((_, value, _),) = element_scores(given, program, samples, "taylor_signed", ["map.weight"])
    assert near(value.sum(1).abs(), [0.3, 0.2])
    # F is the mean of squares of the samples' gradients: [[.125, .065], [.02, .08]]
    ((_, value, _),) = element_scores(given, program, samples, "fisher", ["map.weight"])
    assert near(value, [[0.125, 0.26], [0.18, 0.08]])
    ((_, value, _),) = element_scores(given, program, samples, "taylor_mix", ["map.weight"])
    assert near(value, [[0.5 - 0.0625, 0.2 + 0.13], [0.6 - 0.09, 0.4 + 0.04]])


def test_block_influence_of_the_published_example() -> None:
    x, y = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[1.0, 1], [2, 2]])
    assert abs(1 - float(cosine(x, y).mean()) - 0.146447) < 1e-6
    assert cosine(torch.zeros(1, 2), torch.ones(1, 2)).tolist() == [0.5]
    assert cosine(torch.ones(2, 2), torch.ones(2, 3)).tolist() == [-torch.inf]


# ---------------------------------------------------------------- beside live models


def norms_of(model: nn.Module, names: list[str], rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Root of the sum of squares of each module's inputs over samples without padding, per sample."""
    total: dict[str, Any] = dict.fromkeys(names, 0)
    handles = []
    for name in names:

        def hook(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            total[name] = total[name] + args[0].double().reshape(-1, args[0].shape[-1]).square().sum(0)

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    for row in rows:
        with torch.no_grad():
            model(**{k: v[None] for k, v in row.items()})
    for handle in handles:
        handle.remove()
    return {n: (t / len(rows)).sqrt() for n, t in total.items()}


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_wanda_norms_are_those_of_hooks_on_the_live_model_without_padding(family: str) -> None:
    program, _ = zoo_program(family)
    model = live_model(family)
    rows = [{"input_ids": torch.arange(4, 4 + n)} for n in (5, 9, 3)]
    kinds = ("Linear", "Conv1D")
    names = [n for n, m in model.named_modules() if type(m).__name__ in kinds and "pooler" not in n and "lm_head" not in n]
    want = norms_of(model, names, rows)
    got = scores(program, Samples(rows, batch=2), "wanda", *(f"{n}.weight" for n in names))
    assert len(names) >= 12
    for name in names:
        module = model.get_submodule(name)
        norm = want[name][:, None] if type(module).__name__ == "Conv1D" else want[name]
        expected = module.weight.detach().double().abs() * norm
        assert (got[f"{name}.weight"][0] - expected).abs().max() <= 1e-5 * expected.max(), name


@pytest.mark.parametrize("score", ["wanda", "activation"])
def test_experts_count_the_tokens_that_are_routed_to_them(score: str) -> None:
    program, _ = zoo_program("mixtral")
    model = live_model("mixtral")
    rows = [{"input_ids": torch.arange(4, 4 + n)} for n in (5, 9, 3)]
    experts = model.get_submodule("model.layers.0.mlp.experts")
    seen: list[tuple[Tensor, Tensor]] = []
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append((args[0].reshape(-1, 32), args[1])))
    with torch.no_grad():
        for row in rows:
            model(input_ids=row["input_ids"][None])
    handle.remove()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    value, axes = scores(program, Samples(rows, batch=2), score, name)[name]
    for e in range(4):
        mine = torch.cat([x[(chosen == e).any(-1)] for x, chosen in seen]).double()
        if score == "wanda":
            want = experts.gate_up_proj[e].detach().double().abs() * (mine.square().sum(0) / len(rows)).sqrt()
        else:
            want = mine.abs().mean(0) if len(mine) else torch.zeros(32, dtype=torch.float64)
        assert (value[e] - want).abs().max() <= 1e-5 * max(1.0, float(want.max()))
    assert axes == ((0, 1, 2) if score == "wanda" else (0, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 2},
        {"kernel_size": (3, 2), "padding": "same"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "groups": 4},
    ],
)
def test_a_tap_of_a_convolution_counts_the_positions_that_it_meets(options: dict[str, Any]) -> None:
    """Against the convolution written as a linear map of unfolded patches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, **options))
    x = torch.randn(3, 4, 7, 6)
    program = capture(model, {"input": x})
    rows = [{"input": one} for one in x]
    conv: Any = model[0]
    if conv.padding_mode != "zeros":
        x, padding = nn.functional.pad(x, conv._reversed_padding_repeated_twice, conv.padding_mode), 0
    elif conv.padding == "same":
        x, padding = nn.functional.pad(x, (0, 1, 1, 1)), 0
    else:
        padding = conv.padding
    patches = nn.functional.unfold(x.double(), conv.kernel_size, conv.dilation, padding, conv.stride)
    norm = (patches.square().sum((0, 2)) / 3).sqrt().reshape(conv.groups, 4 // conv.groups, *conv.kernel_size)
    want = conv.weight.detach().double().abs() * norm.repeat_interleave(8 // conv.groups, 0)
    value, axes = scores(program, Samples(rows, batch=2), "wanda", "0.weight")["0.weight"]
    assert axes == (0, 1, 2, 3) and (value - want).abs().max() < 1e-6
    found = scores(program, Samples(rows, batch=2), "activation", "0.weight")
    if conv.groups == 1:
        mean = patches.abs().mean((0, 2)).reshape(4, *conv.kernel_size).mean((1, 2))
        assert found["0.weight"][1] == (1,) and (found["0.weight"][0] - mean).abs().max() < 1e-6
    else:
        assert not found  # eight outputs on four inputs: no axis of the weight is the inputs'


def test_a_parameter_in_two_products_sums_over_them() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(torch.relu(self.a(x)))

    torch.manual_seed(0)
    model = Twice()
    x = torch.randn(2, 3, 4)
    program = capture(model, {"x": x})
    value = scores(program, Samples([{"x": one} for one in x]), "wanda", "a.weight")["a.weight"][0]
    inner = torch.relu(model.a(x)).detach()
    norm = ((x.double().square().sum((0, 1)) + inner.double().square().sum((0, 1))) / 2).sqrt()
    assert (value - model.a.weight.detach().double().abs() * norm).abs().max() < 1e-6


def test_rows_of_a_fused_weight_see_their_own_inputs() -> None:
    class Fused(nn.Module):
        """Rows 0 to 2 read x, rows 3 to 5 read y, as attention over another sequence does."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 4))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.linear(x, self.w[:3]) + nn.functional.linear(y, self.w[3:])

    torch.manual_seed(0)
    model = Fused()
    x, y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    program = capture(model, {"x": x, "y": y})
    value = scores(program, Samples([{"x": a, "y": b} for a, b in zip(x, y, strict=True)]), "wanda", "w")["w"][0]
    norms = [(v.double().square().sum((0, 1)) / 2).sqrt() for v in (x, y)]
    want = model.w.detach().double().abs() * torch.cat([norms[0].expand(3, 4), norms[1].expand(3, 4)])
    assert (value - want).abs().max() < 1e-6


def test_taylor_and_fisher_beside_autograd() -> None:
    program, _ = zoo_program("llama")
    model = live_model("llama")
    rows = [{"input_ids": torch.arange(4, 4 + n)} for n in (5, 9, 3)]
    names = ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
    live = {n: p for n, p in model.named_parameters() if n in names}
    each = []
    for row in rows:
        loss = model(input_ids=row["input_ids"][None], labels=row["input_ids"][None], use_cache=False).loss
        each.append(torch.autograd.grad(loss, [live[n] for n in names]))
    samples = Samples(rows, batch=2)
    taylor, fisher = scores(program, samples, "taylor", *names), scores(program, samples, "fisher", *names)
    for i, name in enumerate(names):
        g = torch.stack([e[i].double() for e in each])
        w = live[name].detach().double()
        assert (taylor[name][0] - (w * g.sum(0)).abs()).abs().max() < 1e-6
        assert (fisher[name][0] - w.square() * g.square().mean(0)).abs().max() < 1e-6
        assert taylor[name][0].max() > 1e-4


def test_block_influence_beside_hidden_states() -> None:
    program, _ = zoo_program("llama")
    model = live_model("llama")
    rows = [{"input_ids": torch.arange(4, 4 + n)} for n in (5, 9, 3)]
    regions = [s for s in program.anatomy.sites if s.is_region and s.role in (f"layers[{i}]" for i in range(3))]
    states: list[list[Tensor]] = [[] for _ in range(4)]
    handles = [
        model.get_submodule("model.layers")[i].register_forward_hook(  # type: ignore[operator]
            lambda _, args, out, i=i: (
                states[i].append(args[0][0]),
                states[i + 1].append((out[0] if isinstance(out, tuple) else out)[0]) if i == 2 else None,
            )[0]
        )
        for i in range(3)
    ]
    with torch.no_grad():
        for row in rows:
            model(input_ids=row["input_ids"][None], use_cache=False)
    for handle in handles:
        handle.remove()

    def cos(i: int, j: int, last: bool) -> Tensor:
        pairs = [(a[-1:], b[-1:]) if last else (a, b) for a, b in zip(states[i], states[j], strict=True)]
        return torch.cat([torch.cosine_similarity(a.double(), b.double(), -1) for a, b in pairs])

    got = layer_scores(study(), program, Samples(rows, batch=2), regions)
    assert all(abs(got[i] - float(1 - cos(i, i + 1, False).mean())) < 1e-5 for i in range(3))
    runs = run_scores(study(), program, Samples(rows, batch=2), regions, 2)
    want = [float((cos(i, i + 2, True).arccos() / torch.pi).mean()) for i in range(2)]
    assert len(runs) == 2 and all(abs(a - b) < 1e-5 for a, b in zip(runs, want, strict=True))


def test_a_layer_that_changes_shapes_is_never_the_least() -> None:
    program, _ = zoo_program("resnet")
    regions = [s for s in program.anatomy.sites if s.role in ("stages[0].layers[0]", "stages[0].layers[1]")]
    first, second = layer_scores(study(), program, zoo_samples(program, "resnet", 2), regions)
    assert first == float("inf") and 0 < second < 1


@pytest.mark.parametrize("score", SCORES)
def test_tied_names_are_one_parameter(score: str) -> None:
    program, _ = zoo_program("gpt2")
    names = ["lm_head.weight", "transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"]
    found = [n for n, value, axes in element_scores(study(), program, zoo_samples(program, "gpt2"), score, names)]
    assert sorted(found) == ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight"]


def test_what_has_no_inputs_is_left_out_and_nothing_left_is_an_error() -> None:
    program, _ = zoo_program("bert")
    samples = zoo_samples(program, "bert")
    names = ["encoder.layer.0.output.dense.weight", "encoder.layer.0.output.dense.bias", "embeddings.word_embeddings.weight"]
    assert list(scores(program, samples, "wanda", *names)) == names[:1]
    assert list(scores(program, samples, "taylor", *names)) == names[:1] + names[1:2] + names[2:]
    with pytest.raises(SurgeryError) as error:
        scores(program, samples, "wanda", *names[1:])
    assert codes(error) == ["S0754"]


def test_regions_may_be_any_values() -> None:
    """A site is only its two values: here one map between them."""
    program = capture(One([[0.0, 1], [1, 0]]), {"x": torch.ones(2, 3, 2)})
    x = next(n for n in program.graph.graph.nodes if n.op == "placeholder")
    y = next(n for n in program.graph.graph.nodes if n.op == "call_module")
    site = Site("map", "region", "map", input=NodeRef("", x.name), output=NodeRef("", y.name))
    assert abs(layer_scores(study(), program, Samples([{"x": torch.tensor([[1.0, 0.0]])}]), [site])[0] - 1.0) < 1e-12
