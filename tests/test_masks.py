"""Masks as a part of the program: exact zeros through adapters, folds, copies, training, artifacts and exports."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.core.diagnostics import SurgeryError
from surgery.model import graphjson, masked
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.model.realise import realise
from surgery.model.runtime import build_module
from surgery.model.weights import Masked
from surgery.passes import registry
from surgery.passes.verify import verify
from surgery.train import Controller
from tests.captured_programs import zoo_program
from tests.workbench import bench_program, difference, fold_all, inputs, live, operation, outputs, perturb, run

ROLES = (
    "layers[0].attn.q", "layers[0].attn.v", "layers[0].attn.o", "layers[0].ffn.up", "layers[0].ffn.experts.up",
    "layers[0].ffn.experts.down", "stem.conv[0]", "stem.conv[1]", "head",
)  # fmt: skip
HALF = {"qkv.weight": 256, "o_weight": 128, "up.weight": 256, "experts": 288, "experts_down": 576, "conv.weight": 108, "grouped.weight": 36, "head.weight": 184}  # fmt: skip
LINEAR = ("layers[0].attn.q", "layers[0].attn.o", "layers[0].ffn.up", "stem.conv[0]", "layers[0].ffn.experts.up")


def prune(program: Program, *roles: str, **params: object) -> Program:
    anatomy = program.anatomy
    run(program, operation(program, "prune", "mask", list(roles), **params))
    program._anatomy = anatomy  # the workbench states its sites
    return program


def held(program: Program) -> dict[str, int]:
    """Zeros that each mask holds; every one of them is a zero of the weight."""
    tensors = Tensors(registry.function)
    found = masked.zeros(program, lambda name: tensors.of(program, name))
    assert not any(bad for _, bad in found.values()), found
    return {name: count for name, (count, _) in found.items()}


def nonzero(program: Program, name: str) -> int:
    return int((Tensors(registry.function).of(program, name) != 0).sum())


def test_every_kind_of_weight_has_exact_zeros() -> None:
    program = prune(bench_program(), *ROLES, ratio=0.5)
    assert held(program) == HALF
    for name, count in HALF.items():
        assert program.weights[name].shape == program.weights[f"{name}_mask.keep"].shape
        assert nonzero(program, name) == torch.Size(program.weights[name].shape).numel() - count
    base, tensors = bench_program(), Tensors(registry.function)
    for name in HALF:
        now, before = tensors.of(program, name), tensors.of(base, "tokens.weight" if name == "head.weight" else name)
        assert torch.equal(now[now != 0], before[now != 0])
    stays, size = tensors.of(program, "o_weight") != 0, tensors.of(base, "o_weight").abs()
    assert float(size[stays].min()) >= float(size[~stays].max())
    assert program.weights["tokens.weight"] == base.weights["tokens.weight"]  # the head was untied from it


def test_plan_reads_nothing_and_masks_stand_behind_their_weights() -> None:
    program = prune(bench_program(), *ROLES, pattern=None, ratio=0.25)
    names = list(program.weights)
    for weight, mask in masked.masks(program).items():
        assert names[names.index(weight) + 1] == mask
        assert isinstance(program.weights[weight], Masked) and program.weights[weight].keep is program.weights[mask]


def test_slices_of_one_weight_have_one_mask() -> None:
    program = prune(prune(bench_program(), "layers[0].attn.q", ratio=0.5), "layers[0].attn.v", pattern="1:4")
    assert held(program) == {"qkv.weight": 128 + 192}
    keep = realise(program.weights["qkv.weight_mask.keep"], functions=registry.function)
    assert bool(keep[16:32].all())  # the key is as it was
    assert set(keep[32:].unflatten(1, (4, 4)).sum(-1).flatten().tolist()) == {1}


def test_a_second_mask_adds_to_the_first() -> None:
    program = prune(prune(bench_program(), "layers[0].ffn.up", ratio=0.3), "layers[0].ffn.up", ratio=0.5)
    assert held(program) == {"up.weight": 256}
    assert masked.masks(program) == {"up.weight": "up.weight_mask.keep"}
    prune(program, "layers[0].ffn.up", ratio=0.1)
    assert held(program) == {"up.weight": 256}


ADAPTERS = [key for key, cls in registry.methods().items() if cls.kind == "delta" and key[0] == "adapt"]


@pytest.mark.parametrize("key", ADAPTERS, ids="/".join)
def test_adapters_fold_without_losing_a_zero(key: tuple[str, str]) -> None:
    """Prune, adapt, fold: live = folded, and the sparsity is the same to the element."""
    cls = registry.get(*key)
    small = {p.name: 4 for p in cls.info().params if p.name == "rank"}
    for role in LINEAR:
        program = prune(bench_program(), role, ratio=0.5)
        before, base = held(program), outputs(program)
        try:
            run(program, operation(program, *key, [role], **small))
        except SurgeryError as exc:
            assert exc.diagnostics[0].code in ("S0270", "S0271"), exc
            continue
        if cls.identity != "changed":
            assert difference(outputs(program), base) <= max(1e-6, cls.identity_bound)
        assert held(program) == before
        perturb(program)
        expected = outputs(program)
        assert difference(expected, base) > 1e-3, "the test must see the change"
        stored = copy.copy(program)
        stored.graph = graphjson.load(graphjson.dump(program.graph))
        assert difference(outputs(stored), expected) == 0
        fold_all(program)
        assert not program.attachments and difference(outputs(program), expected) <= 1e-5
        assert held(program) == before
        (name,) = before
        assert nonzero(program, name) == torch.Size(program.weights[name].shape).numel() - before[name]


@pytest.mark.parametrize("role", LINEAR)
def test_a_mask_over_adapters_masks_base_and_change(role: str) -> None:
    """Adapt, prune, fold: the base is ranked, and from then on the adapters stay off its zeros."""
    plain = prune(bench_program(), role, ratio=0.5)
    program = bench_program()
    for name in ("lora", "dora"):
        run(program, operation(program, "adapt", name, [role], rank=4))
    perturb(program)
    free = outputs(program)
    prune(program, role, ratio=0.5)
    verify_masks(program)
    assert {n: realise(program.weights[m], functions=registry.function).tolist() for n, m in masked.masks(program).items()} == {
        n: realise(plain.weights[m], functions=registry.function).tolist() for n, m in masked.masks(plain).items()
    }
    expected = outputs(program)
    assert difference(expected, free) > 1e-3
    fold_all(program)
    assert difference(outputs(program), expected) <= 1e-5 and held(program) == held(plain)


def test_masked_adapters_compile_and_run_in_half_precision() -> None:
    program = prune(bench_program(), *LINEAR, ratio=0.5)
    anatomy = program.anatomy
    for name in ("lora", "dora"):
        run(program, operation(program, "adapt", name, list(LINEAR), rank=4))
    program._anatomy = anatomy
    perturb(program)
    expected = outputs(program)
    got = outputs(program, dtype=torch.bfloat16)
    assert all(o.dtype == torch.bfloat16 for o in got) and difference(got, expected) < 0.06
    module = live(program).train()
    sum(o.square().mean() for o in module(*inputs())).backward()
    grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    sum(o.square().mean() for o in torch.compile(module, backend="aot_eager", fullgraph=True)(*inputs())).backward()
    assert {n for n, p in module.named_parameters() if p.grad is not None} == set(grads)
    for name, parameter in module.named_parameters():
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], atol=1e-5, rtol=1e-4)


def test_a_mask_behind_a_fold_ranks_what_was_folded() -> None:
    program = bench_program()
    run(program, operation(program, "adapt", "lora", ["layers[0].ffn.up"], rank=4))
    perturb(program)
    fold_all(program)
    folded = Tensors(registry.function).of(program, "up.weight").clone()
    prune(program, "layers[0].ffn.up", ratio=0.5)
    now = Tensors(registry.function).of(program, "up.weight")
    order = folded.abs().flatten().argsort(stable=True)
    assert set((now == 0).flatten().nonzero().flatten().tolist()) == set(order[:256].tolist())


def verify_masks(program: Program) -> None:
    """The verifier's rules, but for the specs that the workbench's graph leaves out."""
    try:
        verify(program, "a test")
    except SurgeryError as exc:
        assert [n for n in exc.diagnostics[0].notes if not n.startswith("specs_present")] == []


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["mask", "lora", "dora", "rslora", "pissa", "fold"]), st.sampled_from(ROLES), st.sampled_from([0.2, 0.5, "2:4", "1:2"]),
    ),
    min_size=2, max_size=5,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(STEPS)
def test_any_order_of_masks_adapters_and_folds(steps: list[tuple[str, str, object]]) -> None:
    """What is accepted works to the end: zeros only grow, live equals folded, and every rule of the verifier holds."""
    program = bench_program()
    zeros: dict[str, int] = {}
    for verb, role, amount in steps:
        try:
            if verb == "mask":
                prune(program, role, **({"pattern": amount} if isinstance(amount, str) else {"ratio": amount}))
            elif verb == "fold":
                fold_all(program)
            else:
                anatomy = program.anatomy
                run(program, operation(program, "adapt", verb, [role], rank=2))
                program._anatomy = anatomy
                perturb(program, 0.05)
        except SurgeryError as exc:
            assert exc.diagnostics[0].code in ("S0271", "S0460", "S0462", "S0470"), exc
            continue
        now = held(program)
        assert all(now[n] >= count for n, count in zeros.items())
        zeros = now
    verify_masks(program)
    expected = outputs(program)
    fold_all(program)
    assert difference(outputs(program), expected) <= 2e-5
    assert held(program) == zeros


def test_a_branch_that_widens_a_masked_block_leaves_its_mask() -> None:
    program = prune(bench_program(), "layers[0].ffn.up", "layers[0].ffn.down", ratio=0.5)
    before = held(program)
    run(program, operation(program, "insert", "bottleneck", ["layers[0].ffn"], "beside", width=4, activation="gelu"))
    perturb(program)
    expected = outputs(program)
    changes = fold_all(program)
    assert not program.attachments, changes
    assert difference(outputs(program), expected) <= 1e-5
    assert held(program) == before == {"up.weight": 256, "down.weight": 256}
    assert program.weights["up.weight_mask.keep"].shape == (36, 16)
    verify_masks(program)


# ------------------------------------------------------------------ training


class Mixing(torch.optim.SGD):
    """Moves every entry by the mean of the others' too, as optimizers with preconditioners do."""

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data -= group["lr"] * (p.grad + p.grad.mean() + 0.1)


