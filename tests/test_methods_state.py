"""Freezing, unfreezing and BitFit: exactly the named parameters, and errors instead of silence."""

from __future__ import annotations

import pytest

from surgery.core.diagnostics import SurgeryError
from surgery.model.program import Program
from tests.workbench import bench_program, operation, run

ATTN, FFN = "layers[0].attn", "layers[0].ffn"


def trained(program: Program) -> set[str]:
    return {n for n in program.weights if n not in program.frozen}


def test_bitfit_trains_exactly_the_biases() -> None:
    program = bench_program()
    changes = run(program, operation(program, "adapt", "bitfit", [ATTN, FFN, "layers[0].norm[0]"]))
    assert trained(program) == {"qkv.bias", "up.bias", "down.bias", "norm.bias"}  # `o_bias` is a bias, but not named one
    assert [c.trainable for c in changes] == [48, 32 + 16, 16] and not any(c.added for c in changes)


def test_bitfit_count_of_bert_base() -> None:
    import torch
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert biases == 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 768 + 768 == 102_912


def test_bitfit_without_a_bias_is_an_error() -> None:
    program = bench_program()
    with pytest.raises(SurgeryError) as caught:
        run(program, operation(program, "adapt", "bitfit", ["head", "stem.conv[1]"]))
    assert caught.value.diagnostics[0].code == "S0370" and "no bias" in str(caught.value)


def test_the_first_adapter_freezes_the_base_and_later_ones_do_not() -> None:
    program = bench_program()
    assert not program.frozen
    run(program, operation(program, "adapt", "lora", [f"{ATTN}.q"]))
    lora = {"qkv.lora_q.A", "qkv.lora_q.B"}
    assert trained(program) == lora
    run(program, operation(program, "unfreeze", "norms", [FFN, "layers[0].norm[1]"]))
    assert trained(program) == lora | {"norm_2.weight", "norm_2.bias"}
    run(program, operation(program, "insert", "bottleneck", [FFN], "after", label="wide"))
    assert trained(program) >= {"norm_2.weight", "norm_2.bias", "wide.down_weight"}


def test_what_was_unfrozen_above_the_first_adapter_still_trains() -> None:
    program = bench_program()
    run(program, operation(program, "unfreeze", "norms", ["layers[0].norm[0]"]))
    run(program, operation(program, "adapt", "lora", [f"{FFN}.up"]))
    assert trained(program) == {"norm.weight", "norm.bias", "up.lora.A", "up.lora.B"}


def test_freezing_a_part_takes_what_is_attached_there() -> None:
    program = bench_program()
    run(program, operation(program, "adapt", "lora", [f"{ATTN}.q", f"{FFN}.up"]))
    changes = run(program, operation(program, "freeze", "all", [ATTN]))
    assert trained(program) == {"up.lora.A", "up.lora.B"} and changes[0].trainable == 0
    run(program, operation(program, "unfreeze", "all", [ATTN]))
    assert trained(program) == {"up.lora.A", "up.lora.B", "qkv.lora_q.A", "qkv.lora_q.B", "qkv.weight", "qkv.bias", "o_weight", "o_bias"}


def test_a_part_of_a_stored_tensor_cannot_be_frozen_alone() -> None:
    program = bench_program()
    with pytest.raises(SurgeryError) as caught:
        run(program, operation(program, "freeze", "all", [f"{ATTN}.q"]))
    assert caught.value.diagnostics[0].code == "S0472"
    assert not program.frozen


def test_without_a_selector_everything_is_meant() -> None:
    program = bench_program()
    run(program, operation(program, "freeze", "all", []))
    assert trained(program) == set()
    run(program, operation(program, "unfreeze", "biases", []))
    assert trained(program) == {"qkv.bias", "norm.bias", "up.bias", "down.bias", "norm_2.bias", "conv.bias"}
    run(program, operation(program, "freeze", "norms", []))
    assert "norm.bias" not in trained(program)


def test_norms_that_are_not_there_are_an_error() -> None:
    program = bench_program()
    with pytest.raises(SurgeryError) as caught:
        run(program, operation(program, "freeze", "norms", [f"{FFN}.up"]))
    assert caught.value.diagnostics[0].code == "S0370"
