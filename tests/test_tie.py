"""Shared layers: equal to a live model whose layers hold the same Parameter, counted and stored once, trained with summed gradients."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import surgery
from surgery.core.diagnostics import SurgeryError
from surgery.model import masked
from surgery.model.live import Tensors, live_root
from surgery.model.program import Origin, Program
from surgery.model.realise import held
from surgery.model.runtime import build_module
from surgery.model.weights import Init
from surgery.passes import registry
from surgery.passes.expect import measure
from surgery.passes.kinds import tie
from surgery.passes.kinds.tie_groups import numbers
from surgery.passes.operation import Resolved
from surgery.passes.verify import verify
from tests.captured_programs import zoo_program
from tests.programs import emitted, ids
from tests.test_drop import FAMILIES, causal, floats, original, parameters
from tests.workbench import operation, run
from tests.zoo import ZOO

TENSORS = Tensors(registry.function)


def share(program: Program, roles: list[str], keep_own: tuple[str, ...] = (), **params: Any) -> list[Any]:
    by_role = {s.role: s for s in program.anatomy.sites}
    method = registry.get("share", "layers")(**params)
    sites = tuple(by_role[r] for r in roles)
    op = Resolved("share", "layers", "on", sites, (method,) * len(sites), Origin(verb="share", method="layers"), keep_own=keep_own)
    changes = tie.apply(program, op)
    verify(program, "the test")
    return changes


def outputs(program: Program, flat: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return floats(live_root(program, TENSORS, dtype=torch.float32).eval()(*flat))


# ------------------------------------------------------------------ every family


@pytest.mark.parametrize(
    ("family", "keep_own"), [*((f, ("norm",)) for f in FAMILIES), *((f, ()) for f in ("bert", "gpt2", "mixtral"))], ids=str
)
def test_each_layer_computes_with_the_stated_weights(family: str, keep_own: tuple[str, ...]) -> None:
    """Against the program in which the values are copied into every layer and nothing is tied; roles stay as they were."""
    program, flat = zoo_program(family)
    stack = max(program.anatomy.stacks, key=lambda s: s.layers)
    if stack.layers < 3:
        pytest.skip("one layer, shared already")
    roles = [s.role for s in program.anatomy.sites]
    chosen = [f"{stack.name}[1]", f"{stack.name}[2]"]
    copied, before = program.copy(), parameters(program)
    changes = share(program, chosen, keep_own)
    first = next(s for s in copied.anatomy.sites if s.role == chosen[0]).path
    second = next(s for s in copied.anatomy.sites if s.role == chosen[1]).path
    assert all(a.startswith(second) and b.startswith(first) for a, b in program.aliases.items() if a not in copied.aliases)
    for alias, name in program.aliases.items():
        if alias not in copied.aliases:
            copied.weights[alias] = copied.weights[name]
    for x, y in zip(outputs(program, flat), outputs(copied, flat), strict=True):
        assert torch.equal(x, y)
    assert [s.role for s in program.anatomy.sites] == roles
    shared = sum(torch.Size(program.weights[n].shape).numel() for a, n in program.aliases.items() if a not in copied.aliases)
    assert before - parameters(program) == shared == sum(c.removed for c in changes) > 0
    assert measure(program, "params").value == parameters(program)
    for site in program.anatomy.sites:
        if site.role.startswith(chosen[1] + ".") and not site.is_region:
            assert site.path.startswith(second) and all(ref.graph.startswith(second) for ref in site.calls if ref.graph), site


def test_orders() -> None:
    assert numbers(6, 3, "sequence") == [0, 0, 1, 1, 2, 2]
    assert numbers(6, 3, "cycle") == [0, 1, 2, 0, 1, 2]
    assert numbers(6, 3, "cycle_rev") == [0, 1, 2, 2, 1, 0]
    assert numbers(9, 3, "cycle_rev") == [0, 1, 2, 0, 1, 2, 2, 1, 0]
    assert numbers(4, 1, "cycle_rev") == [0, 0, 0, 0]


# ------------------------------------------------------------------ counts


def test_counts_of_bert_base_with_all_layers_shared_but_their_norms(tmp_path: Path) -> None:
    """Closed form: 109,482,240 - 11 (4 (d d + d) + 2 d f + f + d) with d = 768, f = 3072."""
    config = tmp_path / "bert.json"
    config.write_text(json.dumps({"model_type": "bert", "architectures": ["BertModel"]}), "utf-8")
    spec = "surg 1\n\nshare layers(groups = all) on layers keep own norm\n"
    plan = surgery.plan(spec, f"config:{config}")
    d, f = 768, 3072
    assert plan.totals is not None and plan.totals.params_before == 109_482_240
    assert plan.totals.params_after == 109_482_240 - 11 * (4 * (d * d + d) + 2 * d * f + f + d) == 31_549_440
    assert plan.totals.bytes_after == 4 * 31_549_440


def test_counts_of_llama_without_nine_layers(tmp_path: Path) -> None:
    """LLaMA-2-7B without 9 of its 32 layers, as published for ShortGPT."""
    config = tmp_path / "llama.json"
    shape = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000)
    config.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **shape}), "utf-8")
    plan = surgery.plan("surg 1\n\nprune layers(count = 9, score = magnitude) on layers\n", f"config:{config}")
    assert plan.totals is not None and plan.totals.params_before == 6_738_415_616
    assert plan.totals.params_after == 6_738_415_616 - 9 * 202_383_360 == 4_916_965_376


# ------------------------------------------------------------------ a live model tied by hand


def llama() -> Any:
    return causal("llama")[0]


def _program() -> Program:
    return original(llama())


def tied_by_hand(model: Any, groups: list[list[int]], weights: str, keep: str = "norm") -> Any:
    out = copy.deepcopy(model)
    layers = [dict(la.named_parameters()) for la in out.model.layers]
    for group in groups:
        for name, p in layers[group[0]].items():
            if keep and keep in name:
                continue
            if weights == "mean":
                p.data = torch.stack([layers[i][name].detach() for i in group]).mean(0)
            for i in group[1:]:
                owner, _, leaf = name.rpartition(".")
                setattr(out.model.layers[i].get_submodule(owner), leaf, p)
    return out


@pytest.mark.parametrize(
    ("params", "groups"),
    [
        ({"groups": "pairs"}, [[0, 1], [2, 3]]),
        ({"groups": 2, "order": "cycle"}, [[0, 2], [1, 3]]),
        ({"groups": "pairs", "order": "cycle_rev", "weights": "mean"}, [[0, 3], [1, 2]]),
        ({"groups": ((0, 1, 3),)}, [[0, 1, 3]]),
    ],
    ids=str,
)
def test_trains_and_generates_as_a_model_tied_by_hand(params: dict[str, Any], groups: list[list[int]]) -> None:
    hand = tied_by_hand(llama(), groups, params.get("weights", "first"))
    program = _program().copy()
    chosen = sorted({i for g in groups for i in g})
    share(program, [f"layers[{i}]" for i in chosen], ("norm",), **params)
    module: Any = build_module(program, Tensors(registry.function).all(program))  # trained in place below
    tokens = ids(2, 7)
    with torch.no_grad():
        assert torch.allclose(module(tokens).logits, hand(tokens).logits, atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(module.generate(tokens, **options), hand.generate(tokens, **options))
    assert {n for n, _ in module.named_parameters()} == {n for n, _ in hand.named_parameters()}  # each shared one once
    for model in (module, hand):
        model.train()
        model(input_ids=tokens, labels=tokens).loss.backward()
    theirs = dict(hand.named_parameters())
    for name, p in module.named_parameters():  # gradients of shared ones are sums over their layers
        assert torch.allclose(p.grad, theirs[name].grad, atol=1e-5, rtol=1e-4), name
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (module, hand)]
    for optimizer in optimizers:
        optimizer.step()
    module.eval(), hand.eval()
    with torch.no_grad():
        assert torch.allclose(module(tokens).logits, hand(tokens).logits, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ files


def shared_program() -> Program:
    program = _program().copy()
    share(program, [f"layers[{i}]" for i in range(4)], ("norm",), groups="pairs")
    return program


def test_an_artifact_holds_a_shared_tensor_once_and_chains(tmp_path: Path) -> None:
    program = shared_program()
    folder = emitted(program, tmp_path / "shared")
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            names += list(f.keys())
    assert "model.layers.0.mlp.up_proj.weight" in names and "model.layers.1.mlp.up_proj.weight" not in names
    assert {f"model.layers.{i}.input_layernorm.weight" for i in range(4)} <= set(names)
    module: Any = surgery.load(folder)
    up = [module.get_parameter(f"model.layers.{i}.mlp.up_proj.weight") for i in range(4)]
    assert up[0] is up[1] and up[2] is up[3] and up[0] is not up[2]
    plan = surgery.plan("surg 1\n\nadapt lora(rank = 2) on layers[*].attn.q\n", str(folder))
    assert plan.totals is not None and plan.totals.params_before == parameters(program)
    assert plan.totals.trainable == 4 * 2 * (32 + 32)  # one adapter for each layer


def test_onnx_has_one_initializer_for_each_shared_tensor(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = tmp_path / "model"
    ZOO["bert"].make_model().save_pretrained(model)  # type: ignore[operator]
    spec = 'surg 1\n\nshare layers(groups = all) on layers keep own norm\n\nemit onnx to "shared.onnx"\n'
    (tmp_path / "s.surg").write_text(spec, "utf-8")
    result = surgery.compile(tmp_path / "s.surg", str(model), out=tmp_path)
    claims = [c for c in result.certificates if c["claim"].startswith("shared")]
    assert claims and all(c["ok"] for c in claims) and all(c["ok"] for c in result.certificates)
    graph = onnx.load(str(tmp_path / "shared.onnx"), load_external_data=False).graph
    matrices = [i for i in graph.initializer if list(i.dims) in ([32, 64], [64, 32]) and "embeddings" not in i.name]
    assert len(matrices) == 2, [i.name for i in matrices]  # up and down of three layers
    names = {matrices[0].name} | {n.output[0] for n in graph.node if n.op_type == "Transpose" and matrices[0].name in n.input}
    assert sum(n.op_type != "Transpose" and bool(names & set(n.input)) for n in graph.node) == 3


# ------------------------------------------------------------------ with other statements


def test_pruning_what_is_shared_is_one_decision(tmp_path: Path) -> None:
    """Heads and hidden units of shared layers go together, count once, and the result equals the masked model."""
    ZOO["bert"].make_model().save_pretrained(tmp_path / "bert")  # type: ignore[operator]
    text = """surg 1

