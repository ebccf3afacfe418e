"""Every attaching method on captured models: all sites that it accepts, verified, unchanged at the start, folded = unfolded."""

from __future__ import annotations

import pytest
import torch

from surgery.core.diagnostics import SurgeryError
from surgery.model.program import Program
from surgery.passes import registry
from surgery.passes.verify import verify
from tests.captured_programs import zoo_program
from tests.test_contract import ATTACHING, METHODS, sample
from tests.workbench import difference, fold_all, operation, outputs, perturb, run

CAUSAL = ["gpt2", "llama", "phi3", "mixtral"]
FAMILIES = ["bert", "gpt2", "llama", "phi3", "mixtral", "t5", "albert", "vit", "resnet"]


def attach_everywhere(program: Program, key: tuple[str, str], place: str) -> int:
    cls = METHODS[key]
    done = 0
    for site in program.anatomy.sites:
        wanted = {
            "attention": site.role.endswith(".attn"),
            "tokens": site.role.endswith("embed.tokens"),
            "stream": site.role.endswith((".attn", ".ffn")),
        }.get(cls.stands, site.op in ("linear", "conv1d", "conv", "embedding", "experts"))
        if not wanted:
            continue
        try:
            run(program, operation(program, *key, [site.role], place, **sample(cls)))
            done += 1
        except SurgeryError as exc:
            assert exc.diagnostics[0].code in {"attention": ("S0490",), "tokens": ("S0491",)}.get(cls.stands, ("S0271",)), (site.role, exc)
    return done


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_every_site_of_a_captured_model(family: str, key: tuple[str, str]) -> None:
    cls = METHODS[key]
    for place in cls.places:
        program, flat = zoo_program(family)
        base = outputs(program, *flat)
        done = attach_everywhere(program, key, place)
        sites = program.anatomy.sites
        stands = {  # what these two stand at; every family has a place for the others
            "sppara": any(s.op == "conv" and all(k % 2 for k in s.shape[2:]) for s in sites),
            "splopa": any(s.op == "linear" for s in sites),
            "prompt": family in (*CAUSAL, "bert", "albert", "t5"),
        }
        nowhere = (family == "resnet" and cls.kind == "insert") or not stands.get(key[1], True)
        assert bool(done) != nowhere
        if not done:
            continue
        verify(program, "attaching")
        if cls.identity != "changed":
            assert difference(outputs(program, *flat), base) <= max(1e-5, 10 * cls.identity_bound)
        perturb(program, 0.05)
        expected = outputs(program, *flat)
        assert all(torch.isfinite(e).all() for e in expected)
        assert difference(expected, base) > 1e-4
        fold_all(program)
        verify(program, "folding")
        assert difference(outputs(program, *flat), expected) <= 5e-5
        if cls.fold_class == "merge":
            assert not program.attachments


@pytest.mark.parametrize(("family", "added"), [("bert", 8 * 3 * 2 * 64), ("llama", 3 * 8 * (64 + 48))])
def test_counts_on_queries_and_values(family: str, added: int) -> None:
    program, _ = zoo_program(family)
    roles = [f"layers[{i}].attn.{r}" for i in range(3) for r in "qv"]
    changes = run(program, operation(program, "adapt", "lora", roles, rank=8))
    assert sum(c.added for c in changes) == added == sum(c.trainable for c in changes)
    trainable = {n for n, _ in program.graph.named_parameters()} - program.frozen
    assert trainable == {t for a in program.attachments for t in a.tensors}


@pytest.mark.parametrize("key", ATTACHING, ids="/".join)
def test_half_precision_base_with_adapters_in_float32(key: tuple[str, str]) -> None:
    from surgery.model.live import Tensors
    from surgery.model.runtime import build_module
    from tests.zoo import ZOO

    program, _ = zoo_program("bert")
    cls = METHODS[key]
    if not attach_everywhere(program, key, cls.places[0]):
        assert key[1] == "sppara"  # it has no convolution; the contract suite runs it in half precision
        return
    module = build_module(program, Tensors(registry.function).all(program), dtype=torch.bfloat16).train()
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert set(trained) == {t for a in program.attachments for t in a.tensors}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for n, p in module.named_parameters() if n not in trained} == {torch.bfloat16}
    out = module(**ZOO["bert"].inputs(2, 9)).last_hidden_state
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    grads = [p.grad for n, p in trained.items() if p.grad is not None]
    assert len(grads) >= len(trained) - 6 and all(torch.isfinite(g).all() for g in grads)  # the pooler's adapters are not used here


def test_norm_placements_of_a_post_norm_model() -> None:
    program, flat = zoo_program("bert")
    base = outputs(program, *flat)
    run(
        program, operation(program, "insert", "bottleneck", [f"layers[{i}].ffn" for i in range(3)], "after", width=4, position="after_norm")
    )
    verify(program, "inserting")
    assert difference(outputs(program, *flat), base) == 0
    assert registry.get("insert", "bottleneck")
