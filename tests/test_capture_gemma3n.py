"""Gemma 3n: layers hand keys and values on through a dictionary, some keep only the largest activations, coefficients are clipped in training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

import surgery as api
from surgery.model.capture import materialise, pipeline
from surgery.model.capture.errors import Fallback
from surgery.opening import open_program
from surgery.passes.kinds.drop_config import drop_layers
from tests.caching import capture_cache
from tests.capture_support import assert_bitwise, flat_inputs, flat_outputs
from tests.zoo import Entry, causal

GEMMA3N = Entry(
    "gemma3n_text", "Gemma3nForCausalLM",
    dict(
        vocab_size=99, vocab_size_per_layer_input=99, hidden_size=32, hidden_size_per_layer_input=8, intermediate_size=[64] * 6,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=8,
        laurel_rank=4, altup_num_inputs=3, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3,
        activation_sparsity_pattern=[0.9, 0.9, 0.0, 0.0, 0.0, 0.0], pad_token_id=0,
    ),
    causal(4, 2, 8),
)  # fmt: skip
"""The last two layers read the keys and values of the two before and keep none."""


@pytest.mark.parametrize("stamped", [True, False])
def test_equal_to_live_model(stamped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = pipeline.trace

    def forced(model, call, *, stubs):  # type: ignore[no-untyped-def]
        if stubs and not stamped:
            raise Fallback("forced")
        return trace(model, call, stubs=stubs)

    monkeypatch.setattr(pipeline, "trace", forced)
    capture = pipeline.capture_config(GEMMA3N.plain_config, GEMMA3N.architecture)
    assert capture.fallback == ("" if stamped else "forced")
    assert any("AltUp" in note for note in capture.notes)
    model = GEMMA3N.make_model()
    with torch.no_grad():
        model.model.layers[0].altup.prediction_coefs.weight[0, 0] = 200.0  # type: ignore[union-attr,index]  # beyond the bound of training
    graph = materialise(capture, model.state_dict())
    for batch, length in ((3, 17), (1, 9)):
        inputs = GEMMA3N.inputs(batch, length)
        flat = flat_inputs(capture, inputs)
        with torch.no_grad():
            assert_bitwise(graph(*flat), flat_outputs(capture, model(**inputs)))


def test_widths_by_layer_are_written_as_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tiny.json").write_text(
        json.dumps({**GEMMA3N.plain_config, "num_kv_shared_layers": 0, "architectures": [GEMMA3N.architecture]}), encoding="utf-8"
    )
    text = 'surg 1\nprune ffn(keep = 40) on layers[1].ffn[1]\nprune ffn(keep = 48) on layers[4].ffn[1]\nemit transformers to "out"\n'
    result = api.compile(text, "config:tiny.json")
    widths = [64, 40, 64, 64, 48, 64]
    assert json.loads(Path("out/config.json").read_text())["intermediate_size"] == widths
    loaded = transformers.Gemma3nForCausalLM.from_pretrained("out", dtype=torch.float32)
    assert [layer.mlp.gate_proj.out_features for layer in loaded.model.layers] == widths
    assert next(c for c in result.certificates if c["claim"] == "from_pretrained = program")["ok"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gemma3n")
    GEMMA3N.make_model().save_pretrained(folder / "base")  # type: ignore[operator]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", str(capture_cache(tmp_path_factory)))
        yield folder / "base"


def test_layers_that_borrow_keys_and_values(base: Path) -> None:
    """They have queries and an output of their own, say whose keys and values they read, and stand in one stack with all others."""
    program, _ = open_program(str(base))
    anatomy = program.anatomy
    assert [(s.name, s.layers) for s in anatomy.stacks] == [("layers", 6)]
    parts = {s.role: s for s in anatomy.sites}
    for i in range(6):
        own = {r.rpartition(".")[2] for r in parts if r.startswith(f"layers[{i}].attn.")}
        assert own == ({"q", "o", "q_norm"} if i > 3 else {"q", "k", "v", "o", "q_norm", "k_norm"})
        assert parts[f"layers[{i}].attn"].facts.get("kv_of") == (f"layers[{i - 2}].attn" if i > 3 else None)
        assert (parts[f"layers[{i}].attn"].heads, parts[f"layers[{i}].attn"].kv_heads) == (4, 2)
    assert program.signature.in_spec["items"][list(program.signature.parameters).index("past_key_values")]["layers"] == 4
    assert not any(".norm" in u.path or "_norm" in u.path for u in anatomy.unresolved)


@pytest.mark.parametrize(
    ("statement", "claim"),
    [
        ("prune heads(ratio = 50%) on layers[4].attn", "removed = masked"),  # its lender keeps its own query heads
        ("prune kv_groups(ratio = 50%) on layers[2, 4].attn", "removed = masked"),
        ("skip bypass on layers[4]", "removed = bypassed"),
        ("skip bypass on layers[0, 2].attn", "removed = bypassed"),  # what the rest of the layer changes in place stays
    ],
)
def test_what_is_removed_is_what_is_masked(base: Path, tmp_path: Path, statement: str, claim: str) -> None:
    result = api.compile(f'surg 1\n{statement}\nemit torch to "out"\n', str(base), out=tmp_path)
    assert next(c for c in result.certificates if c["claim"] == claim)["ok"]


@pytest.mark.parametrize(
    ("statement", "code", "said"),
    [
        ("prune kv_groups(ratio = 50%) on layers[4].attn", "S0445", "`layers[4].attn` has the same kv groups as `layers[2].attn`"),
        ("skip bypass on layers[2]", "S0477", "layers[4] needs something else that it computes"),
        ("adapt lora(rank = 2) on layers[*].attn.k", "S0302", "`k` does not exist in `layers[4..5].attn`"),
    ],
)
def test_what_is_lent_is_not_taken(base: Path, statement: str, code: str, said: str) -> None:
    found = api.plan(f"surg 1\n{statement}\n", str(base)).diagnostics
    assert [d.code for d in found] == [code] and said in found[0].message


def test_a_dropped_borrower_is_counted_in_the_config(base: Path) -> None:
    program, _ = open_program(str(base))
    drop_layers(program, {"layers": (6, {0, 5})})
    assert (program.info.config["num_hidden_layers"], program.info.config["num_kv_shared_layers"]) == (4, 1)
