"""Fusion: what fires on which family, that fused graphs compute what they did, and what the gate, the masks and the near misses say."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from surgery.backends.fuse import Match, Miss, Target, engine, flatten, fuse, ops_attention
from surgery.backends.fuse.engine import Fused, fuse_flat
from surgery.backends.fuse.flatten import flatten_live
from surgery.backends.fuse.gate import CASES, Gate, difference, run
from surgery.backends.fuse.inline import NotInlined, inlined
from surgery.backends.fuse.masks import classify
from surgery.backends.fuse.ops import translations
from surgery.backends.fuse.view import FuseView
from surgery.model.live import Tensors, live_root
from surgery.model.program import Program
from surgery.model.sample import sample_inputs
from surgery.opening import capture
from surgery.passes import registry
from tests.captured_programs import zoo_program
from tests.test_prune_slice import Cutting
from tests.workbench import operation, perturb
from tests.workbench import run as apply

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Expected:
    """Products of q, k and v packed, attentions by the form that they take, rotary embeddings."""

    packed: int
    attention: dict[Any, int]
    rotary: int = 0
    says: tuple[str, ...] = ()


PLAIN, CACHED, GROUPED, PACKED = ops_attention.translations()

FAMILIES = {
    "bert": Expected(3, {PACKED: 3}, says=("padding by attention_mask",) * 3),
    "vit": Expected(3, {PACKED: 3}, says=("no mask",) * 3),
    "albert": Expected(3, {PACKED: 3}, says=("padding by attention_mask",) * 3),
    "gpt2": Expected(0, {CACHED: 3}, says=("causal and padding by attention_mask",) * 3),
    "llama": Expected(3, {GROUPED: 3}, 6, ("4 heads on 2 of keys",) * 3),
    "mixtral": Expected(3, {GROUPED: 3}, 6, ("4 heads on 2 of keys",) * 3),
    "t5": Expected(9, {PACKED: 6, PLAIN: 3}, says=("added to the scores",) * 4 + ("padding by attention_mask",)),
    "bart": Expected(9, {PACKED: 6, PLAIN: 3}, says=("padding by attention_mask",) * 3 + ("causal",)),
}
EXPORTED = ("bert", "gpt2", "llama")
"""The families whose graphs are written as ONNX here, one of each form of attention; others are in the tests of the backend."""


def rooted(program: Program) -> torch.fx.GraphModule:
    return live_root(program, Tensors(registry.function), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def made() -> dict[str, tuple[Program, torch.fx.GraphModule, Fused]]:
    return {}


def fused(made: dict[str, Any], family: str) -> tuple[Program, torch.fx.GraphModule, Fused]:
    if family not in made:
        program, _ = zoo_program(family)
        root = rooted(program)
        made[family] = (program, root, fuse(program, root, Target()))
    found: tuple[Program, torch.fx.GraphModule, Fused] = made[family]
    return found


def entry(result: Fused, name: str) -> Any:
    return next(e for e in result.report if e.rule == name)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(made: dict[str, Any], family: str) -> None:
    """As many places as the family has, none refused by the gate, and the graph computes on other inputs what the root computes."""
    program, root, result = fused(made, family)
    wanted = FAMILIES[family]
    assert not [m for e in result.report for m in e.misses if m.condition == engine.GATE]
    assert entry(result, "pack_qkv").fired == wanted.packed
    assert entry(result, "rotary").fired == wanted.rotary
    calls = Counter(n.target for n in result.graph.graph.nodes)
    assert {t: calls[t] for t in (PLAIN, PACKED, CACHED, GROUPED) if calls[t]} == wanted.attention and not calls[SDPA]
    said = [p.what for p in entry(result, "attention").places]
    assert len(said) == sum(wanted.attention.values())
    assert all(any(w in s for s in said[i:]) for i, w in enumerate(wanted.says)), said
    for batch, length, past in ((2, 17, 3), (1, 1, 8)):
        inputs = sample_inputs(program, batch=batch, length=length, seed=5, padding=True, past=past)
        for want, got in zip(run(root, inputs), run(result.graph, inputs), strict=True):
            assert difference(want, got, None) < 1e-5


@pytest.mark.parametrize("family", EXPORTED)
def test_the_exported_graph_is_fused_and_equal(made: dict[str, Any], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.backends.onnx_export import export, input_names
    from surgery.backends.to_onnx import session

    program, root, result = fused(made, family)
    monkeypatch.setattr(torch.export, "export", lambda *_, **__: pytest.fail("a fused graph knows its values: it is not traced again"))
    model = export(program, result.graph, opset=20, table=translations())
    kinds = Counter(n.op_type for n in model.graph.node)
    attention = kinds["Attention"] + kinds["MultiHeadAttention"]
    assert attention == sum(FAMILIES[family].attention.values()) and kinds["Softmax"] == 0
    assert kinds["RotaryEmbedding"] == FAMILIES[family].rotary
    names = {i.name for i in model.graph.initializer}
    own = set(program.weights)
    strange = {n for n in names if "." in n and n not in own}
    fresh = {n for n in strange if not n.endswith(".bias_shifted")}
    assert all(n.rsplit(".", 2)[-2] in ("qkv", "kv", "qk") for n in fresh), "new tensors have the names of what is packed in them"
    assert all(n.removesuffix("_shifted") in own or ".qkv." in n for n in strange - fresh)
    runner = session(model.SerializeToString())
    read = {i.name for i in runner.get_inputs()}
    for batch, length, past in ((3, 21, 0), (2, 3, 4)):
        inputs = sample_inputs(program, batch=batch, length=length, seed=9, padding=True, past=past)
        feeds = {n: t.numpy() for n, t in zip(input_names(program), inputs, strict=True) if n in read}
        for want, got in zip(run(root, inputs), runner.run(None, feeds), strict=True):
            assert difference(want, torch.from_numpy(got), None) < 1e-5


def test_sums_before_norms_without_a_mean_stay(made: dict[str, Any]) -> None:
    """Measured: in a decoder without biases nothing is gained by adding the shortcut in the product."""
    result = fused(made, "llama")[2]
    found = entry(result, "product_sum")
    assert found.fired == entry(result, "flat_rows").fired == 0
    condition = "the norm behind it is the root of the mean square, where a sum of its own is no slower"
    assert Counter(m.condition for m in found.misses) == {condition: 6}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attention_with_a_cache_is_the_standard_operator_where_the_set_has_it(family: str) -> None:
    """From operator set 23 on, with shared key heads and with one for each: the cache goes in and comes out grown, padding in front and behind stays right, and
    below nothing changes."""
    from surgery.backends.onnx_export import export, input_names
    from surgery.backends.to_onnx import session

    program, _ = zoo_program(family)
    root = rooted(program)
    result = fuse(program, root, Target(opset=23))
    assert entry(result, "attention").fired == 3 and not [m for e in result.report for m in e.misses if m.condition == engine.GATE]
    model = export(program, result.graph, opset=23, table=translations())
    found = [n for n in model.graph.node if "Attention" in n.op_type]
    assert [(n.op_type, n.domain, len(n.input), len(n.output)) for n in found] == [("Attention", "", 6, 3)] * 3
    runner, names = session(model.SerializeToString()), input_names(program)
    for batch, length, past, left in ((3, 9, 0, False), (2, 1, 6, False), (2, 3, 4, True)):
        inputs = sample_inputs(program, batch=batch, length=length, seed=9, padding=True, past=past)
        mask = inputs[names.index("attention_mask")]
        if left:
            mask.copy_(mask.flip(1))
            assert not mask.all()
        counts = mask[:, -length:].bool()
        feeds = {n: t.numpy() for n, t in zip(names, inputs, strict=True) if n in {i.name for i in runner.get_inputs()}}
        for want, got in zip(run(root, inputs), runner.run(None, feeds), strict=True):
            assert difference(want, torch.from_numpy(got), counts if want.shape[:2] == counts.shape else None) < 1e-5


def test_same_graph_every_time(made: dict[str, Any]) -> None:
    program, root, first = fused(made, "bert")
    again = fuse(program, root, Target())
    assert again.graph.code == first.graph.code and again.record() == first.record()
    assert json.loads(json.dumps(first.record()))[0]["rule"] == first.report[0].rule


# ------------------------------------------------------------------ hand-made models


class Block(nn.Module):
    """Attention of three widths per head of a size of its own, over steps masked in one of several ways."""

    def __init__(self, mask: str = "padding", heads: int = 2, width: int = 4, adapter: bool = False) -> None:
        super().__init__()
        self.heads, self.kind = heads, mask
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, heads * width, bias=b) for b in (True, False, True))
        self.out = nn.Linear(heads * width, 16)
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.down_a, self.up_a = nn.Linear(16, 2, bias=False), nn.Linear(2, heads * width, bias=False)
        self.adapter = adapter

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        def split(t: torch.Tensor) -> torch.Tensor:
            return t.view(t.shape[0], t.shape[1], self.heads, -1).transpose(1, 2)

        q = self.q_proj(x)
        if self.adapter:
            q = q + self.up_a(self.down_a(x))
        made = nn.functional.scaled_dot_product_attention(
            split(q), split(self.k_proj(x)), split(self.v_proj(x)), self.mask(x, attention_mask)
        )  # fmt: skip
        x = x + self.out(made.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    def mask(self, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        later = steps[None, :] > steps[:, None]
        padding = given[:, None, None, :] != 0
        if self.kind == "padding":
            return padding
        if self.kind == "numbers":
            return (1.0 - given[:, None, None, :].to(x.dtype)) * torch.finfo(torch.float32).min
        if self.kind == "causal":
            return ~later[None, None] & padding
        if self.kind == "window":
            return (~later & (steps[:, None] - steps[None, :] < 40))[None, None] & padding
        if self.kind == "distance":
            return -0.1 * (steps[None, :] - steps[:, None]).abs().to(x.dtype)[None, None]
        return (padding if self.kind == "opposite" else ~padding) ^ (self.kind == "opposite")


def view_of(block: Block, target: Target = Target()) -> FuseView:
    torch.manual_seed(3)
    for p in block.parameters():
        nn.init.normal_(p, std=0.4)
    program = capture(block.eval(), {"x": torch.randn(2, 6, 16), "attention_mask": torch.ones(2, 6, dtype=torch.long)})
    return FuseView(flatten_live(program, rooted(program)), program, target)


@pytest.mark.parametrize(
    ("kind", "causal", "padding", "why"),
    [
        ("padding", False, "attention_mask", ""),
        ("numbers", False, "attention_mask", ""),
        ("causal", True, "attention_mask", ""),
        ("window", None, None, "neither padding nor causal"),
        ("distance", None, None, "numbers of its own"),
        ("opposite", None, None, "neither padding nor causal"),
    ],
)
def test_masks_are_what_they_do(kind: str, causal: bool | None, padding: str | None, why: str) -> None:
    """A window of 40 steps shows at lengths above 40 only; the trials are that long because the number stands in the graph."""
    view = view_of(Block(kind))
    (node,) = view.calls(SDPA)
    mask = classify(view, node.args[3], {})  # type: ignore[arg-type]
    assert mask.plain == (causal is not None) and why in mask.why
    if mask.plain:
        assert mask.causal == causal and mask.padding is not None and str(mask.padding.target) == padding


def measured(view: FuseView) -> Fused:
    """The fused graph of a view, which on inputs of another size computes what the graph computed."""
    inputs = sample_inputs(view.program, batch=3, length=19, seed=2, padding=True)
    before = run(view.graph, inputs)
    result = fuse_flat(view.program, view.graph, view.target)
    assert max(difference(a, b, None) for a, b in zip(before, run(result.graph, inputs), strict=True)) < 1e-5
    return result


def test_biases_that_differ_and_what_is_packed() -> None:
    """A key projection without a bias beside others with one; two of the feed-forward block, for the other backend only."""
    result = measured(view_of(Block("window", heads=3), Target(backend="pt2")))
    assert (entry(result, "pack_qkv").fired, entry(result, "pack_gate_up").fired) == (1, 1)
    tensors = dict(result.graph.named_parameters())
    assert tensors["qkv.weight"].shape == (36, 16) and tensors["gate_up.weight"].shape == (48, 16)
    assert tensors["qkv.bias"][12:24].eq(0).all() and tensors["qkv.bias"][24:].ne(0).all()
    assert "q_proj.weight" not in tensors and "out.weight" in tensors


@pytest.mark.parametrize(
    ("adapter", "live", "condition", "detail"),
    [
        (True, "", "an operand comes from more than one product, as with an adapter beside a projection", "q: q_proj.weight, up_a.weight"),
        (False, "k_proj.weight", "a weight stays apart under its own name because it is live", "k_proj.weight"),
    ],
)
def test_near_misses_say_the_first_condition(adapter: bool, live: str, condition: str, detail: str) -> None:
    result = measured(view_of(Block("causal", adapter=adapter), Target(live=frozenset({live} - {""}))))
    found = entry(result, "pack_qkv")
    assert found.fired == 0
    (miss,) = found.misses
    assert (miss.condition, miss.detail) == (condition, detail) and "scaled_dot_product_attention" in miss.node_name
    assert any(line.endswith(f"{condition} ({detail})") for line in result.summary())
    assert entry(result, "attention").fired == 1, "the attention itself is fused all the same"
    assert not live or live in dict(result.graph.named_parameters())


class Wrong:
    """Changes every product: the one to 16 features to something else, one by raising, the others to what they are."""

    name, doc, order, targets = "wrong", "changes products", 0, frozenset({"onnx"})

    def find(self, view: FuseView) -> Any:
        for node in view.calls(aten.linear.default):
            name = view.name(node.args[1])
            yield Match(node, lambda n=node, w=name: self.apply(view, n, w), "changed")  # type: ignore[misc]
        yield Miss("somewhere", "a condition")

    def apply(self, view: FuseView, node: Any, name: str) -> None:
        if name == "up.weight":
            raise ValueError("stumbled")
        with view.after(node):
            new = view.call(aten.mul.Tensor, node, 1.001 if name == "down.weight" else 1.0)
        node.replace_all_uses_with(new, delete_user_cb=lambda u: u is not new)


def test_what_breaks_the_gate_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two places of seven are wrong, one of them by a thousandth: both are found and undone, the rest stays, the report has all."""
    monkeypatch.setattr(engine, "rules", lambda: (Wrong(),))
    monkeypatch.setattr(engine, "ROUNDS", 1)
    view = view_of(Block())
    (found,) = measured(view).report
    assert found.fired == 5 and all("linear" in p.place for p in found.places)
    refused = [m for m in found.misses if m.condition == engine.GATE]
    assert len(refused) == 2 and refused[0].detail.startswith("ValueError") and refused[1].detail.startswith("output 0 on ")
    assert "stumbled" in refused[0].detail and "allowed 3e-05" in refused[1].detail
    assert Miss("somewhere", "a condition") in found.misses
    assert sum(n.target is aten.mul.Tensor and n.args[1] == 1.0 for n in view.nodes) == 5


