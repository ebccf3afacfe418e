"""Adapters on shared layers: one a layer, or one for all uses; what folds and what would undo the sharing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
from surgery.core.diagnostics import SurgeryError
from surgery.model.program import Origin, Program
from surgery.model.realise import held
from surgery.model.weights import Init
from surgery.passes import registry
from surgery.passes.expect import measure
from surgery.passes.kinds import tie_fold
from surgery.passes.operation import Resolved
from surgery.passes.verify import verify
from tests.test_drop import parameters
from tests.test_tie import _program, outputs, shared_program
from tests.workbench import operation, run


def test_adapters_are_per_layer_and_train_apart() -> None:
    program = shared_program()
    run(program, operation(program, "adapt", "lora", [f"layers[{i}].attn.q" for i in range(4)], rank=2))
    verify(program, "the test")
    assert measure(program, "trainable").value == 4 * 2 * (32 + 32)
    assert [a.module for a in program.attachments] == [f"model.layers.{i}.self_attn.q_proj.lora" for i in range(4)]
    assert len({t for a in program.attachments for t in a.tensors}) == 8


def zero_free(program: Program) -> None:
    """Adapters as if trained: what starts at zero gets values."""
    for i, name in enumerate(sorted({program.aliases.get(t, t) for a in program.attachments for t in a.tensors})):
        expr = program.weights[name]
        if isinstance(expr, Init):
            value = torch.randn(expr.shape, generator=torch.Generator().manual_seed(i)) * 0.1
            program.weights[name] = held(value)


def flat() -> list[Tensor]:
    from surgery.model.sample import sample_inputs

    return sample_inputs(_program(), batch=2, length=6, seed=1)


QUERIES = [f"layers[{i}].attn.q" for i in range(4)]


def fold(program: Program, emit: bool = False) -> list[Any]:
    sites = tuple({a.site.role: a.site for a in program.attachments}.values())
    method = registry.get("fold", "all")()
    origin = Origin(verb="emit" if emit else "fold", method="all")
    changes: list[Any] = run(program, Resolved("fold", "all", "on", sites, (method,) * max(1, len(sites)), origin))
    verify(program, "the test")
    return changes


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_shared_adapter_is_one_for_all_uses_and_folds_into_the_shared_weight(method: str) -> None:
    program = shared_program()
    before = parameters(program)
    run(program, operation(program, "adapt", method, QUERIES, rank=2, shared=True))
    verify(program, "the test")
    each = 2 * (32 + 32) + (32 if method == "dora" else 0)
    assert parameters(program) - before == 2 * each == measure(program, "trainable").value  # two groups of two layers
    zero_free(program)
    live_outputs = outputs(program, flat())
    fold(program)
    assert not program.attachments and parameters(program) == before
    assert program.aliases["model.layers.1.self_attn.q_proj.weight"] == "model.layers.0.self_attn.q_proj.weight"
    for x, y in zip(outputs(program, flat()), live_outputs, strict=True):
        assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)


def test_an_adapter_of_one_layer_does_not_fold_into_a_shared_weight() -> None:
    program = shared_program()
    run(program, operation(program, "adapt", "lora", [*QUERIES, "head"], rank=2))
    zero_free(program)
    live_outputs, count = outputs(program, flat()), parameters(program)
    assert [a.site.role for a in tie_fold.stay_live(program)] == QUERIES
    with pytest.raises(SurgeryError, match=r"changes a weight that it shares with `layers\[1\].attn.q`") as e:
        fold(program)
    assert e.value.diagnostics[0].code == "S0489"
    changes = fold(program, emit=True)  # what an output folds by itself
    assert sum("folding would undo that" in c.note for c in changes) == 4
    assert [a.site.role for a in program.attachments] == QUERIES
    assert parameters(program) == count - 2 * (32 + 99)  # that of the head is folded
    for x, y in zip(outputs(program, flat()), live_outputs, strict=True):
        assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)


def test_a_shared_rewrite_needs_every_use() -> None:
    program = shared_program()
    with pytest.raises(SurgeryError, match="is not selected") as e:
        run(program, operation(program, "adapt", "pissa", QUERIES[:1], rank=2, shared=True))
    assert e.value.diagnostics[0].code == "S0489"
    program = shared_program()
    before = parameters(program)
    run(program, operation(program, "adapt", "pissa", QUERIES, rank=2, shared=True))
    verify(program, "the test")
    assert parameters(program) - before == 2 * 2 * (32 + 32)
    for x, y in zip(outputs(program, flat()), outputs(shared_program(), flat()), strict=True):
        assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)


def test_rewriting_a_shared_weight_for_one_layer_says_that_it_is_no_longer_shared() -> None:
    program = shared_program()
    changes = run(program, operation(program, "adapt", "pissa", ["layers[1].attn.q"], rank=2))
    verify(program, "the test")
    assert "no longer tied" in changes[0].note and changes[0].added == 32 * 32 + 2 * (32 + 32)
    for x, y in zip(outputs(program, flat()), outputs(shared_program(), flat()), strict=True):
        assert torch.allclose(x, y, atol=1e-4, rtol=1e-4)


def test_an_adapter_that_reads_a_shared_bias_reads_its_own_layers_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DoRA divides the output without its bias, so every layer that uses the shared projection must reach the shared bias."""
    from tests.driver_support import checkpoint, surgery, write

    monkeypatch.chdir(tmp_path)
    text = "surg 1\n\nshare layers(groups = all) on layers\nadapt dora(rank = 2) on layers[*].attn.q\n"
    write("a.surg", text + 'emit torch to "out"\n')
    ran = surgery("compile", "a.surg", checkpoint("bert"), "--format", "json")
    assert ran.code == 0, ran.err + ran.out
    claims = ran.json["certificates"]  # of the sharing, and of the adapters, which change nothing at the start
    assert len(claims) >= 2 and all(c["ok"] and c["max_abs_error"] <= 1e-5 for c in claims), claims


def test_an_output_that_unties_head_and_embedding_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folding the head's adapter for an output makes two tensors of one there; with the adapter live they stay one."""
    from tests.driver_support import model

    monkeypatch.chdir(tmp_path)
    text = 'surg 1\n\nadapt lora(rank = 2) on head\nemit onnx to "a.onnx"\nemit onnx(live = true) to "b.onnx"\nemit torch to "c"\n'
    said = [[f for f in step.facts if "no longer tied" in f] for step in surgery.plan(text, model("gpt2")).steps]
    assert said == [[], ["folded for this output, lm_head.weight is no longer tied: 3,168 parameters more"], [], []]
