"""Captured graphs in training: same seed, same numbers and gradients as the live model; other dtypes; nothing shared."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from surgery.core.diagnostics import SurgeryError
from surgery.model.capture import Captured, capture_config, capture_module, clone_tree, materialise
from surgery.model.capture.leaves import Attention, DropPath
from surgery.model.retarget import graphs_of, retarget
from tests.capture_support import assert_bitwise, captured, flat_inputs, flat_outputs
from tests.zoo import CAPTURABLE, ZOO, Entry

# What the live model draws with Python or numpy, outside any graph: a capture represents the model without it and says so.
STEADY = {"wav2vec2-conformer": {"layerdrop": 0.0, "apply_spec_augment": False}}
_VIT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
# Families whose default rates are zero get rates, so that something is drawn; ResNet draws nothing at all.
RATES: dict[str, dict[str, Any]] = {
    "albert": _VIT,
    "llama": {"attention_dropout": 0.1},
    "qwen3": {"attention_dropout": 0.1},
    "gemma3_text": {"attention_dropout": 0.1},
    "phi3": {"attention_dropout": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "mixtral": {"attention_dropout": 0.1, "router_jitter_noise": 0.1},
    "bart": {"attention_dropout": 0.1, "activation_dropout": 0.1},
    "whisper": {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1},
    "vit": _VIT,
    "swin": _VIT,
    "clip": {part: {**ZOO["clip"].config[part], "attention_dropout": 0.1} for part in ("text_config", "vision_config")},
    "audio-spectrogram-transformer": _VIT,
}


@cache
def training(family: str) -> tuple[Entry, Captured]:
    """The family's entry and capture with every rate above zero that its config has."""
    if family not in RATES:
        return ZOO[family], captured(family)
    entry = replace(ZOO[family], config={**ZOO[family].config, **RATES[family]})
    return entry, capture_config(entry.make_config(), entry.architecture)


@pytest.mark.parametrize("family", CAPTURABLE)
def test_train_mode_same_seed(family: str) -> None:
    """Dropout, attention dropout, stochastic depth and router noise draw the same numbers at the same places."""
    entry, capture = training(family)
    assert capture.fallback == ""
    model = entry.make_model(**STEADY.get(family, {})).train()
    graph = materialise(capture, {k: v.clone() for k, v in model.state_dict().items()}).train()
    inputs = entry.inputs(3, 17)
    flat = flat_inputs(capture, inputs)
    torch.manual_seed(11)
    want = flat_outputs(capture, model(**inputs))
    torch.manual_seed(11)
    got = graph(*flat)
    assert_bitwise(got, want)
    torch.manual_seed(12)
    assert torch.equal(graph(*flat)[0], got[0]) is (family == "resnet")  # what is drawn matters, and eval draws nothing
    graph.eval()
    assert torch.equal(graph(*flat)[0], graph(*flat)[0])


@pytest.mark.parametrize("family", CAPTURABLE)
def test_gradients(family: str) -> None:
    entry, capture = training(family)
    model = entry.make_model(**STEADY.get(family, {})).train()
    graph = materialise(capture, {k: v.clone() for k, v in model.state_dict().items()}).train()
    inputs = entry.inputs(3, 17)
    flat = flat_inputs(capture, inputs)
    torch.manual_seed(11)
    _loss(flat_outputs(capture, model(**inputs))).backward()
    torch.manual_seed(11)
    _loss(graph(*flat)).backward()
    mine = {n: p.grad for n, p in graph.named_parameters(remove_duplicate=False)}
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert mine[name] is None, name
        else:
            assert torch.equal(mine[name], parameter.grad), name  # type: ignore[arg-type]
            compared += 1
    assert compared >= 20


def _loss(outputs: Any) -> torch.Tensor:
    """Every output that carries a gradient takes part, caches too."""
    return torch.stack([t.square().mean() for t in outputs if t.requires_grad]).sum()


def test_what_is_drawn_outside_the_graph_is_said() -> None:
    assert [n.partition(" is drawn")[0] for n in captured("wav2vec2-conformer").notes] == ["layer drop", "SpecAugment"]
    assert "probability 0.1" in captured("wav2vec2-conformer").notes[0]
    assert all(not captured(family).notes for family in CAPTURABLE if family != "wav2vec2-conformer")


def test_batch_norm_follows_training() -> None:
    entry, capture = ZOO["resnet"], captured("resnet")
    model = entry.make_model().train()
    graph = materialise(capture, {k: v.clone() for k, v in model.state_dict().items()}).train()
    inputs = entry.inputs(3, 0)
    assert_bitwise(graph(*flat_inputs(capture, inputs)), flat_outputs(capture, model(**inputs)))
    after = graph.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(after[name], tensor), name
    assert int(after["embedder.embedder.normalization.num_batches_tracked"]) == 1
    model.eval(), graph.eval()
    assert_bitwise(graph(*flat_inputs(capture, inputs)), flat_outputs(capture, model(**inputs)))


class Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rate: float, rows: bool) -> torch.Tensor:
        gone = torch.empty_like(x[..., :1] if rows else x).bernoulli_(rate).to(torch.bool)
        return x.masked_fill(gone, 0) * (1.0 / (1 - rate))


class OwnDropout(nn.Module):
    """Dropout in an autograd function of its own, as SEW-D has; or, with ``rows``, something else of that name."""

    def __init__(self, rows: bool) -> None:
        super().__init__()
        self.drop_prob, self.rows = 0.25, rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Masked.apply(x, self.drop_prob, self.rows) if self.training else x  # type: ignore[no-untyped-call, no-any-return]


@pytest.mark.parametrize("rows", [False, True])
def test_dropout_under_another_name(rows: bool) -> None:
    capture = capture_module(nn.Sequential(nn.Linear(4, 64), OwnDropout(rows)), (torch.randn(8, 4),))
    assert bool(capture.notes) is rows
    leaves = [m for m in capture.graph.modules() if isinstance(m, nn.Dropout)]
    assert [m.p for m in leaves] == ([] if rows else [0.25])


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "gemma3_text", "qwen3"])
def test_bfloat16(family: str) -> None:
    """The capture's own dtype: every cast of the live model in bfloat16 is there."""
    entry, capture = ZOO[family], captured(family)
    import transformers

    state = entry.make_model().state_dict()
    model = getattr(transformers, entry.architecture)._from_config(entry.make_config(), dtype=torch.bfloat16).eval()
    model.load_state_dict(state)
    graph = materialise(capture, state, torch.bfloat16)
    inputs = entry.inputs(3, 17)
    if "past_key_values" in inputs:
        for layer in inputs["past_key_values"].layers:
            layer.keys, layer.values, layer.dtype = layer.keys.bfloat16(), layer.values.bfloat16(), torch.bfloat16
    flat = flat_inputs(capture, inputs)
    with torch.no_grad():
        assert_bitwise(graph(*flat), flat_outputs(capture, model(**inputs)))


def test_float16_has_no_infinite_masks() -> None:
    """T5 fills its mask with the smallest number of the dtype; that of bfloat16 is -inf in float16."""
    graph = clone_tree(captured("t5").graph)
    retarget(graph, dtype=torch.float16)
    numbers = [a for _, gm in graphs_of(graph) for n in gm.graph.nodes for a in (*n.args, *n.kwargs.values()) if isinstance(a, float)]
    assert any(a == torch.finfo(torch.float16).min for a in numbers)
    assert all(abs(a) <= torch.finfo(torch.float16).max for a in numbers)


def test_retarget_rewrites_every_dtype_and_device() -> None:
    capture = captured("llama")
    graph = clone_tree(capture.graph)
    retarget(graph, dtype=torch.float32, device="cpu")
    text = "\n".join(str(gm.graph) for _, gm in graphs_of(graph))
    before = "\n".join(str(gm.graph) for _, gm in graphs_of(capture.graph))
    assert "torch.bfloat16" in before and "meta" in before
    assert "torch.bfloat16" not in text and "meta" not in text
    assert not any(
        n.meta["spec"].dtype == "bfloat16" for _, gm in graphs_of(graph) for n in gm.graph.nodes if hasattr(n.meta["spec"], "dtype")
    )


def test_clone_tree_is_separate() -> None:
    capture = captured("bert")
    graph = clone_tree(capture.graph)
    layer = graph.get_submodule("encoder.layer.0")
    node = next(n for n in layer.graph.nodes if n.op == "call_module")  # type: ignore[union-attr]
    node.meta["mark"] = 1
    graph.get_submodule("embeddings.dropout").p = 0.9  # type: ignore[assignment]
    other = next(n for n in capture.graph.get_submodule("encoder.layer.0").graph.nodes if n.op == "call_module")  # type: ignore[union-attr]
    assert "mark" not in other.meta and capture.graph.get_submodule("embeddings.dropout").p == 0.1
    assert list(graph.state_dict()) == list(capture.graph.state_dict())
    assert graph.get_parameter("embeddings.word_embeddings.weight") is capture.graph.get_parameter("embeddings.word_embeddings.weight")


def test_leaves_follow_training() -> None:
    q = torch.randn(2, 2, 5, 4)
    attention = Attention(0.5).eval()
    assert torch.equal(attention(q, q, q), torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert not torch.equal(attention.train()(q, q, q), attention.eval()(q, q, q))
    path = DropPath(0.5).train()
    torch.manual_seed(0)
    dropped = path(torch.ones(64, 3))
    assert set(dropped.unique().tolist()) == {0.0, 2.0} and torch.equal(dropped[:, 0], dropped[:, 2])
    assert torch.equal(path.eval()(q), q)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x)))) * scale


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList([Block(8) for _ in range(4)])
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.table = torch.linspace(0, 1, 8)  # a plain attribute, neither parameter nor buffer
        self.head = nn.Linear(8, 20)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.embed(ids) + self.table
        for block in self.blocks:
            x = block(x, self.scale)
        return {"logits": self.head(x), "hidden": x}