def test_the_gate_sees_shapes_and_what_is_not_finite() -> None:
    x = torch.ones(2, 3, 4)
    nan = x.clone()
    nan[0, 0, 0] = torch.nan
    assert difference(x, x[:, :2], None) == difference(x, nan, None) == float("inf") and difference(nan, nan, None) == 0
    assert difference(x, x + 1e-3 * (torch.arange(3) == 0)[:, None], torch.tensor([[0, 1, 1]] * 2)) == 0, "a padded position"
    assert {c.name for c in CASES if c.left or c.padding or c.past} == {"padded", "cached", "continued"}


def test_layers_of_different_sizes() -> None:
    """Heads and units pruned to another number in every layer: all layers fuse, each with its own sizes."""
    program = Cutting("bert", "heads", [f"layers[{i}].attn" for i in range(3)], study=False, each=[{"keep": k} for k in (3, 1, 2)])
    program.run()
    cut = Cutting(program.program, "ffn", [f"layers[{i}].ffn" for i in range(3)], study=False, each=[{"keep": k} for k in (24, 40, 8)])
    cut.run()
    root = rooted(cut.program)
    result = fuse(cut.program, root, Target())
    assert [p.what.split(",")[0] for p in entry(result, "attention").places] == ["3 heads", "1 heads", "2 heads"]
    assert [p.what for p in entry(result, "pack_qkv").places] == [f"one product of {n} + {n} + {n} rows" for n in (24, 8, 16)]
    inputs = sample_inputs(cut.program, batch=2, length=33, seed=1, padding=True)
    for want, got in zip(run(root, inputs), run(result.graph, inputs), strict=True):
        assert difference(want, got, None) < 1e-5


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_inlining_gives_the_operations_that_tracing_gives(family: str) -> None:
    program, _ = zoo_program(family)
    root = rooted(program)
    quick, traced = flatten_live(program, root), flatten._traced(program, root)
    flatten._strip(traced.graph)
    names = [Counter(str(n.target) for n in g.graph.nodes if n.op == "call_function") for g in (quick, traced)]
    assert names[0] == names[1] and sum(names[0].values()) > 30
    gate = Gate(program, traced, torch.float32)
    assert len(gate.samples) == (4 if family == "gpt2" else 2) and gate.error(quick) == (0.0, "")
    for node in quick.graph.nodes:
        assert node.op == "output" or node.meta["val"] is not None, node


