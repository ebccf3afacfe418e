"""Attention that models write out in products and a softmax: in which spellings it is found, why in others not, and that it computes what it computed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery.backends.fuse import Target, engine, fuse
from surgery.backends.fuse.engine import FusionEntry
from surgery.backends.fuse.gate import difference, run
from surgery.backends.fuse.ops import translations
from surgery.model.live import Tensors, live_root
from surgery.model.program import Program
from surgery.model.sample import sample_inputs
from surgery.opening import capture
from surgery.passes import registry
from tests.programs import live, program_for

RULES = (
    "dead_code", "drop_identities", "simplify_masks", "fold_constants", "common_subexpressions", "written_attention", "pack_qkv", "attention",
)  # fmt: skip
HEADS, WIDTH = 4, 8
LOW = torch.finfo(torch.float32).min


def rooted(program: Program) -> fx.GraphModule:
    return live_root(program, Tensors(registry.function), dtype=torch.float32).eval()


def apart(x: Tensor, width: int = WIDTH) -> Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, width).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.permute(0, 2, 1, 3).contiguous().view(x.shape[0], x.shape[2], -1)


class Layer(nn.Module):
    """One attention; ``attend`` is how it is written."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.attend = attend
        self.table = nn.Parameter(torch.randn(HEADS, 16))
        self.slopes = nn.Parameter(torch.rand(HEADS, 1, 1))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.attend(self, x, mask)
        return found

    def far(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], device=x.device)
        return self.table[:, (steps[None, :] - steps[:, None]).clamp(-7, 7) + 7]


def plain(m: Layer, x: Tensor, mask: Tensor) -> Tensor:
    """A table of positions, then a mask of numbers; the softmax in float32."""
    scores = torch.matmul(apart(m.q(x)), apart(m.k(x)).transpose(-1, -2)) / math.sqrt(WIDTH)
    scores = scores + m.far(x)[None] + ((1.0 - mask) * LOW)[:, None, None, :]
    return joined(torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype), apart(m.v(x))))


def batched(m: Layer, x: Tensor, mask: Tensor) -> Tensor:
    """Heads on the axis of the batch, queries scaled, hidden by a number, bounded from below, summed in place."""
    b, s, _ = x.shape
    q, k, v = (apart(t).reshape(b * HEADS, s, WIDTH) for t in (m.q(x) * WIDTH**-0.5, m.k(x), m.v(x)))
    scores = torch.bmm(q, k.transpose(1, 2))
    scores = scores.view(b, HEADS, s, s).masked_fill((mask == 0)[:, None, None, :], LOW)
    scores = torch.max(scores, torch.tensor(LOW)).view(b * HEADS, s, s)
    scores += m.far(x).repeat(b, 1, 1)
    return joined(torch.bmm(scores.softmax(-1), v).view(b, HEADS, s, WIDTH))


def summed(m: Layer, x: Tensor, mask: Tensor) -> Tensor:
    """Letters for axes, keys divided, a number where a condition does not hold."""
    q, k, v = (t.view(x.shape[0], x.shape[1], HEADS, WIDTH) for t in (m.q(x), m.k(x), m.v(x)))
    scores = torch.einsum("bqnd,bknd->bnqk", q, k / 3.0)
    scores = torch.where((mask != 0)[:, None, None, :], scores, torch.tensor(-1e9))
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v).reshape(x.shape)


def sloped(m: Layer, x: Tensor, mask: Tensor) -> Tensor:
    """Slopes added by the product itself, as in Bloom."""
    b, s, _ = x.shape
    q, k, v = (apart(m_(x)).reshape(b * HEADS, s, WIDTH) for m_ in (m.q, m.k, m.v))
    slopes = (m.slopes * torch.arange(s, device=x.device)).expand(b, HEADS, 1, s).reshape(b * HEADS, 1, s)
    scores = slopes.baddbmm(q, k.transpose(1, 2), beta=0.5, alpha=0.3).view(b, HEADS, s, s)
    scores = scores - ((1.0 - mask) * 1e9).to(x.dtype)[:, None, None, :]
    return joined(torch.bmm(scores.softmax(-1).view(b * HEADS, s, s), v).view(b, HEADS, s, WIDTH))