def test_module_from_python() -> None:
    torch.manual_seed(0)
    module = Stack().eval()
    module.blocks[2].up.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    capture = capture_module(module, (torch.ones(2, 5, dtype=torch.long),))
    assert capture.fallback == "" and not module.training
    assert capture.signature.parameters == ("ids",)
    assert capture.signature.symbols == {"s0": ("ids", 0, 2), "s1": ("ids", 1, 5)}
    assert capture.aliases == {"head.weight": "embed.weight"}
    assert torch.equal(capture.constants["table"], module.table)
    assert capture.graph.get_parameter("blocks.2.up.weight").requires_grad is False
    assert capture.graph.get_parameter("blocks.1.up.weight").requires_grad is True
    mine = {id(p) for p in capture.graph.parameters()}
    assert not mine & {id(p) for p in module.parameters()}
    graph = materialise(capture, module.state_dict())
    ids = torch.randint(0, 20, (3, 9))
    want = module(ids)
    assert_bitwise(graph(ids), [want["logits"], want["hidden"]])
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert [p for p, _ in graphs_of(capture.graph) if p] == [f"blocks.{i}" for i in range(4)]


def test_transformer_encoder_of_torch() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    module = nn.TransformerEncoder(layer, 3).eval()
    capture = capture_module(module, {"src": torch.randn(2, 6, 16)})
    graph = materialise(capture, module.state_dict()).train()
    module.train()
    x = torch.randn(3, 9, 16)
    torch.manual_seed(4)
    want = module(x)
    torch.manual_seed(4)
    (got,) = graph(x)
    assert torch.equal(got, want)
    assert "layers.1" in [p for p, _ in graphs_of(capture.graph)]


class Noisy(nn.Module):
    def __init__(self, everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(x)
        return y + torch.rand_like(y) if self.training or self.everywhere else y


def test_noise_stays_where_evaluation_draws_it_too() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(SurgeryError) as caught:
        capture_module(Noisy(False), (x,))
    assert caught.value.diagnostics[0].code == "S0510"
    module = Noisy(True).eval()
    graph = materialise(capture_module(module, (x,)), module.state_dict())
    torch.manual_seed(0)
    want = module(x)
    torch.manual_seed(0)
    assert torch.equal(graph(x)[0], want)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Noisy(False), Noisy(False)])
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.parts[1](self.parts[0](x)))


def test_a_part_that_draws_in_training_only_is_captured_as_in_evaluation() -> None:
    module, x = Parts(), torch.randn(3, 4)
    captured = capture_module(module, (x,))
    assert captured.notes == (
        "aten.rand_like is drawn outside the graph: in training this module runs parts.0 and 1 more of its class as in evaluation",
    )
    operations = [str(n.target) for _, g in graphs_of(captured.graph) for n in g.graph.nodes]
    assert not any("rand" in o for o in operations) and any("dropout" in o for o in operations)
    assert all(m.training for m in module.modules())


class Faced(nn.Module):
    """Drops in training, and in evaluation scales what it kept instead, as the experts of NLLB-MoE do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        if self.training:
            y = self.dropout(y)
        else:
            y = y * 0.5
        return y


class Same(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            y = self.linear(x)
        else:
            y = self.linear(x)
        return self.dropout(y)


def test_a_part_with_another_branch_for_evaluation_is_captured_as_there() -> None:
    module, x = nn.Sequential(Faced(), Same()), torch.randn(3, 4)
    captured = capture_module(module, (x,))
    assert len(captured.notes) == 1 and captured.notes[0].startswith("Faced") and all(m.training for m in module.modules())
    graph = materialise(captured, module.state_dict())
    assert torch.equal(graph.eval()(x)[0], module.eval()(x))
    same = capture_module(nn.Sequential(Same()).train(), (x,))
    assert same.notes == () and any("dropout" in str(n.target) for _, g in graphs_of(same.graph) for n in g.graph.nodes)


class Sharer(nn.Module):
    """A layer whose activation is the one module of all layers, as that of OpenAI's GPT is."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.linear, self.activation, self.dropout = nn.Linear(4, 4), activation, nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x + self.dropout(self.activation(self.linear(x)))]


class Sharers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        activation = nn.Tanh()
        self.layers = nn.ModuleList([Sharer(activation) for _ in range(3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return x


def test_layers_that_share_a_module_drop_out_in_training_only() -> None:
    """The tracer then tells paths of modules from the layer on, and not from the model."""
    module, x = Sharers(), torch.randn(3, 4)
    capture = capture_module(module, (x,))
    assert capture.fallback == "" and len(list(graphs_of(capture.graph))) == 4
    graph = materialise(capture, module.state_dict())
    assert {type(graph.get_submodule(f"layers.{i}.dropout")) for i in range(3)} == {nn.Dropout}
    torch.manual_seed(5)
    want = module.train()(x)
    torch.manual_seed(5)
    assert torch.equal(graph.train()(x)[0], want)
    assert torch.equal(graph.eval()(x)[0], module.eval()(x))
