"""Adapters on single experts of fused tensors: only these change, folded = unfolded, counts are exact, cuts renumber them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery as api
from surgery.core.diagnostics import SurgeryError
from surgery.driver import load_spec
from surgery.folding import fold_all, stir
from surgery.model.live import Tensors
from surgery.model.program import Origin, Program
from surgery.model.running import Runner, floats
from surgery.passes import registry
from surgery.passes.resolve import resolve
from surgery.passes.verify import verify
from surgery.session import apply
from tests.captured_programs import zoo_program
from tests.cut_support import remove
from tests.driver_support import checkpoint

STACKED = "surg 1\nadapt {} on layers[*].ffn.experts[0, 2].{{up, down}}\nadapt lora(rank = 1) as whole on layers[0].ffn.experts.up\n"


def adapted(text: str) -> Program:
    program = zoo_program("mixtral")[0].copy()
    for statement in load_spec(text).statements:
        apply(program, resolve(program, statement))
    verify(program, "the statement")
    return program


def outputs(program: Program) -> list[torch.Tensor]:
    return floats(Runner(program, Tensors(registry.function))(zoo_program("mixtral")[1]))


def apart(left: Program, right: Program) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(outputs(left), outputs(right), strict=True))


@pytest.mark.parametrize("method", ["lora(rank = 2)", "dora(rank = 2)", "pissa(rank = 2)", "splora(rank = 2)"])
def test_one_expert_changes_and_folds(method: str) -> None:
    """Beside an adapter on all experts of one of the tensors. The bits of the other experts stay."""
    program = adapted(STACKED.format(method))
    assert len(program.attachments) == 13
    for a in program.attachments:
        module = program.module(a.module)
        own = {program.aliases.get(t, t) for t in a.tensors}
        trains = sum(torch.Size(program.weights[n].shape).numel() for n in own if n not in program.frozen)
        shared = len(own) and any(own & {program.aliases.get(t, t) for t in b.tensors} for b in program.attachments if b is not a)
        assert trains == a.method.count(module.site) or shared, a.site.role
        if a.site.op == "expert":
            assert module.site.experts == 1 and module.site.member == a.site.facts["expert"]
    stirred = stir(program)
    settled = stirred.copy()
    fold_all(settled, Origin(verb="fold", method="all"))
    verify(settled, "the fold")
    assert not settled.attachments
    base = zoo_program("mixtral")[0]
    assert apart(stirred, settled) < 2e-5 < apart(base, settled)
    tensors = Tensors(registry.function)
    for name in base.weights:
        if name.endswith(("gate_up_proj", "down_proj")) and ".1." in name:  # layer 1: only single experts
            old, new = tensors.of(base, name), tensors.of(settled, name)
            assert torch.equal(old[[1, 3]], new[[1, 3]]), name
            assert all(not torch.equal(old[i], new[i]) for i in (0, 2)), name


def test_counts_and_roles_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = api.plan(
        "surg 1\nadapt lora(rank = 2) on layers[*].ffn.experts[2].{up, gate, down}\nexpect trainable == 1728\n", checkpoint("mixtral")
    )
    assert plan.ok, plan.diagnostics
    found = {s.role: s.added for s in plan.steps[0].sites}
    assert found == {f"layers[{i}].ffn.experts[2].{part}": 2 * (64 + 32) for i in (0, 1, 2) for part in ("up", "gate", "down")}


def test_an_artifact_keeps_the_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = api.compile('surg 1\nadapt lora(rank = 2) on layers[1].ffn.experts[2].up\nemit torch to "out"\n', checkpoint("mixtral"))
    assert {c["claim"]: c["ok"] for c in done.certificates} == {"unchanged at init": True, "loaded = program": True}
    module = api.load("out")
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    assert sorted(tuple(p.shape) for p in trained.values()) == [(1, 2, 32), (1, 64, 2)]
    assert all(".experts.lora_up_2." in n for n in trained), list(trained)


def test_cuts_renumber_an_expert_or_are_refused() -> None:
    """Expert 0 goes: what was at expert 2 is at expert 1 and changes the same numbers."""
    program = stir(adapted("surg 1\nadapt lora(rank = 2) on layers[*].ffn.experts[2].{up, down}\n"))
    experts = [leaf for leaf in program.dims.leaves(program.dims.parameter("model.layers.0.mlp.experts.down_proj")[0])]
    done = remove(program, {experts[0]: [0]})
    moved = [a for a in done.after.attachments if a.site.role.startswith("layers[0]")]
    assert sorted(a.site.role for a in moved) == ["layers[0].ffn.experts[1].down", "layers[0].ffn.experts[1].up"]
    assert all(done.after.module(a.module).site.member == a.site.facts["expert"] == 1 for a in moved)
    first, second = done.after.copy(), program.copy()
    fold_all(first, Origin(verb="fold", method="all"))
    fold_all(second, Origin(verb="fold", method="all"))
    tensors = Tensors(registry.function)
    for name in ("model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"):
        assert torch.equal(tensors.of(first, name), tensors.of(second, name)[1:])
    with pytest.raises(SurgeryError) as caught:
        remove(program, {experts[0]: [2]})
    assert caught.value.diagnostics[0].code == "S0431" and "the one expert that it changes would go" in str(caught.value.diagnostics[0])


def test_masks_of_one_expert_say_what_to_select() -> None:
    with pytest.raises(SurgeryError) as caught:
        adapted("surg 1\nprune mask(ratio = 50%) on layers[0].ffn.experts[2].up\n")
    assert caught.value.diagnostics[0].code == "S0461" and "all experts" in caught.value.diagnostics[0].help[0]