def train(module: torch.nn.Module, optimizer: torch.optim.Optimizer, controller: Controller | None = None) -> None:
    module.train()
    for _ in range(4):
        loss = lambda: sum(o.square().mean() for o in module(*inputs()))  # noqa: E731
        if controller is not None:
            controller.step(loss)
            continue
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


def live_zeros(module: torch.nn.Module) -> int:
    """Masked entries of a running module that are zero; all of them must be."""
    total = 0
    for _, owner, mask in masked.mask_modules(module):
        gone = getattr(owner, mask.leaf)[~mask.keep]
        assert int((gone != 0).sum()) == 0
        total += gone.numel()
    return total


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
])  # fmt: skip
def test_full_training_in_a_plain_loop_keeps_the_zeros(make: object) -> None:
    program = prune(bench_program(), *ROLES, ratio=0.5)
    module = live(program)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    train(module, make(list(module.parameters())))  # type: ignore[operator]
    assert live_zeros(module) == sum(HALF.values())
    for name in HALF:
        old, new = before[name], module.get_parameter(name)
        assert bool((new != old)[old != 0].all())  # what is not masked trains


def test_a_copy_and_a_weight_opened_later_keep_the_zeros() -> None:
    program = prune(bench_program(), "layers[0].ffn.up", "layers[0].attn.o", ratio=0.5)
    program.frozen.update(n for n, _ in program.graph.named_parameters())
    module = live(program)
    for p in module.parameters():
        p.requires_grad_(True)
    train(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    assert live_zeros(module) == 256 + 128


def test_a_controller_sets_what_an_optimizer_mixed_back_to_zero() -> None:
    program = prune(bench_program(), *ROLES, ratio=0.5)
    module = live(program)
    optimizer = Mixing(module.parameters(), lr=1e-2)
    train(module, optimizer, Controller(module, optimizer))
    assert live_zeros(module) == sum(HALF.values())
    free = live(program)
    train(free, Mixing(free.parameters(), lr=1e-2))
    with pytest.raises(AssertionError):
        live_zeros(free)  # without the controller this optimizer fills them


def test_adapters_and_base_train_together_under_a_mask() -> None:
    program = prune(bench_program(), "layers[0].ffn.up", ratio=0.5)
    run(program, operation(program, "adapt", "lora", ["layers[0].ffn.up"], rank=4))
    program.frozen.discard("up.weight")
    module = live(program)
    train(module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2))
    assert live_zeros(module) == 256
    with torch.no_grad():
        expected = list(module(*inputs()))
    for name, p in module.named_parameters():
        if name in program.weights:
            from surgery.model.realise import held as hold

            program.weights[name] = hold(p.detach())
    fold_all(program)
    assert difference(outputs(program), expected) <= 1e-5 and held(program) == {"up.weight": 256}


