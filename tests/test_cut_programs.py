"""What a cut program is good for: it trains, generates with a cache, is stored and exported, and keeps what was attached to it."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import surgery
from surgery.backends import to_onnx
from surgery.backends.protocol import EmitRequest
from surgery.core.diagnostics import SurgeryError
from surgery.model import graphjson, masked, oracle
from surgery.model.cost import flops_by_site, flops_per_token, parameters
from surgery.model.cut import cut
from surgery.model.decouple import decouple
from surgery.model.dims import Leaf
from surgery.model.program import Origin, Program
from surgery.model.realise import held
from surgery.model.runtime import build_module
from surgery.model.weights import Init
from surgery.passes import registry
from surgery.passes.operation import Resolved
from surgery.passes.verify import verify
from tests.captured_programs import zoo_program
from tests.cut_support import TENSORS, Done, difference, free, remove, same_classes, sample, some_units
from tests.programs import emitted


def named(program: Program, parameter: str, axis: int, letter: str) -> Leaf:
    dims = program.dims
    return next(leaf for leaf in dims.leaves(dims.parameter(parameter)[axis]) if leaf.letter == letter)


def llama_cut() -> tuple[Done, list[torch.Tensor]]:
    """A key-value group of one layer, feed-forward units of another, and some of the residual stream."""
    program, inputs = zoo_program("llama")
    units = {
        named(program, "model.layers.0.self_attn.q_proj.weight", 0, "G"): [1],
        named(program, "model.layers.1.mlp.down_proj.weight", 1, "F"): [0, 5, 63],
        named(program, "model.embed_tokens.weight", 1, "C"): [3, 30],
    }
    return remove(program, units), inputs


# ---------------------------------------------------------------- running, training, generating


def test_a_cut_program_trains_and_generates_with_its_cache():
    done, inputs = llama_cut()
    module: Any = build_module(done.after, TENSORS.all(done.after))
    flat = oracle.cut_inputs(done.group, inputs)
    assert difference(oracle.floats(module.run_flat(flat)), done.run(inputs)) <= 1e-6
    ids = torch.randint(3, 99, (2, 5), generator=torch.Generator().manual_seed(0))
    with_cache = module.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    without = module.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(with_cache, without) and with_cache.shape == (2, 11)
    cache = module(input_ids=ids).past_key_values
    assert [layer.keys.shape[1] for layer in cache.layers] == [1, 2, 2]

    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    loss = module(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    assert all(bool((p != before[n]).any()) for n, p in module.named_parameters())
    assert module(input_ids=ids, labels=ids).loss < loss


@pytest.mark.parametrize("family", ["t5", "mixtral", "swin"])
def test_gradients_reach_every_parameter_that_is_left(family):
    program, inputs = zoo_program(family)
    chosen = [leaf for leaf in sample(free(program.dims), 6) if leaf.size > 2 and not program.dims.picks(leaf.axis)]
    done = remove(program, {leaf: [1] for leaf in chosen})
    module: Any = build_module(done.after, TENSORS.all(done.after))
    whole: Any = build_module(program, TENSORS.all(program))

    def reached(one: Any, flat: list[torch.Tensor]) -> set[str]:
        generator = torch.Generator().manual_seed(5)
        out = oracle.floats(one.run_flat(flat))
        sum((t * torch.randn(t.shape, generator=generator)).sum() for t in out if t.requires_grad).backward()  # type: ignore[union-attr]
        return {n for n, p in one.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}

    assert reached(module, oracle.cut_inputs(done.group, inputs)) == reached(whole, inputs)


# ---------------------------------------------------------------- stored and exported


def test_an_artifact_and_an_onnx_file_of_a_cut_program(tmp_path: Path):
    done, inputs = llama_cut()
    module: Any = surgery.load(emitted(done.after, tmp_path / "artifact"))
    assert difference(oracle.floats(module.run_flat(oracle.cut_inputs(done.group, inputs))), done.run(inputs)) <= 1e-6
    onnx = pytest.importorskip("onnx")
    made = to_onnx.BACKEND.emit(done.after, EmitRequest(target=tmp_path / "cut.onnx", params={}, tensors=TENSORS))
    claims = [c for c in made.certificates if c["claim"] == "torch = onnx"]
    assert claims and all(c["ok"] for c in claims)
    shapes = {i.name: tuple(i.dims) for i in onnx.load(tmp_path / "cut.onnx").graph.initializer}
    assert shapes["model.embed_tokens.weight"] == (99, 30)


def test_costs_are_those_of_the_smaller_model():
    done, _ = llama_cut()
    lost = sum(n for name, n in done.result.removed.items() if name in dict(done.before.graph.named_parameters()))
    assert parameters(done.before) - parameters(done.after) == lost > 0
    width, hidden = 30, 61  # of the second layer: its three products, two operations a multiply-add
    at = {n: f for n, f in flops_by_site(done.after).items() if n.startswith("layers[1].ffn")}
    assert flops_per_token(done.after) < flops_per_token(done.before)
    assert sum(f for n, f in at.items() if n.rpartition(".")[2] in ("up", "gate", "down")) == 3 * 2 * width * hidden


# ---------------------------------------------------------------- tied, shared, ragged, masked


def test_tied_tensors_stay_one():
    program, inputs = zoo_program("gpt2")
    done = remove(program, {named(program, "transformer.wte.weight", 1, "C"): [0, 7]})
    parameters = dict(done.after.graph.named_parameters(remove_duplicate=False))
    assert parameters["lm_head.weight"] is parameters["transformer.wte.weight"] and parameters["lm_head.weight"].shape == (99, 30)
    assert done.error(inputs) <= 1e-5


def test_query_heads_may_differ_by_group():
    program, inputs = zoo_program("llama")
    name = "model.layers.1.self_attn.q_proj.weight"
    keep = np.array([[True, False], [False, True]])
    done = remove(program, {}, ragged={(named(program, name, 0, "G"), named(program, name, 0, "R")): keep})
    assert done.result.removed[name] == 16 * 32 and done.error(inputs) <= 1e-5 and done.literal_error(inputs) <= 1e-5


def test_a_mask_of_a_weight_is_cut_with_it():
    program, inputs = zoo_program("bert")
    name = "encoder.layer.0.intermediate.dense.weight"
    keep = torch.rand(64, 32, generator=torch.Generator().manual_seed(1)) > 0.5
    masked.set_mask(program, [name], held(keep), Origin(verb="prune"))
    done = remove(program, {named(program, name, 0, "F"): [0, 9], named(program, name, 1, "C"): [4]})
    rows, columns = [i for i in range(64) if i not in (0, 9)], [i for i in range(32) if i != 4]
    mask = TENSORS.of(done.after, masked.mask_name(name))
    assert torch.equal(mask, keep[rows][:, columns]) and done.error(inputs) <= 1e-5
    assert masked.zeros(done.after, lambda n: TENSORS.of(done.after, n))[name][1] == 0


# ---------------------------------------------------------------- attached


def attach(program: Program, verb: str, name: str, roles: str, place: str = "on", **params: Any) -> None:
    sites = tuple(s for s in program.anatomy.sites if re.fullmatch(roles, s.role))
    assert sites, roles
    method = registry.get(verb, name)(**params)
    op = Resolved(verb, name, place, sites, (method,) * len(sites), Origin(verb=verb, method=name))
    import_module(f"surgery.passes.kinds.{method.kind}").apply(program, op)


def stir(program: Program) -> None:
    """Random numbers in everything that was attached, as a training leaves them."""
    for i, name in enumerate(sorted({program.aliases.get(t, t) for a in program.attachments for t in a.tensors})):
        old = program.weights[name]
        if isinstance(old, Init):
            program.weights[name] = Init(old.shape, old.dtype, "normal", (0.05, 0.1), i)


ATTACHED = {
    "bert": [
        ("adapt", "dora", r"layers\[\d\]\.(attn\.[qkvo]|ffn\.(up|down))", "on", {"rank": 4}),
        ("insert", "bottleneck", r"layers\[\d\]\.attn", "after", {"width": 4, "init": "bert"}),
        ("insert", "bottleneck", r"layers\[\d\]\.ffn", "beside", {"width": 4, "init": "bert"}),
    ],
    "phi3": [("adapt", "lora", r"layers\[\d\]\.(attn\.[qkvo]|ffn\.(up|gate|down))", "on", {"rank": 4})],
    "gpt2": [
        ("adapt", "pissa", r"layers\[\d\]\.(attn\.[qkvo]|ffn\.(up|down))", "on", {"rank": 4}),
        ("adapt", "dora", r"layers\[\d\]\.(attn\.[qkvo]|ffn\.(up|down))", "on", {"rank": 2}),
    ],
    "mixtral": [("adapt", "lora", r"layers\[\d\]\.(attn\.[qkvo]|ffn\.experts\.(up|gate|down))", "on", {"rank": 4})],
    "resnet": [("adapt", "lora", r"stages\[\d\].*conv.*", "on", {"rank": 4})],
}  # fmt: skip


@pytest.mark.parametrize("family", ATTACHED)
def test_what_is_attached_follows(family):
    program, inputs = zoo_program(family)
    for verb, name, roles, place, params in ATTACHED[family]:
        attach(program, verb, name, roles, place, **params)
    stir(program)
    for i, leaf in enumerate(sample(free(program.dims), 5)):
        if program.dims.picks(leaf.axis) == leaf.size:
            continue
        done = remove(program, {leaf: some_units(leaf, i)})
        # magnitudes are kept in float32: that is all that is lost in double precision
        assert done.error(inputs, torch.float64) <= 1e-6, (family, leaf)
        roles_now = {s.role: s for s in done.after.anatomy.sites}
        for a in done.after.attachments:
            now = roles_now.get(a.site.role)
            assert now is None or (a.site.rows, a.site.shape) == (now.rows, now.shape), a.site.role
            assert sum(t.numel() for t in done.after.module(a.module).parameters()) == a.method.count(done.after.module(a.module).site)


def test_a_refused_cut_changes_nothing():
    program, _ = zoo_program("bert")
    attach(program, "insert", "bottleneck", r"layers\[1\]\.ffn", "after", width=4, layernorm="in")
    before, weights = graphjson.dump(program.graph), dict(program.weights)
    group = program.dims.remove({named(program, "embeddings.word_embeddings.weight", 1, "C"): [2]})
    with pytest.raises(SurgeryError) as caught:
        cut(program, group, Origin(verb="prune"))
    assert caught.value.diagnostics[0].code == "S0431" and "layers[1].ffn" in str(caught.value)
    assert graphjson.dump(program.graph) == before and dict(program.weights) == weights
    inner = remove(program, {named(program, "encoder.layer.1.intermediate.dense.weight", 0, "F"): [2]})
    verify(inner.after, "the cut")
    same_classes(inner)


# ---------------------------------------------------------------- heads of one layer behind a shared bias


def test_layers_behind_a_shared_bias_can_be_decoupled(tmp_path: Path):
    program, inputs = zoo_program("t5")
    before = remove(program, {}).run(inputs)
    heads = "encoder.block.1.layer.0.SelfAttention.q.weight"
    together = program.dims.coupled(heads, 0, range(8))
    assert len({m.parameter for m in together.members}) == 3 * 4 + 1  # every layer of the stack, and the table
    for name in (heads, heads.replace("encoder", "decoder"), "decoder.block.0.layer.1.EncDecAttention.q.weight"):
        leaf = named(program, name, 0, "H")
        assert len(decouple(program, leaf, Origin(verb="prune"))) == 3
        assert decouple(program, leaf, Origin()) == ()
    verify(program, "decouple")
    assert all(torch.equal(a, b) for a, b in zip(remove(program, {}).run(inputs), before, strict=True))
    assert {s.role for s in program.anatomy.sites} == {s.role for s in zoo_program("t5")[0].anatomy.sites}

    units = {named(program, heads, 0, "H"): [1], named(program, heads.replace("encoder.block.1", "decoder.block.2"), 0, "H"): [0, 3]}
    done = remove(program, units)
    assert done.result.removed[heads] == 8 * 32
    assert not any("block.0.layer.0.SelfAttention.q" in name for name in done.result.removed)
    assert done.error(inputs) <= 1e-5 and done.literal_error(inputs) <= 1e-5
    same_classes(done)
    module: Any = surgery.load(emitted(done.after, tmp_path / "artifact"))
    assert difference(oracle.floats(module.run_flat(oracle.cut_inputs(done.group, inputs))), done.run(inputs)) <= 1e-6
    table = program.dims.coupled("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", 1, [0])
    assert "picked by numbers" in table.refusal
