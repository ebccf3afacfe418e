"""Worked examples of inserted bottlenecks: formulas by place, published counts, folding by widening."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.core.diagnostics import SurgeryError
from surgery.model import masked
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.passes import registry
from surgery.passes.kinds.insert import Stream
from surgery.passes.kinds.insert_generated import kronecker_sum
from surgery.passes.verify import RULES
from tests.captured_programs import zoo_program
from tests.workbench import bench_program, difference, fold_all, inputs, live, operation, outputs, perturb, run

FFN, ATTN = "layers[0].ffn", "layers[0].attn"


def inserted(place: str, roles: list[str] | None = None, **params: Any) -> Program:
    program = bench_program()
    run(program, operation(program, "insert", "bottleneck", roles or [FFN], place, **{"width": 4, **params}))
    perturb(program)
    return program


def recorded(program: Program, *names: str) -> dict[str, Tensor]:
    """Values of graph nodes when the live graph runs."""
    module = live(program)
    seen: dict[str, Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, node: torch.fx.Node) -> Any:
            value = super().run_node(node)
            if node.name in names:
                seen[node.name] = value
            return value

    with torch.no_grad():
        Recorder(module).run(*inputs())
    return seen


def branch(program: Program, z: Tensor, f: Any = F.relu) -> Tensor:
    a = program.attachments[-1].module
    t = {n.rpartition(".")[2]: v for n, v in Tensors(registry.function).all(program).items() if n.startswith(a + ".")}
    return F.linear(f(F.linear(z, t["down_weight"], t["down_bias"])), t["up_weight"], t["up_bias"])


def test_after_adds_to_the_output_of_the_part() -> None:
    program = inserted("after", scale=2.0)
    node = program.attachments[0].node.node
    got = recorded(program, node, "drop")
    torch.testing.assert_close(got[node], got["drop"] + 2 * branch(program, got["drop"]))


def test_beside_sees_the_input_of_the_part() -> None:
    program = inserted("beside", scale=4.0)
    node = program.attachments[0].node.node
    got = recorded(program, node, "drop", "norm")
    torch.testing.assert_close(got[node], got["drop"] + 4 * branch(program, got["norm"]))


def test_before_changes_the_input_of_the_part_and_not_the_residual() -> None:
    program = inserted("before")
    node = program.attachments[0].node.node
    gm = program.graph
    up = next(n for n in gm.graph.nodes if n.name == "up")
    assert up.args[0].name == node
    residual = next(n for n in gm.graph.nodes if n.name == "norm_2").args[0]
    assert residual.args[0].name == "norm"
    got = recorded(program, node, "norm")
    torch.testing.assert_close(got[node], got["norm"] + branch(program, got["norm"]))


def test_after_norm_edits_the_normalised_value() -> None:
    program = inserted("after", position="after_norm")
    node = program.attachments[0].node.node
    got = recorded(program, node, "norm_2")
    torch.testing.assert_close(got[node], got["norm_2"] + branch(program, got["norm_2"]))


def test_two_insertions_stand_in_the_order_written() -> None:
    program = inserted("after", roles=[FFN])
    run(program, operation(program, "insert", "bottleneck", [FFN], "after", width=4, activation="tanh", label="second"))
    perturb(program)
    nodes = [a.node.node for a in program.attachments]
    got = recorded(program, *nodes)
    assert [a.module for a in program.attachments] == ["bottleneck", "second"]
    assert program.node(program.attachments[1].node).args[0].name == nodes[0]
    torch.testing.assert_close(got[nodes[1]], got[nodes[0]] + branch(program, got[nodes[0]], torch.tanh))


def test_an_adapter_that_comes_later_stands_inside_the_insertion() -> None:
    program = inserted("after", roles=["layers[0].ffn.down"])
    run(program, operation(program, "adapt", "lora", ["layers[0].ffn.down"]))
    node = program.node(program.attachments[0].node)
    assert node.args[0].name == program.attachments[1].node.node


@pytest.mark.parametrize(
    ("options", "extra"),
    [({}, 0), ({"layernorm": "in"}, 32), ({"layernorm": "out"}, 32), ({"learn_scale": True}, 1), ({"init": "bert"}, 0)],
)
def test_counts(options: dict[str, Any], extra: int) -> None:
    program = bench_program()
    change = run(program, operation(program, "insert", "bottleneck", [ATTN, FFN], "after", width=4, **options))
    assert [c.added for c in change] == [2 * 16 * 4 + 4 + 16 + extra] * 2
    same = difference(outputs(program), outputs(bench_program())) == 0
    assert same == (options.get("init") != "bert")


def test_published_counts() -> None:
    # scaled parallel adapters of BART-large: 24 feed-forward blocks, hidden 1024, width 512
    assert 24 * registry.get("insert", "bottleneck")(width=512).count(Stream("beside", 1024, 1024)) == 25_202_688


@pytest.mark.parametrize("options", [{}, {"scale": 4.0}, {"scale": 0.5, "learn_scale": True}])
def test_a_parallel_branch_with_the_same_activation_widens_the_block(options: dict[str, Any]) -> None:
    program = inserted("beside", activation="gelu", **options)
    expected = outputs(program)
    changes = fold_all(program)
    assert [c.note for c in changes] == ["bottleneck folded"] and not program.attachments
    assert difference(outputs(program), expected) <= 1e-5
    assert program.graph.up.out_features == 36 and program.graph.down.in_features == 36
    assert program.weights["up.weight"].shape == (36, 16) and program.weights["down.weight"].shape == (16, 36)
    node = next(n for n in program.graph.graph.nodes if n.name == "gelu_default")
    assert node.meta["spec"].shape[-1] == 36
    run(program, operation(program, "adapt", "lora", ["layers[0].ffn.up"]))
    assert program.module("up.lora").site.out == 36


@pytest.mark.parametrize(
    ("place", "options", "reason"),
    [
        ("after", {"activation": "gelu"}, "32 multiply-adds in place of 16"),
        ("before", {"activation": "gelu"}, "beside"),
        ("after", {"activation": "gelu", "layernorm": "in"}, "residual"),
        ("after", {"residual": False}, "residual"),
        ("beside", {"activation": "relu"}, "activation"),
        ("beside", {"activation": "gelu", "layernorm": "in"}, "plain"),
    ],
)
def test_what_cannot_fold_stays_and_says_why(place: str, options: dict[str, Any], reason: str) -> None:
    program = inserted(place, **options)
    before, exprs = outputs(program), dict(program.weights)
    changes = fold_all(program)
    assert len(program.attachments) == 1 and reason in changes[0].note and "stays" in changes[0].note
    assert program.weights == exprs and difference(outputs(program), before) == 0


def test_a_sequential_branch_is_packed_into_the_map_in_front_of_it() -> None:
    """The bench's output projection is stored transposed and runs on rows; its product and the branch's first one become one."""
    program = inserted("after", [ATTN], activation="gelu", scale=1.5)
    a = program.attachments[0]
    expected, before = outputs(program), dict(program.weights)
    values = Tensors(registry.function).all(program)
    change = fold_all(program)[0]
    assert change.note.endswith("its first product is packed into the one in front of it")
    assert (change.added, change.removed) == (4 * 16 + 4 + 16 * 4 + 16, 2 * 16 * 4 + 4 + 16)
    assert difference(outputs(program), expected) <= 1e-5
    assert program.weights["o_weight"].shape == (16, 20) and program.weights["o_bias"].shape == (20,)
    after = Tensors(registry.function).all(program)
    down = values[f"{a.module}.down_weight"]
    torch.testing.assert_close(after["o_weight"], torch.cat([values["o_weight"], values["o_weight"] @ down.t()], 1))
    torch.testing.assert_close(after["o_bias"][16:], down @ values["o_bias"] + values[f"{a.module}.down_bias"])
    assert set(before) - set(program.weights) == {f"{a.module}.down_weight", f"{a.module}.down_bias"}
    assert "packed already" in fold_all(program)[0].note


def test_an_adapter_on_the_block_is_folded_before_widening() -> None:
    program = inserted("beside", activation="gelu")
    run(program, operation(program, "adapt", "lora", ["layers[0].ffn.up"]))
    perturb(program)
    expected = outputs(program)
    assert "fold them first" in fold_all(program, "bottleneck")[0].note
    fold_all(program, "lora")
    assert fold_all(program, "bottleneck")[0].note == "bottleneck folded"
    assert difference(outputs(program), expected) <= 1e-5


def test_replacing_branch_warns_and_has_no_meaning_beside() -> None:
    program = bench_program()
    change = run(program, operation(program, "insert", "bottleneck", [FFN], "after", width=4, residual=False))[0]
    assert "warning" in change.note
    with pytest.raises(SurgeryError) as caught:
        run(program, operation(program, "insert", "bottleneck", [FFN], "beside", width=4, residual=False))
    assert caught.value.diagnostics[0].code == "S0271"


def test_after_norm_needs_a_norm_that_follows() -> None:
    program = bench_program()
    with pytest.raises(SurgeryError) as caught:
        run(program, operation(program, "insert", "bottleneck", ["layers[0].attn.o"], "after", width=4, position="after_norm"))
    assert caught.value.diagnostics[0].code == "S0271"


def test_dropout_acts_on_the_bottleneck_while_training_only() -> None:
    program = inserted("after", dropout=0.5)
    module = live(program)
    assert torch.equal(module(*inputs())[0], module(*inputs())[0])
    module.train()
    assert not torch.equal(module(*inputs())[0], module(*inputs())[0])


# ------------------------------------------------------------------ generated weights


def test_the_worked_sum_of_kronecker_products() -> None:
    a = torch.tensor([[[1.0, 0], [0, 1]], [[0, -1], [1, 0]]])
    left, right = torch.tensor([[[1.0], [2]], [[3], [0]]]), torch.tensor([[[1.0, 1]], [[0, 1]]])
    made = kronecker_sum(a, left @ right)
    assert made.tolist() == [[1, 1, 0, -3], [2, 2, 0, 0], [0, 3, 1, 1], [0, 0, 2, 2]]
    assert (torch.tensor([1.0, 2, 3, 4]) @ made).tolist() == [5, 14, 11, 8]
    assert torch.equal(made, sum(torch.kron(a[i], left[i] @ right[i]) for i in range(2)))  # type: ignore[arg-type]


def test_published_counts_of_generated_bottlenecks() -> None:
    compacter, phm = (registry.get("insert", name) for name in ("compacter", "phm"))
    t5, norms = Stream("after", 768, 768), 62 * 768  # T5-base trains its norms, too
    one = compacter(width=24).count(t5) - 4**3
    assert one == 2_376
    assert 48 * one + 64 + norms == 161_728 and 24 * one + 64 + norms == 104_704
    assert phm(width=24, n=12).count(t5) == 7_320 and 48 * 7_320 + norms == 398_976


@pytest.mark.parametrize("name", ["compacter", "phm"])
@pytest.mark.parametrize(("place", "role"), [("after", FFN), ("beside", FFN), ("after", ATTN)])
def test_generated_weights_become_dense_and_go_on(name: str, place: str, role: str) -> None:
    program = bench_program()
    run(program, operation(program, "insert", name, [role], place, width=4, n=2, activation="gelu"))
    perturb(program)
    expected = outputs(program)
    assert fold_all(program)[0].note.startswith(f"{name} folded")
    assert difference(outputs(program), expected) <= 1e-5
    if place == "beside":  # a plain branch with the block's activation widens it
        assert not program.attachments and program.weights["up.weight"].shape == (36, 16)
        return
    (a,) = program.attachments
    down = [] if role == ATTN else ["down_weight", "down_bias"]  # packed into the output projection
    assert a.method.name == "bottleneck" and [t.rpartition(".")[2] for t in a.tensors] == [*down, "up_weight", "up_bias"]


def test_one_set_of_matrices_makes_all_weights() -> None:
    program = bench_program()
    changes = run(program, operation(program, "insert", "compacter", [ATTN, FFN], "after", width=4, n=2))
    first, second = (a.module for a in program.attachments)
    assert program.aliases == {"head.weight": "tokens.weight", f"{second}.A": f"{first}.A"}
    assert [c.added for c in changes] == [8 + 40 + 20, 40 + 20]
    perturb(program)
    fold = fold_all(program, "compacter")
    assert sum(c.removed for c in fold) == 128 and f"{second}.A" not in program.aliases


def test_sizes_that_are_not_divided_are_refused() -> None:
    program = bench_program()
    with pytest.raises(SurgeryError) as caught:
        run(program, operation(program, "insert", "phm", [FFN], "after", width=9, n=4))
    assert caught.value.diagnostics[0].code == "S0271" and "9 features" in caught.value.diagnostics[0].message


# ------------------------------------------------------------------ wider blocks of captured models


@pytest.mark.parametrize(("family", "activation"), [("llama", "silu"), ("gpt2", "gelu_tanh"), ("phi3", "silu")])
def test_gated_transposed_and_fused_blocks_become_wider(family: str, activation: str) -> None:
    program, flat = zoo_program(family)
    blocks = [f"layers[{i}].ffn" for i in (0, 2)]
    run(program, operation(program, "insert", "bottleneck", blocks, "beside", width=5, activation=activation, scale=2.0))
    run(program, operation(program, "adapt", "lora", ["layers[0].ffn.down"], rank=2))
    perturb(program)
    expected = outputs(program, *flat)
    shapes = {s.role: s.shape for s in program.anatomy.sites}
    assert {c.note for c in fold_all(program)} == {"bottleneck folded", "lora folded"} and not program.attachments
    assert difference(outputs(program, *flat), expected) <= 1e-5
    assert not [fault for rule in RULES for fault in rule(program)]
    program.touch()
    found = {s.role: s.shape for s in program.anatomy.sites}
    width, hidden = shapes["layers[0].ffn.up"]
    assert found == {
        r: (width + 5, hidden) if r in {f"{b}.{part}" for b in blocks for part in ("up", "gate")}
        else (hidden, width + 5) if r in {f"{b}.down" for b in blocks} else shape for r, shape in shapes.items()
    }  # fmt: skip


def test_an_activation_is_known_by_what_it_computes() -> None:
    program, _ = zoo_program("gpt2")
    run(program, operation(program, "insert", "bottleneck", ["layers[0].ffn"], "beside", width=4, activation="gelu"))
    assert "its activation gelu is not the block's" in fold_all(program)[0].note


def test_masks_survive_packing_and_widening_to_the_element() -> None:
    program, flat = zoo_program("llama")
    parts = [f"layers[0].{part}" for part in ("attn.o", "ffn.up", "ffn.gate", "ffn.down")]
    run(program, operation(program, "prune", "mask", parts, ratio=0.5))
    run(program, operation(program, "insert", "bottleneck", ["layers[0].attn"], "after", width=4, activation="silu"))
    run(program, operation(program, "insert", "bottleneck", ["layers[0].ffn"], "beside", width=4, activation="silu"))
    run(program, operation(program, "adapt", "dora", ["layers[0].ffn.up"], rank=2))
    perturb(program)
    before, expected = program.copy(), outputs(program, *flat)
    assert all("folded" in c.note for c in fold_all(program))
    assert difference(outputs(program, *flat), expected) <= 1e-5
    tensors = Tensors(registry.function)
    certificate = masked.certificate(before, program, tensors.of)
    assert certificate is not None and certificate["ok"] and certificate["zeros_before"] == certificate["zeros_after"] == 3584
    for name in (f"model.layers.0.{n}.weight" for n in ("self_attn.o_proj", "mlp.up_proj", "mlp.gate_proj", "mlp.down_proj")):
        old, new = tensors.of(before, name), tensors.of(program, name)
        assert torch.equal(new[: old.shape[0], : old.shape[1]] == 0, old == 0) and (old == 0).sum() * 2 == old.numel()


def test_what_layers_share_stays_one_tensor() -> None:
    program, flat = zoo_program("llama")
    run(program, operation(program, "share", "layers", ["layers[0]", "layers[1]"]))
    for place, role in (("after", "attn"), ("beside", "ffn")):
        run(program, operation(program, "insert", "bottleneck", [f"layers[{i}].{role}" for i in (0, 2)], place, width=4, activation="silu"))
    perturb(program)
    expected, ties = outputs(program, *flat), dict(program.aliases)
    notes = {c.role: c.note for c in fold_all(program)}
    assert "shared with other parts" in notes["layers[0].attn"] and "shared with other parts" in notes["layers[0].ffn"]
    assert "packed" in notes["layers[2].attn"] and notes["layers[2].ffn"] == "bottleneck folded"
    assert program.aliases == ties and difference(outputs(program, *flat), expected) <= 1e-5