def turned(m: Layer, x: Tensor, mask: Tensor) -> Tensor:
    """Steps in front of the batch, as in FSMT."""
    b, s, _ = x.shape
    y = x.transpose(0, 1)
    q, k, v = (t.view(s, b * HEADS, WIDTH).transpose(0, 1) for t in (m.q(y) * 0.4, m.k(y), m.v(y)))
    out = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)
    return out.transpose(0, 1).contiguous().view(s, b, 32).transpose(0, 1)


def steep(m: Layer, x: Tensor, mask: Tensor) -> Tensor:
    """Cosines with a factor for each head, as in Swin V2."""
    q, k = (F.normalize(apart(t), dim=-1) for t in (m.q(x), m.k(x)))
    scores = q @ k.transpose(-2, -1) * m.slopes.exp() + m.far(x)[None]
    return joined(scores.softmax(-1) @ apart(m.v(x)))


def scores_of(m: Layer, x: Tensor) -> Tensor:
    return apart(m.q(x)) @ apart(m.k(x)).transpose(-1, -2)


def after(m: Layer, x: Tensor, weights: Tensor) -> Tensor:
    return joined(weights @ apart(m.v(x)))


FOUND = (plain, batched, summed, sloped, turned, steep)


def sinking(m: Layer, x: Tensor, mask: Tensor) -> Tensor:
    """One more score a head that no key has, as in gpt-oss."""
    sink = m.slopes[None].expand(x.shape[0], -1, x.shape[1], 1)
    return after(m, x, torch.cat([scores_of(m, x), sink], -1).softmax(-1)[..., :-1])


def blocked(m: Layer, x: Tensor, mask: Tensor) -> Tensor:
    """Blocks of steps on an axis of their own, as in LongT5; here one."""
    q, k, v = (apart(t)[:, None] for t in (m.q(x), m.k(x), m.v(x)))
    return joined(((q @ k.transpose(-1, -2)).softmax(-1) @ v)[:, 0])