share layers(groups = pairs) on layers[0..1] keep own norm
prune heads(keep = 3, score = magnitude) on layers[*].attn
prune ffn(keep = 48, score = magnitude) on layers[*].ffn
adapt lora(rank = 2) on layers[*].attn.q

emit torch to "out"
"""
    (tmp_path / "s.surg").write_text(text, "utf-8")
    result = surgery.compile(tmp_path / "s.surg", str(tmp_path / "bert"), out=tmp_path)
    assert [c["claim"] for c in result.certificates if c["ok"]].count("removed = masked") == 2
    module: Any = surgery.load(tmp_path / "out")
    query = [module.get_parameter(f"encoder.layer.{i}.attention.self.query.weight") for i in range(3)]
    assert query[0] is query[1] and [tuple(q.shape) for q in query] == [(24, 32)] * 3
    d, f, inner = 32, 48, 24
    block = 3 * (inner * d + inner) + inner * d + d + 2 * d * f + f + d
    norms = 4 * d
    adapters = 2 * (32 + 24)
    rest = 32_032 - 3 * 8_544
    assert sum(p.numel() for p in module.parameters()) == rest + 2 * block + 3 * norms + 3 * adapters


def test_masks_go_with_the_weights_that_win() -> None:
    program = _program().copy()
    name = "model.layers.{}.mlp.up_proj.weight"
    keep = held(torch.rand(64, 32, generator=torch.Generator().manual_seed(0)) > 0.5)
    masked.set_mask(program, [name.format(0)], keep, Origin(verb="prune", method="mask"))
    two = program.copy()
    share(program, ["layers[0]", "layers[1]"])
    zeros = int((~TENSORS.of(program, masked.mask_name(name.format(1)))).sum())
    assert zeros == int((TENSORS.of(program, name.format(1)) == 0).sum()) > 900
    refused(two, ["layers[0]", "layers[1]"], "S0487", "the mean of masked weights", weights="mean")
    share(two, ["layers[0]", "layers[1]"], weights="last")
    assert int((TENSORS.of(two, name.format(0)) == 0).sum()) == 0 and not masked.masks(two)


# ------------------------------------------------------------------ what is refused


def refused(program: Program, roles: list[str], code: str, text: str, keep_own: tuple[str, ...] = (), **params: Any) -> None:
    before = copy.deepcopy(dict(program.aliases)), list(program.weights)
    with pytest.raises(SurgeryError, match=text) as caught:
        share(program, roles, keep_own, **params)
    assert caught.value.diagnostics[0].code == code
    assert (program.aliases, list(program.weights)) == before  # nothing was done in part


def test_refusals() -> None:
    four = [f"layers[{i}]" for i in range(4)]
    program = _program().copy()
    refused(program, [*four[:3]], "S0480", "3 layers do not divide into pairs")
    refused(program, four, "S0480", "4 layers do not divide into 3 groups", groups=3)
    refused(program, four, "S0480", "nothing would be shared", groups=4)
    refused(program, four[:1], "S0480", "nothing to share with")
    refused(program, four, "S0482", "layer 1 is in groups 0 and 1", groups=((0, 1), (1, 2)))
    refused(program, four, "S0482", "leaves out layers\\[2\\], layers\\[3\\]", groups=((0, 1),))
    refused(program, four, "S0482", "names layer 7", groups=((0, 7),))
    refused(program, four, "S0488", "no part `nrom`", ("nrom",))
    refused(program, ["layers[0].attn", "layers[1].attn"], "S0475", "no whole layer")
    share(program, four[:2], ())
    refused(program, four[1:3], "S0485", "is shared with")
    adapted = _program().copy()
    run(adapted, operation(adapted, "adapt", "lora", ["layers[1].attn.q"], rank=2))
    refused(adapted, four, "S0486", "was made for a weight")


def test_layers_of_other_shapes_and_kinds_are_named() -> None:
    program = _program().copy()
    name = "model.layers.1.mlp.up_proj.weight"
    program.weights[name] = Init((60, 32), "float32", "zeros")
    with pytest.raises(
        SurgeryError, match=r"layers\[0\] and layers\[1\] cannot share: mlp.up_proj.weight is .*64, 32.* in one and .*60, 32"
    ) as e:
        share(program, ["layers[0]", "layers[1]"])
    assert e.value.diagnostics[0].code == "S0484"
    program, _ = zoo_program("t5")
    changes = share(program, ["encoder.layers[0]", "encoder.layers[1]"])
    assert "relative_attention_bias.weight of encoder.layers[0] stays its own" in changes[0].note
    with pytest.raises(SurgeryError, match="do not share with each other") as e:
        share(program, ["encoder.layers[2]", "decoder.layers[2]"])
    assert e.value.diagnostics[0].code == "S0481"
