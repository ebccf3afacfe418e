"""Dimension classes of whole models: printed expressions, coupled groups, slices, what is refused, linear work."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from surgery.model.dims import Dims, Leaf, analyse
from surgery.model.dims.algebra import Algebra
from tests.dims_models import MODELS, dynamic
from tests.dims_support import Case, check, floats, trace

aten = torch.ops.aten


@cache
def case_of(name: str) -> Case:
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return trace(model, inputs, dynamic(inputs))


def named(dims: Dims, parameter: str, axis: int, letter: str) -> Leaf:
    return next(leaf for leaf in dims.leaves(dims.parameter(parameter)[axis]) if leaf.letter == letter)


PRINTED = {
    "bert": {
        "encoder.layer.0.attention.self.query.weight": "(H*d) | C",
        "encoder.layer.0.attention.self.value.weight": "(H*dv) | C",
        "encoder.layer.0.attention.output.dense.weight": "C | (H*dv)",
        "encoder.layer.1.intermediate.dense.weight": "F | C",
        "embeddings.word_embeddings.weight": "60! | C",
        "pooler.dense.weight": "O | C",
    },
    "gpt2": {
        "transformer.h.0.attn.c_attn.weight": "C | [(H*d)+[(H*d)+(H*dv)]]",
        "transformer.h.1.attn.c_attn.bias": "[(H*d)+[(H*d)+(H*dv)]]",
        "transformer.h.0.mlp.c_fc.weight": "C | F",
        "transformer.wte.weight": "60! | C",
    },
    "llama": {
        "model.layers.0.self_attn.q_proj.weight": "((G*R)*[r+r]) | C",
        "model.layers.0.self_attn.k_proj.weight": "(G*[r+r]) | C",
        "model.layers.0.self_attn.v_proj.weight": "(G*dv) | C",
        "model.layers.0.self_attn.o_proj.weight": "C | (G*R*dv)",
        "model.layers.1.mlp.down_proj.weight": "C | F",
        "model.rotary_emb.inv_freq": "r",
    },
    "phi3": {
        "model.layers.0.self_attn.qkv_proj.weight": "[((G*R)*[r+r])+[(G*[r+r])+(G*dv)]] | C",
        "model.layers.0.mlp.gate_up_proj.weight": "[F+F] | C",
    },
    "mixtral": {
        "model.layers.0.mlp.gate.weight": "E | C",
        "model.layers.0.mlp.experts.gate_up_proj": "E | [F+F] | C",
        "model.layers.0.mlp.experts.down_proj": "E | C | F",
    },
    "gpt_neox": {"gpt_neox.layers.0.attention.dense.weight": "C | (H*dv)"},
    "bloom": {"transformer.h.0.self_attention.query_key_value.weight": "(4!*3!*d) | C"},
    "t5": {
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "32! | H",
        "decoder.block.1.layer.1.EncDecAttention.k.weight": "(H*d) | C",
        "shared.weight": "60! | C",
    },
    "swin": {
        "encoder.layers.0.downsample.reduction.weight": "C | [C+C+C+C]",
        "encoder.layers.0.blocks.0.attention.q_proj.weight": "(H*d) | C",
    },
    "resnet": {
        "embedder.embedder.convolution.weight": "F | 3! | 7! | 7!",
        "encoder.stages.1.layers.0.layer.1.normalization.running_var": "O",
    },
    "convnext": {"encoder.stages.0.layers.0.dwconv.weight": "C | 1 | 7! | 7!"},
    "encoder": {
        "layers.0.self_attn.in_proj_weight": "(3!*(H*d)) | 24!",
        "layers.1.linear2.weight": "24! | F",
    },
}


@pytest.mark.parametrize("name", PRINTED)
def test_expressions_print_what_the_architecture_is(name):
    dims = case_of(name).dims
    got = {p: " | ".join(dims.text(a) for a in dims.parameter(p)) for p in PRINTED[name]}
    assert got == PRINTED[name]


def test_names_are_the_same_in_every_run_and_unique():
    case = case_of("llama")
    again = analyse(case.module, aliases=case.aliases)
    assert [leaf.name for leaf in again.all_leaves()] == [leaf.name for leaf in case.dims.all_leaves()]
    assert len({leaf.name for leaf in again.all_leaves(stored=False)}) == len(again.all_leaves(stored=False))
    axes = again.parameter("model.layers.1.self_attn.q_proj.weight")
    assert again.text(axes[0], unique=True) == "((G1*R1)*[r0+r0])"


def test_holders_and_flags():
    dims = case_of("bert").dims
    width = named(dims, "encoder.layer.0.intermediate.dense.weight", 0, "F")
    assert [(p, i) for p, i, _ in dims.holders(width)] == [
        ("encoder.layer.0.intermediate.dense.weight", 0),
        ("encoder.layer.0.intermediate.dense.bias", 0),
        ("encoder.layer.0.output.dense.weight", 1),
    ]
    stream = named(dims, "encoder.layer.0.intermediate.dense.weight", 1, "C")
    assert {"norm", "output", "contract"} <= stream.flags and stream.free
    words = dims.leaves(dims.parameter("embeddings.word_embeddings.weight")[0])[0]
    assert not words.free and "looked up" in words.reason and words.node is not None


def test_a_coupled_group_lists_members_and_constants():
    dims = case_of("gpt2").dims
    width = 6
    head = [2 * width + i for i in range(width)]  # the rows of head 2 in the query part of c_attn
    group = dims.coupled("transformer.h.0.attn.c_attn.weight", 1, head)
    assert not group.refusal
    assert [(m.parameter.rsplit("h.0.")[1], m.axis, m.removed) for m in group.members] == [
        ("attn.c_attn.weight", 1, ((12, 18), (36, 42), (60, 66))),
        ("attn.c_attn.bias", 0, ((12, 18), (36, 42), (60, 66))),
        ("attn.c_proj.weight", 0, ((12, 18),)),
    ]
    assert {c.kind for c in group.constants} >= {"split", "size"}
    split = next(c for c in group.constants if c.kind == "split")
    assert split.value == [18, 18, 18]
    assert "cut H0[2] of 4" in str(group)
    assert check(case_of("gpt2"), group) <= 1e-5


def test_positions_that_are_no_whole_units_are_refused():
    dims = case_of("gpt2").dims
    group = dims.coupled("transformer.h.0.attn.c_attn.weight", 1, [12, 13, 14])
    assert "no whole units" in group.refusal and not group.members
    frozen = dims.coupled("transformer.wte.weight", 0, [3])
    assert "looked up by number" in frozen.refusal
    everything = dims.coupled("transformer.h.0.mlp.c_fc.weight", 1, range(96))
    assert "nothing of" in everything.refusal


def test_rows_of_fused_weights():
    dims = case_of("phi3").dims
    qkv = dims.parameter("model.layers.0.self_attn.qkv_proj.weight")[0]
    fused = next(n for n in case_of("phi3").module.graph.nodes if n.op == "get_attr" and "qkv_proj" in str(n.target))
    linear = next(iter(fused.users))
    parts = [n for n in linear.users if dims.cut_of(n) is not None]
    assert [dims.rows(qkv, [dims.cut_of(n)]) for n in parts] == [((0, 24),), ((24, 36),), ((36, 48),)]
    assert [dims.slice_of(qkv, dims.axes(n)[-1]) for n in parts] == [((0, 24),), ((24, 36),), ((36, 48),)]
    group = named(dims, "model.layers.0.self_attn.qkv_proj.weight", 0, "G")
    assert dims.index_set(qkv, group, [1]) == ((12, 24), (30, 36), (42, 48))


def test_rows_of_interleaved_heads_follow_a_chain_of_cuts():
    case = case_of("gpt_neox")
    dims = case.dims
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    axis = dims.parameter(name)[0]
    chunk = next(n for n in case.module.graph.nodes if "chunk" in str(n.target) or "split" in str(n.target))
    rows = [dims.rows(axis, [dims.cut_of(n)]) for n in chunk.users]
    assert rows[0] == ((0, 6), (18, 24), (36, 42), (54, 60))
    assert rows[2] == ((12, 18), (30, 36), (48, 54), (66, 72))


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_query_heads_may_differ_by_group_when_every_group_keeps_as_many(name):
    case = case_of(name)
    parameter = "model.layers.0.self_attn." + ("qkv_proj.weight" if name == "phi3" else "q_proj.weight")
    group, repeat = named(case.dims, parameter, 0, "G"), named(case.dims, parameter, 0, "R")
    keep = np.array([[True, False], [False, True]])
    cut = case.dims.remove({}, ragged={(group, repeat): keep})
    rows = next(m for m in cut.members if m.parameter == parameter)
    assert rows.removed[:1] == ((6, 18),)
    assert check(case, cut) <= 1e-5
    uneven = case.dims.remove({}, ragged={(group, repeat): np.array([[True, True], [False, True]])})
    assert "same number" in uneven.refusal


def test_experts_go_with_their_router():
    dims = case_of("mixtral").dims
    group = dims.coupled("model.layers.0.mlp.experts.down_proj", 0, [2])
    assert [(m.parameter.rsplit("mlp.")[1], m.axis) for m in group.members] == [
        ("gate.weight", 0),
        ("experts.gate_up_proj", 0),
        ("experts.down_proj", 0),
    ]
    assert {"topk", "softmax"} <= group.flags
    assert {("bins", 3), ("max", 2)} <= {(str(c.path[-1]), c.value) for c in group.constants} | {
        ({1: "bins", 3: "max"}.get(c.path[-1], ""), c.value) for c in group.constants if "histc" in str(c.node.target)
    }


# ---------------------------------------------------------------- work


class Plain(nn.Module):
    """Residual blocks of a hand-made attention with fused heads: nothing that a table could know."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(12, 36) for _ in range(depth))
        self.out = nn.ModuleList(nn.Linear(12, 12) for _ in range(depth))
        self.enter = nn.Linear(5, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.enter(x)
        for qkv, out in zip(self.qkv, self.out, strict=True):
            q, k, v = qkv(x).view(*x.shape[:2], 3, 4, 3).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) / 3**0.5).softmax(-1)
            x = x + out((weights @ v).transpose(1, 2).flatten(2))
        return x