LEFT: tuple[tuple[str, Any], ...] = (
    ("the scores are capped, which the runtime's attention does faster for single steps and more slowly for prompts, and one graph serves both",
     lambda m, x, mask: after(m, x, (5 * torch.tanh(scores_of(m, x) / 5)).softmax(-1))),
    ("something is added to scores before they are capped",
     lambda m, x, mask: after(m, x, (5 * torch.tanh((scores_of(m, x) + m.far(x)) / 5)).softmax(-1))),
    ("between the product with the keys and the softmax stands another operation", lambda m, x, mask: after(m, x, scores_of(m, x).relu().softmax(-1))),
    ("between the softmax and the product with the values stands another operation",
     lambda m, x, mask: after(m, x, scores_of(m, x).softmax(-1) * m.slopes)),
    ("scores are multiplied by a number for each key", lambda m, x, mask: after(m, x, (scores_of(m, x) * mask[:, None, None, :]).softmax(-1))),
    ("the softmax is not over the keys", lambda m, x, mask: after(m, x, scores_of(m, x).softmax(-2))),
    ("what stands in the place of hidden scores is no number that hides them",
     lambda m, x, mask: after(m, x, scores_of(m, x).masked_fill((mask == 0)[:, None, None, :], -5.0).softmax(-1))),
    ("keys and values differ in width", lambda m, x, mask: joined(scores_of(m, x).softmax(-1) @ apart(torch.cat([m.v(x), x], -1), 2 * WIDTH))),
    ("an operand has no axis of heads", lambda m, x, mask: (m.q(x) @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x)),
    ("the softmax weighs more than keys, as with sinks, which the runtime's attention has no place for", sinking),
    ("the scores have an axis of blocks, which the runtime's attention has no place for", blocked),
    ("something else reads scores or weights", lambda m, x, mask: after(m, x, (w := scores_of(m, x).softmax(-1))) + w.amax((1, 3))[..., None]),
)  # fmt: skip


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.found = nn.ModuleList(Layer(f) for f in FOUND)
        self.left = nn.ModuleList(Layer(f) for _, f in LEFT)
        self.router = nn.Linear(32, 3)
        self.experts = nn.Parameter(torch.randn(3, 32))

    def forward(self, x: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        routed = self.router(x).softmax(-1) @ self.experts  # weighs something else than keys
        return (*(layer(x, attention_mask) for layer in (*self.found, *self.left)), routed)


@pytest.fixture(scope="module")
def spelled() -> tuple[Program, fx.GraphModule, dict[str, FusionEntry]]:
    torch.manual_seed(3)
    program = capture(Written().eval(), {"x": torch.randn(2, 6, 32), "attention_mask": torch.ones(2, 6, dtype=torch.long)})
    result = fuse(program, rooted(program), Target(), RULES)
    return program, result.graph, {e.rule: e for e in result.report}


def test_every_spelling_is_found_and_computes_the_same(spelled: tuple[Program, fx.GraphModule, dict[str, FusionEntry]]) -> None:
    """Also where a row hides all keys: then all of them weigh the same, as before."""
    program, graph, report = spelled
    assert report["written_attention"].fired == report["attention"].fired == len(FOUND)
    assert not [m for e in report.values() for m in e.misses if m.condition == engine.GATE]
    x, mask = sample_inputs(program, batch=3, length=11, seed=4, padding=True)
    mask[1] = 0
    root = rooted(program)
    for i, (want, got) in enumerate(zip(run(root, [x, mask]), run(graph, [x, mask]), strict=True)):
        assert difference(want, got, None) < 1e-5, i
        assert float(want.std()) > 1e-3


def test_near_misses_say_what_is_in_the_way(spelled: tuple[Program, fx.GraphModule, dict[str, FusionEntry]]) -> None:
    misses = spelled[2]["written_attention"].misses
    assert [m.condition for m in misses] == [condition for condition, _ in LEFT]


def bloom() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return live(BloomForCausalLM, BloomConfig(vocab_size=99, hidden_size=32, n_layer=1, n_head=4), scale=4.0)


def test_slopes_masks_and_a_cache_are_one_operation_of_the_runtime() -> None:
    """Bloom: with padding, and one or several new steps behind a cache."""
    pytest.importorskip("onnxruntime")
    from surgery.backends.onnx_export import export, input_names
    from surgery.backends.to_onnx import session

    program = program_for(bloom())
    root = rooted(program)
    result = fuse(program, root, Target(), RULES)
    assert not [m for e in result.report for m in e.misses if m.condition == engine.GATE]
    model = export(program, result.graph, opset=20, table=translations())
    attentions = [n for n in model.graph.node if n.op_type == "MultiHeadAttention"]
    assert [(bool(n.input[5]), len(n.output)) for n in attentions] == [(True, 3)] and not [
        n for n in model.graph.node if n.op_type == "Softmax"
    ]
    runner = session(model.SerializeToString())
    read = {i.name for i in runner.get_inputs()}
    for batch, length, past in ((3, 9, 0), (2, 1, 6), (2, 3, 4)):
        inputs = sample_inputs(program, batch=batch, length=length, seed=9, padding=True, past=past)
        feeds = {n: t.numpy() for n, t in zip(input_names(program), inputs, strict=True) if n in read}
        for want, got in zip(run(root, inputs), runner.run(None, feeds), strict=True):
            assert difference(want, torch.from_numpy(got), None) < 1e-5


def test_a_window_that_only_a_stored_table_tells_of_stays() -> None:
    """GPT-Neo: its local layers look back 20 steps, which shows beyond them alone; and it is inlined, though it reads tables up to a total length."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    from surgery.backends.fuse.inline import inlined

    config = GPTNeoConfig(
        vocab_size=99, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=48, window_size=20, intermediate_size=64,
        attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    program = program_for(live(GPTNeoForCausalLM, config, scale=4.0))
    root = rooted(program)
    assert len(inlined(program, rooted(program)).graph.nodes) > 50
    result = fuse(program, root, Target(), RULES)
    assert {e.rule: e.fired for e in result.report}["attention"] == 2
    for length, past in ((48, 0), (1, 47), (30, 9)):
        inputs = sample_inputs(program, batch=1, length=length, seed=9, padding=False, past=past)
        for want, got in zip(run(rooted(program), inputs), run(result.graph, inputs), strict=True):
            assert difference(want, got, None) < 1e-5, (length, past)


def test_models_whose_sizes_have_limits_are_inlined() -> None:
    """Bloom's slopes are an operation that knows open sizes only as the tracer takes it apart, MPT reads the last rows of a table."""
    from transformers import MptConfig, MptForCausalLM

    from surgery.backends.fuse.inline import inlined

    mpt = live(MptForCausalLM, MptConfig(vocab_size=99, d_model=32, n_layers=1, n_heads=4, max_seq_len=24))
    for model in (bloom(), mpt):
        program = program_for(model)
        flat = inlined(program, rooted(program))
        for length, past in ((9, 0), (1, 23), (24, 0)):
            inputs = sample_inputs(program, batch=2, length=length, seed=9, padding=True, past=past)
            for want, got in zip(run(rooted(program), inputs), run(flat, inputs), strict=True):
                assert difference(want, got, None) < 1e-6


def test_neighbours_that_are_turned_are_found_in_either_spelling() -> None:
    """RoFormer gives the turned features the shape of another value, and its attention is one operation behind rotary embedding."""
    from transformers import RoFormerConfig, RoFormerModel

    config = RoFormerConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, max_position_embeddings=40
    )
    program = program_for(live(RoFormerModel, config, scale=4.0))
    result = fuse(program, rooted(program), Target(), (*RULES, "rotary"))
    assert {e.rule: e.fired for e in result.report if e.rule in ("rotary", "attention")} == {"rotary": 2, "attention": 1}
    inputs = sample_inputs(program, batch=2, length=17, seed=9, padding=True)
    for want, got in zip(run(rooted(program), inputs), run(result.graph, inputs), strict=True):
        assert difference(want, got, None) < 1e-5


def test_scores_that_a_table_erases_are_hidden_without_it() -> None:
    """The first GPT multiplies with zeros for later keys and adds a low number there. A table of other numbers, or a number that hides nothing, stays."""
    from transformers import OpenAIGPTConfig, OpenAIGPTModel

    program = program_for(live(OpenAIGPTModel, OpenAIGPTConfig(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=48), scale=4.0))
    result = fuse(program, rooted(program), Target(), RULES)
    assert {e.rule: e.fired for e in result.report if e.rule in ("written_attention", "attention")} == {
        "written_attention": 1,
        "attention": 1,
    }
    for batch, length in ((2, 17), (1, 48)):
        inputs = sample_inputs(program, batch=batch, length=length, seed=9, padding=batch > 1)
        for want, got in zip(run(rooted(program), inputs), run(result.graph, inputs), strict=True):
            assert difference(want, got, None) < 1e-5
    other = rooted(program)
    (table,) = (b for b in other.buffers() if b.ndim == 4)
    table[..., 3, 1] = 0.5
    report = {e.rule: e for e in fuse(program, other, Target(), RULES).report}["written_attention"]
    assert not report.fired and [m.condition for m in report.misses] == ["scores are multiplied by a number for each key"]