def test_cuts_take_the_mask_along() -> None:
    """Units removed from a masked weight: what is left has the mask that it had."""
    from surgery.model.cut import cut
    from surgery.model.program import Origin

    program, flat = zoo_program("bert")
    site = next(s for s in program.anatomy.sites if s.role == "layers[1].ffn.up")
    prune(program, "layers[1].ffn.up", "layers[1].ffn.down", ratio=0.5)
    run(program, operation(program, "adapt", "lora", ["layers[1].ffn.up", "layers[1].ffn.down"], rank=2))
    before = {n: realise(program.weights[m], functions=registry.function) for n, m in masked.masks(program).items()}
    group = program.dims.coupled(site.weight, 0, [1, 5, 6])
    cut(program, group, Origin())
    verify(program, "the cut")
    kept = [i for i in range(64) if i not in (1, 5, 6)]
    for name, mask in masked.masks(program).items():
        now = realise(program.weights[mask], functions=registry.function)
        old = before[name]
        assert torch.equal(now, old[kept] if name == site.weight else old[:, kept])
    held(program)
    perturb(program)
    module = build_module(program, Tensors(registry.function).all(program))
    with torch.no_grad():
        expected = module.run_flat(flat)  # type: ignore[operator]
    fold_all(program)
    verify(program, "the fold")
    folded = build_module(program, Tensors(registry.function).all(program))
    with torch.no_grad():
        assert difference(list(folded.run_flat(flat)), list(expected)) <= 1e-5  # type: ignore[operator]