def test_what_was_attached_is_inlined_as_tracing_takes_it_apart() -> None:
    """Keys and values of one size, which are told apart, a mask that grows, and a branch behind a block."""
    program = zoo_program("gpt2")[0].copy()
    apply(program, operation(program, "insert", "prefix", ["layers[0].attn"], "on", length=3))
    apply(program, operation(program, "insert", "bottleneck", ["layers[1].ffn"], "after", width=4))
    perturb(program)
    root = rooted(program)
    quick, traced = inlined(program, root), flatten._traced(program, root)
    gate = Gate(program, traced, torch.float32)
    assert gate.error(quick)[0] <= 1e-6
    named = {str(n.target) for n in quick.graph.find_nodes(op="get_attr")}
    assert {t for a in program.attachments for t in a.tensors} <= named


def test_what_cannot_be_inlined_is_traced() -> None:
    program, _ = zoo_program("swin")
    root = rooted(program)
    with pytest.raises(NotInlined, match="only runs at some sizes"):
        inlined(program, root)
    assert any(n.op == "call_function" for n in flatten_live(program, root).graph.nodes)


def test_large_outputs_are_compared_without_copies_and_the_same() -> None:
    """The short way of the comparison gives what the one in float64 gives, to rounding, and sees what is not finite."""
    want = torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(1))
    got = want + 1e-4 * torch.randn(3, 4, 50, generator=torch.Generator().manual_seed(2))
    exact = float((want.double() - got.double()).abs().max() / want.double().abs().max())
    assert difference(want, got, None) == pytest.approx(exact, rel=1e-5)
    assert difference(want.double(), got.double(), None) == pytest.approx(exact, rel=1e-9)
    got[2, 3, 7] = float("nan")
    assert difference(want, got, None) == float("inf")
    want[2, 3, 7] = float("nan")
    assert 0 < difference(want, got, None) < 1e-3
