"""Worked examples of the low-rank methods, published counts, and agreement with peft."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.core.diagnostics import SurgeryError
from surgery.core.site import NodeRef, Site
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.model.weights import Held
from surgery.passes import registry
from surgery.passes.kinds.geometry import Geometry
from tests.workbench import bench_program, difference, fold_all, inputs, live, make_program, operation, outputs, perturb, run

LOW_RANK = ["lora", "rslora", "dora", "pissa"]


def linear_program(weight: Any, bias: Any = None) -> Program:
    w = torch.tensor(weight, dtype=torch.float32)
    layer = nn.Linear(w.shape[1], w.shape[0], bias=bias is not None)
    with torch.no_grad():
        layer.weight.copy_(w)
        if bias is not None:
            layer.bias.copy_(torch.tensor(bias))
    model = nn.Sequential(layer)
    name = "0.bias" if bias is not None else ""
    site = [Site("layers[0].attn.q", "linear", "0", "0.weight", name, shape=tuple(w.shape), calls=(NodeRef("", "_0"),))]
    return make_program(model, (torch.zeros(1, w.shape[1]),), lambda nodes: site)


def put(program: Program, **values: Any) -> None:
    for name, value in values.items():
        tensor = torch.tensor(value, dtype=torch.float32)
        program.weights[f"{program.attachments[-1].module}.{name}"] = Held(tuple(tensor.shape), "float32", name, tensor)


def adapted(method: str, weight: Any, bias: Any = None, **params: Any) -> Program:
    program = linear_program(weight, bias)
    run(program, operation(program, "adapt", method, ["layers[0].attn.q"], **params))
    return program


def value(program: Program, name: str) -> Tensor:
    return Tensors(registry.function).of(program, name)


def test_lora_worked_example() -> None:
    program = adapted("lora", [[1.0, 0.0], [0.0, 1.0]], rank=1, alpha=2.0)
    put(program, A=[[1.0, 2.0]], B=[[3.0], [4.0]])
    x = torch.ones(1, 2)
    torch.testing.assert_close(outputs(program, x)[0], torch.tensor([[19.0, 25.0]]))
    fold_all(program)
    torch.testing.assert_close(value(program, "0.weight"), torch.tensor([[7.0, 12.0], [8.0, 17.0]]))
    torch.testing.assert_close(outputs(program, x)[0], torch.tensor([[19.0, 25.0]]))


def test_scales() -> None:
    assert registry.get("adapt", "rslora")(alpha=16.0, rank=4).scale() == 8
    assert registry.get("adapt", "lora")(alpha=16.0, rank=4).scale() == 4


@pytest.mark.parametrize("bias", [None, [0.5, -1.0]])
def test_dora_worked_example(bias: Any) -> None:
    program = adapted("dora", [[3.0, 4.0], [0.0, 2.0]], bias, rank=1, alpha=1.0)
    torch.testing.assert_close(value(program, "0.dora.magnitude"), torch.tensor([5.0, 2.0]))
    put(program, A=[[0.0, 1.0]], B=[[1.0], [0.0]])
    expected = torch.tensor([[6.859944, 2.0]]) + torch.tensor(bias or [0.0, 0.0])
    torch.testing.assert_close(outputs(program, torch.ones(1, 2))[0], expected)
    fold_all(program)
    torch.testing.assert_close(outputs(program, torch.ones(1, 2))[0], expected)


def test_dora_holds_the_norm_constant_in_backward() -> None:
    program = adapted("dora", [[3.0, 4.0], [0.0, 2.0]], rank=1, alpha=1.0)
    put(program, A=[[0.0, 1.0]], B=[[1.0], [0.0]])
    module = live(program)
    module(torch.ones(1, 2))[0].sum().backward()
    dora = module.get_submodule("0.dora")
    # y_0 = m_0 / sqrt(34) * (3 + 4 + B_0 A_1): with the norm constant dB_0 is m_0 / sqrt(34) * (A x)
    torch.testing.assert_close(dora.B.grad[0, 0], torch.tensor(5 / 34**0.5))
    torch.testing.assert_close(dora.magnitude.grad[0], torch.tensor(8 / 34**0.5))


def test_pissa_worked_example() -> None:
    program = adapted("pissa", [[3.0, 0.0], [0.0, 1.0]], rank=1, alpha=2.0)
    a, b = value(program, "0.pissa.A"), value(program, "0.pissa.B")
    torch.testing.assert_close(a.abs(), torch.tensor([[1.224745, 0.0]]))
    torch.testing.assert_close(a * b.t(), torch.tensor([[1.5, 0.0]]))
    torch.testing.assert_close(value(program, "0.weight"), torch.diag(torch.tensor([0.0, 1.0])), atol=1e-6, rtol=0)


@pytest.mark.parametrize("iterations", [0, 4])
def test_pissa_is_the_best_approximation_of_its_rank(iterations: int) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(24, 16) * torch.logspace(0, -2, 16)).tolist()
    program = adapted("pissa", weight, rank=3, alpha=6.0, iterations=iterations)
    moved = 2 * value(program, "0.pissa.B") @ value(program, "0.pissa.A")
    u, s, v = torch.linalg.svd(torch.tensor(weight), full_matrices=False)
    torch.testing.assert_close(moved, (u[:, :3] * s[:3]) @ v[:3], atol=1e-3, rtol=1e-3)
    x = torch.randn(5, 16)
    assert difference(outputs(program, x), [x @ torch.tensor(weight).t()]) < 1e-5


def test_pissa_needs_as_many_singular_values_as_its_rank() -> None:
    with pytest.raises(SurgeryError) as caught:
        adapted("pissa", [[3.0, 0.0], [0.0, 1.0]], rank=3)
    assert caught.value.diagnostics[0].code == "S0271" and "2 singular values" in str(caught.value)


@pytest.mark.parametrize(
    ("method", "rank", "sites", "count"),
    [
        ("lora", 8, 12 * [(768, 768)] * 2, 294_912),  # RoBERTa-base q, v
        ("lora", 16, 32 * [(4096, 4096)] * 4 + 32 * [(11008, 4096)] * 2 + 32 * [(4096, 11008)], 39_976_960),  # LLaMA-2-7B, all
        ("lora", 2, 32 * [(4096, 4096)] * 4 + 32 * [(11008, 4096)] * 2 + 32 * [(4096, 11008)], 4_997_120),
        ("pissa", 128, 32 * [(4096, 4096)] * 4 + 32 * [(11008, 4096)] * 2 + 32 * [(4096, 11008)], 319_815_680),
        ("dora", 32, 32 * [(4096, 4096)] * 3 + 32 * [(11008, 4096)] + 32 * [(4096, 11008)], 56_975_360),  # LLaMA-7B q, k, v, up, down
    ],
)
def test_published_counts(method: str, rank: int, sites: list[tuple[int, int]], count: int) -> None:
    made = registry.get("adapt", method)(rank=rank)
    assert sum(made.count(Geometry("linear", o, i, o)) for o, i in sites) == count


@pytest.mark.parametrize("method", LOW_RANK)
def test_several_adapters_add_up_and_fold_together(method: str) -> None:
    roles = ["layers[0].attn.q", "layers[0].attn.v", "layers[0].attn.o", "stem.conv[1]", "layers[0].ffn.experts.up"]
    single = bench_program()
    program = bench_program()
    for target in (single, program):
        run(target, operation(target, "adapt", method, roles, rank=4))
    run(program, operation(program, "adapt", "lora", roles, rank=2, label="second", seed=3))
    run(program, operation(program, "adapt", "dora", roles, rank=4, label="third", seed=4))
    assert len({a.module for a in program.attachments}) == 15
    assert difference(outputs(program), outputs(single)) <= 1e-5
    perturb(program)
    expected = outputs(program)
    fold_all(program)
    assert not program.attachments
    assert difference(outputs(program), expected) <= 2e-5


def test_folding_one_of_two() -> None:
    program = bench_program()
    for label in ("one", "two"):
        run(program, operation(program, "adapt", "lora", ["layers[0].attn.q", "layers[0].ffn.up"], label=label))
    perturb(program)
    expected = outputs(program)
    fold_all(program, "one")
    assert {a.name for a in program.attachments} == {"two"}
    assert difference(outputs(program), expected) <= 1e-5


def test_a_fold_under_an_adapter_that_reads_the_weight_is_refused() -> None:
    program = bench_program()
    run(program, operation(program, "adapt", "lora", ["layers[0].ffn.up"], label="one"))
    run(program, operation(program, "adapt", "dora", ["layers[0].ffn.up"], label="two"))
    before = dict(program.weights)
    with pytest.raises(SurgeryError) as caught:
        fold_all(program, "one")
    assert caught.value.diagnostics[0].code == "S0471"
    assert program.weights == before and len(program.attachments) == 2
    with pytest.raises(SurgeryError) as caught:
        run(program, operation(program, "adapt", "pissa", ["layers[0].ffn.up"]))
    assert caught.value.diagnostics[0].code == "S0470"


def test_names_that_are_taken_get_a_number() -> None:
    program = bench_program()
    for _ in range(3):
        run(program, operation(program, "adapt", "lora", ["layers[0].ffn.up"]))
    assert [a.module for a in program.attachments] == ["up.lora", "up.lora_2", "up.lora_3"]
    values = Tensors(registry.function).all(program)
    assert not torch.equal(values["up.lora.A"], values["up.lora_2.A"])


def test_folding_a_tied_head_leaves_the_embedding_alone() -> None:
    program = bench_program()
    tokens = value(program, "tokens.weight").clone()
    run(program, operation(program, "adapt", "lora", ["head"]))
    perturb(program)
    expected = outputs(program)
    notes = [c.note for c in fold_all(program)]
    assert "no longer tied" in notes[0] and not program.aliases
    assert torch.equal(value(program, "tokens.weight"), tokens)
    assert difference(outputs(program), expected) <= 1e-5


def test_a_region_has_no_weight_to_adapt() -> None:
    program = bench_program()
    with pytest.raises(SurgeryError) as caught:
        run(program, operation(program, "adapt", "lora", ["layers[0].attn"]))
    assert caught.value.diagnostics[0].code == "S0270"


def test_dropout_acts_while_training_only() -> None:
    program = bench_program()
    run(program, operation(program, "adapt", "lora", ["layers[0].ffn.up", "layers[0].attn.o", "stem.conv[0]"], dropout=0.5))
    perturb(program)
    module = live(program)
    example = inputs()
    still = [module(*example)[0] for _ in range(2)]
    assert torch.equal(*still)
    module.train()
    assert not torch.equal(module(*example)[0], module(*example)[0])


# ------------------------------------------------------------------ peft


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.first = nn.Linear(12, 20)
        self.second = nn.Linear(20, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.second(torch.tanh(self.first(self.embed(ids))))
        return self.conv(torch.transpose(h, 1, 2))


def small_sites(nodes: dict[str, Any]) -> list[Site]:
    def at(name: str) -> tuple[NodeRef, ...]:
        return (NodeRef("", name),)

    return [
        Site("embed.tokens", "embedding", "embed", "embed.weight", out_axis=1, in_axis=0, calls=at("embed")),
        Site("first", "linear", "first", "first.weight", "first.bias", calls=at("first")),
        Site("second", "linear", "second", "second.weight", "second.bias", calls=at("second")),
        Site("conv", "conv", "conv", "conv.weight", "conv.bias", calls=at("conv")),
    ]


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa"])
@pytest.mark.parametrize("roles", [["first", "second"], ["conv"], ["embed.tokens"]], ids=["linear", "conv", "embedding"])
def test_agrees_with_peft(method: str, roles: list[str]) -> None:
    peft = pytest.importorskip("peft")
    if method == "pissa" and roles != ["first", "second"]:
        pytest.skip("peft starts PiSSA at linear layers only")
    torch.manual_seed(0)
    base = Small()
    program = make_program(base, (torch.zeros(1, 4, dtype=torch.long),), small_sites)
    run(program, operation(program, "adapt", method, roles, rank=3, alpha=6.0))
    options: dict[str, Any] = {
        "lora": {},
        "rslora": {"use_rslora": True},
        "dora": {"use_dora": True},
        "pissa": {"init_lora_weights": "pissa"},
    }[method]
    names = [r.replace("embed.tokens", "embed") for r in roles]
    other = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, **options))
    ids = torch.randint(0, 11, (3, 7))
    if method == "pissa":
        assert difference(outputs(program, ids), [other(ids).detach()]) < 1e-5  # signs of singular vectors are free
    perturb(program)
    module = live(program)
    with torch.no_grad():
        for name in names:
            ours, theirs = module.get_submodule(f"{name}.{method}"), other.get_submodule(f"base_model.model.{name}")
            if name == "embed":
                theirs.lora_embedding_A["default"].copy_(ours.A)
                theirs.lora_embedding_B["default"].copy_(ours.B)
            else:
                theirs.lora_A["default"].weight.copy_(ours.A)
                theirs.lora_B["default"].weight.copy_(ours.B)
            if method == "dora":
                weight = theirs.lora_magnitude_vector["default"].weight
                weight.copy_(ours.magnitude.view(weight.shape))
            if method == "pissa":
                theirs.get_base_layer().weight.copy_(module.get_submodule(name).weight)
    assert {n for n, p in other.named_parameters() if p.requires_grad}.__len__() == sum(p.requires_grad for p in module.parameters())
    mine, yours = module(ids)[0], other(ids)
    torch.testing.assert_close(mine, yours, atol=2e-6, rtol=1e-5)
    mine.square().sum().backward()
    yours.square().sum().backward()
    for name in names:
        ours, theirs = module.get_submodule(f"{name}.{method}"), other.get_submodule(f"base_model.model.{name}")
        grad = theirs.lora_embedding_A["default"].grad if name == "embed" else theirs.lora_A["default"].weight.grad
        torch.testing.assert_close(ours.A.grad, grad, atol=1e-5, rtol=1e-4)
        if method == "dora":
            torch.testing.assert_close(
                ours.magnitude.grad, theirs.lora_magnitude_vector["default"].weight.grad.view(-1), atol=1e-5, rtol=1e-4
            )
