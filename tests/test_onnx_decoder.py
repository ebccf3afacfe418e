"""``emit onnx`` of an encoder and a decoder with its cache: what the two graphs give step by step beside ``generate`` of the live model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FSMTConfig,
    FSMTForConditionalGeneration,
    LongT5Config,
    LongT5ForConditionalGeneration,
    M2M100Config,
    M2M100ForConditionalGeneration,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
)

import surgery
from surgery.backends import onnx_cut
from surgery.backends.onnx_decoder import cached_pair
from surgery.backends.onnx_export import input_names, output_names
from surgery.model.live import Tensors, live_root
from surgery.model.sample import placeholders
from surgery.passes import registry
from tests.captured_programs import zoo_program
from tests.programs import live, program_for
from tests.workbench import operation, perturb, run

pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, 5:] = 0
STEPS = 7


def bart(layers: int = 1) -> Any:
    sizes = dict(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=layers, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    return live(BartForConditionalGeneration, BartConfig(**sizes), scale=4.0)


def t5() -> Any:
    sizes = dict(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=2, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=12, decoder_start_token_id=0,
    )  # fmt: skip
    return live(T5ForConditionalGeneration, T5Config(**sizes), seed=1, scale=6.0)


def m2m100() -> Any:
    sizes = dict(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    return live(M2M100ForConditionalGeneration, M2M100Config(**sizes), scale=4.0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("pairs")
    old = Path.cwd()
    os.chdir(home)
    yield home
    os.chdir(old)


def decode(name: str, start: int, steps: int, heads: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens and the logits behind them, with the encoder run once and one token a step; rows do not stop."""
    encoder, decoder = (runtime.InferenceSession(f"{name}.{part}.onnx") for part in ("encoder", "decoder"))
    out = dict(
        zip(
            [o.name for o in encoder.get_outputs()],
            encoder.run(None, {"input_ids": IDS.numpy(), "attention_mask": MASK.numpy()}),
            strict=True,
        )
    )
    state = {n.replace("present", "past_key_values"): v for n, v in out.items() if n.startswith("present.")}
    own = [i.name for i in decoder.get_inputs() if ".decoder." in i.name]
    state |= {n: np.zeros((2, heads, 0, width), np.float32) for n in own}
    state["encoder_attention_mask"] = MASK.numpy()
    read = {i.name for i in decoder.get_inputs()}
    assert "encoder_hidden_states" not in read, "the decoder gets keys and values, not what they are made of"
    tokens, scores = np.full((2, 1), start), []
    for _ in range(steps):
        feeds = state | {"decoder_input_ids": tokens[:, -1:], "decoder_attention_mask": np.ones_like(tokens)}
        got = dict(zip([o.name for o in decoder.get_outputs()], decoder.run(None, {n: feeds[n] for n in read}), strict=True))
        state |= {n.replace("present", "past_key_values"): v for n, v in got.items() if n.startswith("present.")}
        assert all(state[n].shape == (2, heads, tokens.shape[1], width) for n in own)
        scores.append(got["logits"][:, -1])
        tokens = np.concatenate([tokens, scores[-1].argmax(-1)[:, None]], 1)
    return tokens, np.stack(scores)


@pytest.mark.parametrize(("family", "options"), [("t5", "(optimize = none)"), ("bart", "(cache = true)"), ("m2m100", "")])
def test_steps_with_the_cache_give_the_tokens_and_logits_of_generate(work: Path, family: str, options: str) -> None:
    """With padding in the encoder; the decoder of the BART is fused, that of the T5 is not, and M2M100 counts tokens to find their positions."""
    model = {"t5": t5, "bart": bart, "m2m100": m2m100}[family]()
    model.save_pretrained(family)
    result = surgery.compile(f'surg 1\n\nfreeze all on decoder.layers\nemit onnx{options} to "{family}.onnx"\n', family)
    start = model.config.decoder_start_token_id
    model.generation_config.update(eos_token_id=None, forced_eos_token_id=None, pad_token_id=0)
    want = model.generate(
        IDS, attention_mask=MASK, max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False, num_beams=1, output_logits=True,
        return_dict_in_generate=True, use_cache=False,
    )  # fmt: skip
    tokens, scores = decode(family, start, STEPS, 4, 8)
    assert np.array_equal(tokens, want.sequences.numpy()) and len({*tokens[:, 1:].flat}) > 2
    expected = torch.stack(want.logits).numpy()
    assert np.abs(scores - expected).max() <= 1e-4 * max(1.0, float(np.abs(expected).max()))
    claims = [c for c in result.certificates if c["claim"] == "whole model = encoder, then decoder token by token"]
    assert {c["case"] for c in claims} == {"random", "padded", "single"} and all(c["ok"] for c in claims)
    assert any("with a cache" in f for f in result.plan.steps[-1].facts)
    assert any("present.LAYER.decoder.key" in n for n in result.notes)