def test_a_hand_made_module_is_understood():
    case = trace(Plain(2), {"x": torch.randn(2, 7, 5)})
    dims = case.dims
    assert dims.text(dims.parameter("qkv.0.weight")[0]) in ("(3!*(H*d))", "(3!*H*d)")
    head = dims.index_set(dims.parameter("qkv.0.weight")[0], named(dims, "qkv.0.weight", 0, "H"), [1])
    assert head == ((3, 6), (15, 18), (27, 30))
    for leaf in dims.all_leaves():
        if leaf.free:
            assert check(case, dims.remove({leaf: [1]})) <= 1e-5


def test_work_grows_with_the_nodes(monkeypatch):
    """Unifications and axes made for a model twice as deep: exactly linear in the number of layers."""
    counts = []
    for depth in (2, 4, 8, 16):
        graph = trace(Plain(depth), {"x": torch.randn(2, 7, 5)}).module
        calls = [0]
        original = Algebra.unify

        def counted(self, a, b, calls=calls, original=original):
            calls[0] += 1
            return original(self, a, b)

        monkeypatch.setattr(Algebra, "unify", counted)
        dims = analyse(graph, strict=True)
        monkeypatch.setattr(Algebra, "unify", original)
        counts.append((len(graph.graph.nodes), calls[0], dims._cx.algebra.count, len(dims.constants)))
    table = np.array(counts)
    per_layer = np.diff(table, axis=0) / np.array([[2], [4], [8]])
    assert (per_layer == per_layer[0]).all(), counts


def test_outputs_of_the_cut_move(case_name: str = "llama"):
    """The oracle is no tautology: removing a group changes the result, and the cut follows it."""
    case = case_of(case_name)
    before = case.run()[0]
    group = case.dims.coupled("model.layers.0.mlp.down_proj.weight", 1, [0, 3])
    from tests.dims_support import cut

    after = floats(cut(case, group)(*case.inputs))[0]
    assert float((before - after).abs().max()) > 1e-3


def test_fewer_units_than_are_picked_is_refused():
    dims = case_of("mixtral").dims
    group = dims.coupled("model.layers.0.mlp.experts.down_proj", 0, [0, 1, 3])
    assert "picks 2 of E" in group.refusal
