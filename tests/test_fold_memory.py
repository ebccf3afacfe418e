"""Prefixes and prompts: against the live model that is given the same keys, values and embeddings, and folded against unfolded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.folding import fold_all, kept
from surgery.model.live import Tensors
from surgery.model.program import Origin, Program
from surgery.model.runtime import build_module
from surgery.passes import registry
from surgery.passes.kinds.insert import Stream
from surgery.passes.kinds.insert_memory import KEYS, MASK, VALUES, Core, MemoryModule
from tests.captured_programs import live_model, zoo_program
from tests.workbench import difference, operation, outputs, perturb, run

LENGTH = 4


def attached(what: str, family: str = "llama", **params: Any) -> tuple[Program, list[Tensor]]:
    program, flat = zoo_program(family)
    blocks = [s.role for s in program.anatomy.sites if s.is_region and "causal" in s.facts]
    roles = blocks if what == "prefix" else ["embed.tokens"]
    run(program, operation(program, "insert", what, roles, length=LENGTH, **params))
    perturb(program, 0.5)
    return program, flat


def folded(program: Program) -> Program:
    copy = program.copy()
    changes = fold_all(copy, Origin(verb="emit", method="fold"))
    assert all(c.removed and c.added and "folded" in c.note for c in changes)
    return copy


def values(program: Program, name: str) -> Tensor:
    return Tensors(registry.function).of(program, name)


def calls(length: int, past: int, pad: str = "") -> dict[str, Tensor]:
    """Ids and a mask over the past and the new tokens, padded on a side in the second row."""
    g = torch.Generator().manual_seed(length)
    mask = torch.ones(2, past + length, dtype=torch.long)
    if pad == "left":
        mask[1, :2] = 0
    elif pad == "right":
        mask[1, -2:] = 0
    return {"input_ids": torch.randint(3, 90, (2, length), generator=g), "attention_mask": mask}


def module(program: Program) -> Any:
    return build_module(program, Tensors(registry.function).all(program))


# ------------------------------------------------------------------ prefix


def test_the_worked_prefix() -> None:
    method = registry.get("insert", "prefix")(length=1, reparametrise=False)
    memory = MemoryModule(method, Core(1, 2, 2), stored=False)
    with torch.no_grad():
        memory.keys.copy_(torch.tensor([[[2.0, 0.0]]]))  # type: ignore[operator]
        memory.values.copy_(torch.tensor([[[0.0, 4.0]]]))  # type: ignore[operator]
    q, k, v = torch.tensor([[[[1.0, 0.0]]]]), torch.eye(2).view(1, 1, 2, 2), torch.tensor([[[[1.0, 1.0], [2.0, 0.0]]]])
    got = F.scaled_dot_product_attention(q, memory(k, KEYS, k), memory(v, VALUES, k), scale=1.0)
    torch.testing.assert_close(got.flatten(), torch.tensor([0.424790, 2.905692]), atol=1e-6, rtol=0)
    closed = torch.tensor([[[[True, False]]]])
    assert memory(closed, MASK, k).tolist() == [[[[True, True, False]]]]
    assert memory(torch.zeros(1, 1, 1, 1) - 9, MASK, k).tolist() == [[[[0.0, -9.0, -9.0]]]]
    memory.active = False
    assert memory(k, KEYS, k) is k


def test_published_counts() -> None:
    prefix, bart = registry.get("insert", "prefix"), Core(16, 64, 64, 1, 1024)
    assert 36 * prefix(length=200, reparametrise=False).count(bart) == 14_745_600
    scaled = 24 * registry.get("insert", "bottleneck")(width=512).count(Stream("beside", 1024, 1024))
    assert 36 * prefix(length=30, reparametrise=False).count(bart) + scaled == 27_414_528
    grown = prefix(length=20, width=800).count(bart)
    assert grown == 20 * 1024 + (1024 * 800 + 800) + (800 * 2048 + 2048)
    prompt = registry.get("insert", "prompt")
    assert prompt(length=100).count(768) == 76_800 and prompt(length=100).count(4096) == 409_600


def test_a_prefix_is_a_cache_that_moves_no_position() -> None:
    """The live model, whose cache starts with the same keys and values and whose positions are given."""
    from transformers.cache_utils import DynamicCache

    program, _ = attached("prefix", width=6)
    tables = folded(program)
    own = live_model("llama")
    for pad in ("", "left", "right"):
        given = calls(7, 0, pad)
        pairs = []
        for a in tables.attachments:
            k, v = (values(tables, f"{a.module}.{n}") for n in ("keys", "values"))
            pairs.append((k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)))
        mask = torch.cat([torch.ones(2, LENGTH, dtype=torch.long), given["attention_mask"]], 1)
        places = torch.arange(7).expand(2, -1)
        with torch.no_grad():
            want = own(given["input_ids"], attention_mask=mask, position_ids=places, past_key_values=DynamicCache(pairs)).logits
            got = [module(p)(**given).logits for p in (program, tables)]
        seen = given["attention_mask"].bool()
        for one in got:
            assert difference([one[seen]], [want[seen]]) <= 1e-5


def test_a_prefix_of_an_encoder_and_a_decoder_and_between_them() -> None:
    program, flat = attached("prefix", "bart", width=6)
    shared = [a.site.role for a in program.attachments if any(t in program.aliases for t in a.tensors)]
    assert len(program.attachments) == 9 and len(shared) == 6  # one table for each sort of attention
    expected = outputs(program, *flat)
    assert difference(expected, outputs(zoo_program("bart")[0], *flat)) > 1e-2
    assert difference(outputs(folded(program), *flat), expected) <= 1e-6


# ------------------------------------------------------------------ prompt


@pytest.fixture(scope="module")
def prompted() -> tuple[Program, Program]:
    program, _ = attached("prompt")
    return program, folded(program)


@pytest.mark.parametrize("pad", ["", "left", "right"])
def test_a_prompt_is_embeddings_in_front(prompted: tuple[Program, Program], pad: str) -> None:
    given = calls(7, 0, pad)
    own = live_model("llama")
    rows = values(prompted[0], "prompt.embeddings").expand(2, -1, -1)
    mask = torch.cat([torch.ones(2, LENGTH, dtype=torch.long), given["attention_mask"]], 1)
    with torch.no_grad():
        whole = torch.cat([rows, own.get_input_embeddings()(given["input_ids"])], 1)  # type: ignore[operator]
        want = own(inputs_embeds=whole, attention_mask=mask).logits[:, LENGTH:]
        got = [module(p)(**given) for p in prompted]
    seen = given["attention_mask"].bool()
    for one in got:
        assert one.logits.shape == (2, 7, 99) and one.past_key_values.get_seq_length() == 7
        assert difference([one.logits[seen]], [want[seen]]) <= 1e-5


def test_steps_with_a_cache_are_one_run(prompted: tuple[Program, Program]) -> None:
    given = calls(8, 0, "left")
    for program in prompted:
        run_ = module(program)
        with torch.no_grad():
            want = run_(**given).logits[:, 5:]
            first = run_(given["input_ids"][:, :5], attention_mask=given["attention_mask"][:, :5])
            rest = []
            cache = first.past_key_values
            for i in (5, 6, 7):
                step = run_(given["input_ids"][:, i : i + 1], attention_mask=given["attention_mask"][:, : i + 1], past_key_values=cache)
                rest.append(step.logits)
                cache = step.past_key_values
        assert difference([torch.cat(rest, 1)], [want]) <= 1e-5


def test_generates_what_the_live_model_generates(prompted: tuple[Program, Program]) -> None:
    given = calls(5, 0)
    own = live_model("llama")
    more: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    rows = values(prompted[0], "prompt.embeddings").expand(2, -1, -1)
    with torch.no_grad():
        whole = torch.cat([rows, own.get_input_embeddings()(given["input_ids"])], 1)  # type: ignore[operator]
        want = own.generate(inputs_embeds=whole, attention_mask=torch.ones(2, LENGTH + 5, dtype=torch.long), **more)  # type: ignore[operator]
        for program in prompted:
            assert torch.equal(module(program).generate(**given, **more)[:, 5:], want[:, -5:])


def test_the_prompt_pass_is_gone(prompted: tuple[Program, Program]) -> None:
    program, stored = prompted
    layers = [sum(n.op == "call_module" and str(n.target).startswith("model.layers.") for n in p.graph.graph.nodes) for p in prompted]
    assert layers == [6, 3]
    tables = {n: e.shape for n, e in stored.weights.items() if n.startswith("prompt.")}
    assert tables == {f"prompt.table_{i}": (2, LENGTH, 8) for i in range(6)}
    assert "prompt.embeddings" not in stored.weights and "prompt.embeddings" in program.weights
    assert {s.role for s in program.anatomy.sites} == {s.role for s in zoo_program("llama")[0].anatomy.sites}


def test_gradients_reach_a_prompt_through_every_layer(prompted: tuple[Program, Program]) -> None:
    given = calls(6, 0)
    run_ = module(prompted[0]).train()
    run_(**given).logits.square().mean().backward()
    grad = run_.prompt.embeddings.grad
    assert grad.shape == (LENGTH, 32) and (grad.abs().sum(1) > 0).all()
    assert [n for n, p in run_.named_parameters() if p.requires_grad] == ["prompt.embeddings"]


def test_prompt_and_other_adapters_fold_together() -> None:
    program, flat = zoo_program("llama")
    run(program, operation(program, "adapt", "lora", ["layers[0].attn.q", "layers[2].ffn.up"], rank=2))
    run(program, operation(program, "insert", "prompt", ["embed.tokens"], length=3))
    run(program, operation(program, "insert", "prefix", ["layers[1].attn"], length=2, width=5))
    run(program, operation(program, "adapt", "lora", ["layers[1].attn.v"], rank=2, label="later"))
    perturb(program, 0.3)
    expected = outputs(program, *flat)
    stored = program.copy()
    fold_all(stored, Origin(verb="emit", method="fold"))
    assert [a.name for a in stored.attachments] == ["prompt", "prefix"]
    assert difference(outputs(stored, *flat), expected) <= 1e-5


def test_words_start_as_rows_of_the_vocabulary() -> None:
    program, _ = zoo_program("llama")
    run(program, operation(program, "insert", "prompt", ["embed.tokens"], length=5, init="words"))
    rows, table = values(program, "prompt.embeddings"), values(program, "model.embed_tokens.weight")
    assert all(any(torch.equal(row, word) for word in table) for row in rows) and len({tuple(r.tolist()) for r in rows}) == 5


@pytest.mark.parametrize(("what", "verb"), [("prompt", "kv_groups"), ("prefix", "heads")])
def test_a_cut_goes_through_and_folding_is_as_exact_behind_it(what: str, verb: str) -> None:
    program, flat = attached(what, **({"width": 6} if what == "prefix" else {}))
    before = outputs(program, *flat)
    run(program, operation(program, "prune", verb, ["layers[1].attn"], "on", ratio=0.5, score="random"))
    holders = program.graph.graph.find_nodes(op="placeholder")
    flat = [x if x.dim() != 4 else x[:, : int(h.meta["spec"].shape[1])] for x, h in zip(flat, holders, strict=True)]
    expected = outputs(program, *flat)
    assert difference(expected[:1], before[:1]) > 1e-3
    fold_all(program, Origin(verb="emit", method="fold"), frozenset())
    assert difference(outputs(program, *flat), expected) <= 1e-5


# ------------------------------------------------------------------ what stays live


def test_names_that_stay_live_keep_what_depends_on_them() -> None:
    program, flat = zoo_program("llama")
    run(program, operation(program, "adapt", "lora", ["layers[0].attn.q", "layers[1].attn.q"], rank=2))
    run(program, operation(program, "adapt", "dora", ["layers[0].attn.q"], rank=2, label="read"))
    run(program, operation(program, "adapt", "lora", ["layers[0].attn.v"], rank=2, label="other"))
    perturb(program, 0.3)
    expected = outputs(program, *flat)
    copy = program.copy()
    notes = [c.note for c in fold_all(copy, Origin(verb="emit", method="fold"), frozenset({"read"}))]
    q = "model.layers.0.self_attn.q_proj"
    assert [a.module for a in copy.attachments] == [f"{q}.lora", f"{q}.read"]
    assert sum("folded" in n for n in notes) == 2 and any("reads its weight" in n for n in notes)
    assert difference(outputs(copy, *flat), expected) <= 1e-5
    assert set(kept(program, frozenset({f"{q}.lora"}))) == {f"{q}.lora"}
    assert len(kept(program, frozenset({"model.layers.0"}))) == 3