def in_pieces(program: Any, cuts: list[int], *flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """What a program gives at once, what its two parts give for a target in pieces, and the decoder: all in torch."""
    tensors = Tensors(registry.function)
    parts = cached_pair(program)
    whole, encoder, decoder = (live_root(p, tensors).eval() for p in (program, *parts))
    given = dict(zip(input_names(program), flat, strict=True))
    with torch.no_grad():
        want = whole(*flat)[0]
        source = encoder(*(given[n] for n in input_names(parts[0])))
    names = output_names(parts[0], len(source))
    state = {n.replace("present", "past_key_values"): t for n, t in zip(names, source, strict=True)}
    state["encoder_attention_mask"] = given["attention_mask"]
    for name, (_, spec) in zip(input_names(parts[1]), placeholders(parts[1]), strict=True):
        if ".decoder." in name:
            state[name] = torch.zeros(2, int(spec.shape[1]), 0, int(spec.shape[3]))
    rows, start = [], 0
    for stop in cuts:
        state["decoder_input_ids"] = given["decoder_input_ids"][:, start:stop]
        state["decoder_attention_mask"] = given["decoder_attention_mask"][:, :stop]
        with torch.no_grad():
            out = decoder(*(state[n] for n in input_names(parts[1])))
        found = dict(zip(output_names(parts[1], len(out)), out, strict=True))
        state |= {n.replace("present", "past_key_values"): t for n, t in found.items() if n.startswith("present.")}
        rows.append(out[0])
        start = stop
    return want, torch.cat(rows, 1), parts[1]


def test_prefixes_cut_heads_and_a_dropped_attention_are_no_part_of_the_cache() -> None:
    """Stored keys in front of those of both attentions stay in the decoder, behind its past; a layer without attention to the encoder has no
    place among what the encoder gives; heads that are gone are gone from the past."""
    program, flat = zoo_program("bart")
    run(program, operation(program, "skip", "bypass", ["decoder.layers[1].cross"]))
    run(program, operation(program, "prune", "heads", ["decoder.layers[0].attn"], keep=3))
    run(
        program,
        operation(
            program, "insert", "prefix", ["decoder.layers[0].attn", "decoder.layers[2].attn", "decoder.layers[0].cross"], length=3, width=5
        ),
    )
    perturb(program, 0.5)
    want, got, decoder = in_pieces(program, [2, 3, 7], *flat)
    assert torch.allclose(got, want[:, :7], atol=1e-5)
    heads = {n: int(spec.shape[1]) for n, (_, spec) in zip(input_names(decoder), placeholders(decoder), strict=True) if n.endswith("key")}
    assert heads == {
        "past_key_values.0.decoder.key": 3, "past_key_values.1.decoder.key": 4, "past_key_values.2.decoder.key": 4,
        "past_key_values.0.encoder.key": 4, "past_key_values.1.encoder.key": 4,
    }  # fmt: skip


def t5gemma() -> Any:
    sizes = dict(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=64, sliding_window=4,
    )  # fmt: skip
    layers = {"layer_types": ["sliding_attention"]}
    config = T5GemmaConfig(encoder=sizes | layers, decoder=sizes | layers, vocab_size=99, decoder_start_token_id=2, pad_token_id=0)
    return live(T5GemmaForConditionalGeneration, config, scale=4.0)


def longt5() -> Any:
    sizes = dict(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=1, num_heads=4, relative_attention_num_buckets=8,
        relative_attention_max_distance=12, decoder_start_token_id=0, encoder_attention_type="local", local_radius=4,
    )  # fmt: skip
    return live(LongT5ForConditionalGeneration, LongT5Config(**sizes))


def fsmt() -> Any:
    sizes = dict(
        src_vocab_size=99, tgt_vocab_size=99, langs=["en", "de"], d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        decoder_start_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return live(FSMTForConditionalGeneration, FSMTConfig(**sizes), scale=4.0)


@pytest.mark.parametrize("family", ["t5gemma", "longt5", "fsmt"])
def test_attention_that_is_written_out_gets_a_past_too(family: str) -> None:
    """Capped scores, grouped key heads and a window of four steps (T5Gemma); relative positions (LongT5); batched products of
    ``[batch * heads, steps, width]`` in layers that keep the steps in front of the batch (FSMT). Against the live model, with padding."""
    model = {"t5gemma": t5gemma, "longt5": longt5, "fsmt": fsmt}[family]()
    target = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(2))
    given = dict(input_ids=IDS, attention_mask=MASK, decoder_input_ids=target, decoder_attention_mask=torch.ones_like(target))
    program = program_for(model)
    whole, got, decoder = in_pieces(program, [3, 4, 5, 8], *(given[n] for n in input_names(program)))
    with torch.no_grad():
        want = model(**given, use_cache=False).logits
    assert torch.equal(whole, want) or torch.allclose(whole, want, atol=1e-6 * float(want.abs().max()))
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max())) and float(want.std()) > 0.1
    shapes = {
        n: tuple(spec.shape[1::2]) for n, (_, spec) in zip(input_names(decoder), placeholders(decoder), strict=True) if n.startswith("past")
    }
    assert len(shapes) == 4 and set(shapes.values()) == {({"t5gemma": 2, "longt5": 4, "fsmt": 4}[family], 8)}


