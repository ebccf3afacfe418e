"""Counts against the live model, against torch's own counter, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from surgery.model import cost
from tests.anatomy_support import module_program, zoo_program
from tests.zoo import ZOO

LENGTH = 16
COUNTED = ["bert", "roberta", "distilbert", "albert", "deberta-v2", "gpt2", "llama", "qwen3", "gemma3_text", "phi3", "t5", "bart", "whisper", "vit", "swin", "clip",
           "resnet", "convnext"]  # fmt: skip


@pytest.mark.parametrize("family", COUNTED)
def test_flops_equal_the_counter_on_the_live_model(family: str) -> None:
    model = ZOO[family].make_model()
    inputs = {k: v for k, v in ZOO[family].inputs(1, LENGTH).items() if k != "past_key_values"}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.int64:
            inputs[name] = torch.ones(1, LENGTH, dtype=torch.int64)
            if "position" in name:
                inputs[name] = torch.arange(LENGTH)[None]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # the fused CPU kernel is not in torch's table
        model(**inputs)
    assert cost.count(zoo_program(family), LENGTH).total == counter.get_total_flops()


@pytest.mark.parametrize("family", [*COUNTED, "mixtral"])
def test_parameters_and_bytes_equal_the_live_model(family: str) -> None:
    model = ZOO[family].make_model()
    program = zoo_program(family)
    assert cost.parameters(program) == sum(p.numel() for p in model.parameters())
    assert cost.bytes_of(program) == sum(
        p.numel() * getattr(torch, program.weights[program.aliases.get(n, n)].dtype).itemsize for n, p in model.named_parameters()
    )


def test_routed_experts_count_by_top_k() -> None:
    c = ZOO["mixtral"].make_config()
    program = zoo_program("mixtral")
    expert = 3 * c.hidden_size * c.intermediate_size
    idle = c.num_hidden_layers * expert * (c.num_local_experts - c.num_experts_per_tok)
    assert cost.active_parameters(program) == cost.parameters(program) - idle
    found = cost.count(program, LENGTH)
    routed = sum(n.flops for n in found.nodes if ".experts." in n.weight)
    assert routed == 2 * expert * c.num_experts_per_tok * LENGTH * c.num_hidden_layers


def test_linear_by_hand() -> None:
    program = module_program(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False)), {"input": torch.randn(3, 8)})
    assert cost.parameters(program) == 8 * 16 + 16 + 16 * 4
    assert cost.count(program).total == 2 * (8 * 16 + 16 * 4)
    assert cost.flops_per_token(program) == 2 * (8 * 16 + 16 * 4)


def test_convolution_by_hand() -> None:
    program = module_program(nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)), {"input": torch.randn(2, 4, 8, 8)})
    assert cost.count(program).total == 2 * (4 * 4) * 6 * 2 * 3 * 3


def test_sites_add_up_to_the_whole() -> None:
    program = zoo_program("gpt2")
    c = ZOO["gpt2"].make_config()
    by_site = cost.flops_by_site(program, LENGTH)
    d = c.n_embd
    assert by_site["layers[0].attn.q"] == by_site["layers[0].attn.v"] == 2 * d * d
    assert by_site["layers[0].ffn.up"] == 2 * d * 4 * d
    assert by_site["layers[0].attn"] == 2 * 4 * d * d + 2 * 2 * LENGTH * d
    assert by_site["layers[0]"] == by_site["layers[0].attn"] + by_site["layers[0].ffn"]
    assert 3 * by_site["layers[0]"] + 2 * d * c.vocab_size == cost.flops_per_token(program, LENGTH)
    q = [s for s in program.anatomy.sites if s.role.endswith((".q", ".k")) and s.layer == 0]
    assert cost.flops_of_sites(program, q, LENGTH) == 2 * 2 * d * d