def test_weights_that_are_not_finite_are_named() -> None:
    program = prune(bench_program(), "layers[0].ffn.up")
    source = program.weights["up.weight"]
    assert isinstance(source, Masked)
    source.source.tensor[3, 4] = float("nan")  # type: ignore[attr-defined]
    with pytest.raises(SurgeryError) as found:
        Tensors(registry.function).of(program, "up.weight")
    assert found.value.diagnostics[0].code == "S0752" and "`up.weight`" in found.value.diagnostics[0].message


def test_a_share_that_takes_nothing_is_said_and_leaves_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    import surgery as api
    from tests.driver_support import checkpoint

    plan = api.plan("surg 1\nprune mask(ratio = {0: 0%, 1: 50%, 2: 0%}) on layers[*].ffn.up\n", checkpoint("bert"))
    assert plan.ok and [d.code for d in plan.diagnostics] == ["S0449", "S0463"]
    assert plan.diagnostics[0].message == "no weight of `layers[0, 2].ffn.up` becomes zero: the share is smaller than one weight"
    none = api.plan("surg 1\nprune mask(ratio = 0%) on layers[*].ffn.up\nexpect sparsity == 0%\n", checkpoint("bert"))
    assert [d.code for d in none.diagnostics] == ["S0449"] and none.diagnostics[0].span.source.text[
        none.diagnostics[0].span.start :
    ].startswith("0%")