def test_a_decoder_that_moves_values_between_tokens_has_no_past() -> None:
    """ProphetNet of transformers 5 reads relative positions in another order of heads and tokens than it made them, so that a row depends on later tokens; its own
    cache does not work either."""
    sizes = dict(
        vocab_size=99, hidden_size=32, encoder_ffn_dim=48, num_encoder_layers=1, num_encoder_attention_heads=4, decoder_ffn_dim=48,
        num_decoder_layers=1, num_decoder_attention_heads=4, max_position_embeddings=32, ngram=2, num_buckets=8, relative_max_distance=12,
    )  # fmt: skip
    model = live(ProphetNetForConditionalGeneration, ProphetNetConfig(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    target = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        long, short = (model(input_ids=IDS, decoder_input_ids=target[:, :n], use_cache=False).logits[:, :3] for n in (6, 3))
    assert float((long - short).abs().max()) > 1e-2, "it became causal: then it should have a cache"
    with pytest.raises(onnx_cut.NotCut, match="values of one token in the places of others"):
        cached_pair(program_for(model))


def test_what_has_no_decoder_or_writes_its_attention_out_is_told_so() -> None:
    with pytest.raises(onnx_cut.NotCut, match="not an encoder and a decoder"):
        cached_pair(zoo_program("bert")[0])
    program, _ = zoo_program("bart")
    for graph in (m for m in program.graph.modules() if isinstance(m, torch.fx.GraphModule)):
        for node in list(graph.graph.nodes):
            if "attention_op" in str(node.target) or "scaled_dot_product" in str(node.target):
                with graph.graph.inserting_before(node):
                    scores = graph.graph.call_function(torch.ops.aten.matmul.default, node.args[1:3])
                scores.meta.update(node.meta)
                node.replace_all_uses_with(scores)
                graph.graph.erase_node(node)
    with pytest.raises(onnx_cut.NotCut, match="no attention of the decoder to itself"):
        cached_pair(program)


def test_what_is_written_into_a_value_that_is_read_stays() -> None:
    """LED puts its windows together in a tensor of zeros: the writes have no readers of their own."""
    from torch import fx

    from surgery.backends.onnx_decoder import _bury
    from surgery.backends.onnx_inline import _out_of_place

    aten, graph = torch.ops.aten, fx.Graph()
    x = graph.placeholder("x")
    read, unread = (graph.call_function(aten.zeros_like.default, (x,)) for _ in range(2))
    for base in (read, unread):
        part = graph.call_function(aten.slice.Tensor, (base, 0, 0, 1))
        graph.call_function(aten.copy_.default, (part, graph.call_function(aten.slice.Tensor, (x, 0, 1, 2))))
    graph.output(graph.call_function(aten.neg.default, (read,)))
    _out_of_place(graph)
    _bury(graph)
    assert [str(n.target) for n in graph.nodes].count("aten.copy_.default") == 1 and unread not in graph.nodes
    given = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(fx.Interpreter(fx.GraphModule({}, graph)).run(given), torch.tensor([-2.0, 0.0, 0.0]))
