"""Families whose code a trace cannot follow as it stands: experts that run one by one, scans, sizes in tensors, windows, codebooks.

Each is opened once from a checkpoint. An adapter that changes nothing makes the captured module the live model, at lengths that were not
traced and with padding; heads, hidden units and experts that are removed equal the masked original.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import surgery
from surgery.model.capture import capture_module, materialise
from surgery.model.recurrence import recurrence, running_maximum
from tests.caching import capture_cache
from tests.zoo import Entry, Inputs, _ids, _mask, causal, seq2seq, text

LM: dict[str, Any] = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SWITCH = dict(
    vocab_size=99, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=4, relative_attention_num_buckets=8,
    decoder_start_token_id=0, num_experts=4, expert_capacity=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
)  # fmt: skip
DEBERTA = dict(
    vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=64,
    relative_attention=True, pos_att_type=["c2p", "p2c"], position_biased_input=False, type_vocab_size=0,
)  # fmt: skip
JETMOE = dict(
    LM, hidden_size=16, num_hidden_layers=1, num_key_value_heads=2, kv_channels=8, intermediate_size=16, num_local_experts=4,
    num_experts_per_tok=2, max_position_embeddings=64,
)  # fmt: skip
DBRX = dict(
    LM, d_model=16, n_heads=4, n_layers=1, max_seq_len=64, attn_config={"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
    ffn_config={"hidden_size": 16, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
)  # fmt: skip
MUSICGEN = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, ffn_dim=24, num_codebooks=2, max_position_embeddings=64,
    pad_token_id=63, bos_token_id=63,
)  # fmt: skip
FALCON = dict(
    LM, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, multi_query=True, parallel_attn=True, alibi=False,
    new_decoder_architecture=False, bias=False,
)  # fmt: skip
XLM = dict(vocab_size=99, emb_dim=16, n_layers=1, n_heads=4, max_position_embeddings=64)
LONGFORMER = dict(
    vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, max_position_embeddings=64,
    attention_window=[4], pad_token_id=1,
)  # fmt: skip


def plain(batch: int, length: int) -> Inputs:
    return {**text(batch, length), "use_cache": False}


def rows(batch: int, length: int) -> Inputs:
    return {"input_ids": _ids(batch, length), "use_cache": False}


def codebooks(batch: int, length: int) -> Inputs:
    return {"input_ids": _ids(2 * batch, length) % 60, "attention_mask": _mask(batch, length), "use_cache": False}


@dataclass(frozen=True)
class Case:
    """``removed`` statements that must equal the masked original; ``lora`` the sites of an adapter; ``tolerance`` of equality with the live
    model: a few roundings, since vector units take other ends of tensors that lie elsewhere in memory, more where rows of experts are multiplied in another
    grouping."""

    entry: Entry
    lora: str
    removed: tuple[str, ...]
    tolerance: float = 1e-6


CASES = {
    case.entry.family: case
    for case in (
        Case(
            Entry("switch_transformers", "SwitchTransformersForConditionalGeneration", SWITCH, seq2seq),
            "encoder.layers[0].ffn.experts.up, decoder.layers[0].{attn, cross}.{q, v}",
            ("prune heads(ratio = 25%) on encoder.layers[0].attn, decoder.layers[0].{attn, cross}", "prune ffn(ratio = 25%) on encoder.layers[0], decoder.layers[0]",
             "prune experts(keep = 3) on encoder.layers[0].ffn"), 1e-5,
        ),
        Case(
            Entry("deberta", "DebertaModel", DEBERTA, text), "layers[*].attn.{q, v}",
            ("prune heads(ratio = 25%) on layers[*].attn", "prune width(ratio = 25%)"),
        ),
        Case(
            Entry("jetmoe", "JetMoeForCausalLM", JETMOE, causal(1, 2, 8)), "layers[*].attn.{k, v}, layers[*].ffn.experts.up",
            ("prune kv_groups(ratio = 50%) on layers[*].attn", "prune ffn(ratio = 25%) on layers[*].ffn", "prune experts(keep = 3) on layers[*].ffn"), 1e-5,
        ),
        Case(
            Entry("dbrx", "DbrxForCausalLM", DBRX, causal(1, 2, 4)), "layers[*].attn.{q, v}, layers[*].ffn.{router, experts.{up, gate, down}}",
            ("prune kv_groups(ratio = 50%) on layers[*].attn", "prune ffn(ratio = 25%) on layers[*].ffn", "prune experts(ratio = 50%) on layers[*].ffn"), 1e-5,
        ),
        Case(
            Entry("mamba", "MambaForCausalLM", dict(LM, hidden_size=16, num_hidden_layers=1, state_size=4), plain), "layers[*].mixer.{in, out}",
            ("prune width(ratio = 25%)",),
        ),
        Case(
            Entry("musicgen_decoder", "MusicgenForCausalLM", MUSICGEN, codebooks), "layers[*].attn.{q, v}",
            ("prune heads(ratio = 25%) on layers[*].attn", "prune ffn(ratio = 25%) on layers[*].ffn"),
        ),
        Case(
            Entry("falcon", "FalconForCausalLM", FALCON, causal(1, 1, 4)), "layers[*].attn.{q, k, v}",
            ("prune heads(ratio = 25%) on layers[*].attn", "prune ffn(ratio = 25%) on layers[*].ffn", "prune width(ratio = 25%)"),
        ),
        Case(
            Entry("xlm", "XLMModel", XLM, text), "attentions.layers[*].attn.{q, v}",
            ("prune heads(ratio = 25%) on attentions.layers[*].attn", "prune ffn(ratio = 25%) on ffns.layers[*].ffn", "prune width(ratio = 25%)"),
        ),
        Case(
            Entry("longformer", "LongformerModel", LONGFORMER, text), "layers[*].attn.{q, v}",
            ("prune heads(ratio = 50%) on layers[*].attn", "prune width(ratio = 25%)"), 1e-6,
        ),
        Case(
            Entry("rwkv", "RwkvForCausalLM", dict(LM, hidden_size=16, num_hidden_layers=2, intermediate_size=24), rows), "layers[*].mixer.in[0]",
            ("prune ffn(ratio = 25%) on layers[*].ffn", "prune width(ratio = 25%)"),
        ),
    )
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", str(capture_cache(tmp_path_factory)))
        yield


@pytest.mark.parametrize("family", CASES)
def test_captured_is_live_and_removed_is_masked(family: str, tmp_path: Path) -> None:
    case = CASES[family]
    live = case.entry.make_model()
    live.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    module = surgery.compile(f"surg 1\nadapt lora(rank = 2) on {case.lora}\n", str(tmp_path / "base")).module.eval()
    for batch, length in ((3, 17), (1, 9), (2, 8), (2, 31)):
        inputs, same = case.entry.inputs(batch, length), case.entry.inputs(batch, length)
        with torch.no_grad():
            want, got = live(**inputs), module(**same)
        assert type(want) is type(got)
        for name, tensor in want.items():
            if isinstance(tensor, torch.Tensor):
                assert got[name].shape == tensor.shape and float((got[name] - tensor).abs().max()) <= case.tolerance, name
    result = surgery.compile("surg 1\n" + "\n".join(case.removed) + "\n", str(tmp_path / "base"))
    claims = [c for c in result.certificates if c["claim"] == "removed = masked"]
    assert len(claims) == len(case.removed) and all(c["ok"] and c["max_abs_error"] <= 1e-5 for c in claims)


CONVBERT = dict(
    vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, max_position_embeddings=64,
    embedding_size=16, head_ratio=2, conv_kernel_size=3,
)  # fmt: skip
LLAMA4 = dict(
    LM, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=4, intermediate_size=16,
    intermediate_size_mlp=16, num_local_experts=2, num_experts_per_tok=1,
)  # fmt: skip


DIFFLLAMA = dict(LM, hidden_size=32, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=4, head_dim=4, intermediate_size=16)
BERT = dict(vocab_size=99, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, max_position_embeddings=64)
VIT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=24, image_size=16, patch_size=4)


@pytest.mark.parametrize(
    ("family", "architecture", "config"),
    [
        ("convbert", "ConvBertModel", CONVBERT), ("llama4_text", "Llama4ForCausalLM", LLAMA4), ("bert-generation", "BertGenerationEncoder", BERT),
        ("dinov3_vit", "DINOv3ViTModel", VIT), ("diffllama", "DiffLlamaForCausalLM", DIFFLLAMA), ("ibert", "IBertModel", BERT),
    ],
)  # fmt: skip
def test_heads_of_further_families(family: str, architecture: str, config: dict[str, Any], here: Path) -> None:
    """Heads of a convolution stand beside those of attention in ConvBERT; Llama 4 turns queries and keys as complex numbers; an encoder of a
    family of decoders takes a cache that it does not give back; DINOv3 makes a grid of positions."""
    Path("model.json").write_text(json.dumps({"model_type": family, "architectures": [architecture], **config}), "utf-8")
    result = surgery.compile("surg 1\nprune heads(ratio = 50%) on layers[*].attn\n", "config:model.json")
    (claim,) = [c for c in result.certificates if c["claim"] == "removed = masked"]
    assert claim["ok"] and claim["max_abs_error"] <= 1e-5
    assert all(site.removed > 0 for site in result.plan.steps[0].sites)


def test_experts_are_one_tensor_here_and_apart_in_a_checkpoint(tmp_path: Path) -> None:
    """Switch Transformers stores its experts one by one: they are pruned together and written as the class has them."""
    case = CASES["switch_transformers"]
    case.entry.make_model().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    text = 'surg 1\nprune experts(keep = 3) on {encoder, decoder}.layers[0].ffn\nemit transformers to "plain"\n'
    result = surgery.compile(text, str(tmp_path / "base"), out=tmp_path)
    names = {n: tuple(p.shape) for n, p in result.module.named_parameters() if ".experts." in n and n.startswith("encoder")}
    assert names == {f"encoder.block.0.layer.1.mlp.experts.{n}.weight": s for n, s in (("wi", (3, 24, 16)), ("wo", (3, 16, 24)))}
    assert next(c for c in result.certificates if c["claim"] == "from_pretrained = program")["ok"]
    loaded = transformers.SwitchTransformersForConditionalGeneration.from_pretrained(tmp_path / "plain")
    own = loaded.encoder.block[0].layer[1].mlp.experts
    whole = dict(result.module.named_parameters())["encoder.block.0.layer.1.mlp.experts.wi.weight"]
    assert loaded.config.num_experts == 3 and len(own) == 3
    assert all(torch.equal(own[f"expert_{e}"].wi.weight, whole[e]) for e in range(3))


def test_a_recurrence_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    decay, given = (torch.rand(2, 3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    state, wanted = torch.zeros(2, 3, 4, dtype=torch.float64), []
    for at in range(5):
        state = decay[:, :, at] * state + given[:, :, at]
        wanted.append(state)
    assert torch.equal(recurrence(decay, given, 2), torch.stack(wanted, 2))
    assert torch.autograd.gradcheck(lambda a, b: recurrence(a, b, 2), (decay, given))


def test_a_running_maximum_and_its_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    added, given = (torch.randn(2, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2))
    best, wanted = torch.full((2, 4), -torch.inf, dtype=torch.float64), []
    for at in range(5):
        best = torch.maximum(best + added[:, at], given[:, at])
        wanted.append(best)
    assert torch.equal(running_maximum(added, given, 1), torch.stack(wanted, 1))
    assert torch.autograd.gradcheck(lambda a, b: running_maximum(a, b, 1), (added, given))


class Windows(nn.Module):
    """Each position reads the window around it, as in Longformer and LED: the sequence is filled up to whole blocks, cut by overlapping
    strides, and cut back by a number that a tensor held."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, block = self.head(x), 4
        fill = (block - x.shape[1] % block) % block
        if fill > 0:
            x = nn.functional.pad(x, (0, 0, 0, fill))
        blocks = torch.div(x.shape[1], block, rounding_mode="trunc")
        around = nn.functional.pad(x, (0, 0, block, block))
        batch, step, width = around.stride()
        windows = around.as_strided((x.shape[0], blocks, 3 * block, 4), (batch, block * step, step, width))
        out = (x.view(x.shape[0], blocks, block, 4) @ windows.transpose(2, 3)).softmax(-1) @ windows
        out = out.reshape(x.shape[0], -1, 4)
        return out[:, :-fill] if fill > 0 else out


def test_windows_of_any_length() -> None:
    """Also where the sequence is whole blocks, for which the traced branch takes nothing away."""
    model = Windows().eval()
    graph = materialise(capture_module(model, {"x": torch.randn(2, 10, 4)}), model.state_dict())
    for batch, length in ((3, 17), (1, 6), (2, 8)):
        x = torch.randn(batch, length, 4, generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            (got,), want = graph(x), model(x)
        assert got.shape == want.shape and torch.allclose(got, want, atol=1e-6)


class Asks(nn.Module):
    """Shortens its work when nothing is padded, or when no mask says two."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least = least
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if (mask >= self.least).all().item():
            return self.head(x)
        return self.head(x * mask.unsqueeze(-1))


@pytest.mark.parametrize(("least", "answered"), [(0, True), (2, True), (1, False)])
def test_a_question_about_masks_is_answered_where_it_has_one_answer(least: int, answered: bool) -> None:
    inputs = {"x": torch.randn(2, 5, 4), "mask": torch.ones(2, 5, dtype=torch.long)}
    if not answered:
        with pytest.raises(surgery.SurgeryError) as caught:
            capture_module(Asks(least), inputs)
        assert caught.value.diagnostics[0].code == "S0502"
        return
    captured = capture_module(Asks(least), inputs)
    assert len(captured.notes) == 1 and ("yes" if least == 0 else "no") in captured.notes[0]
    assert any("mul" in str(n.target) for n in captured.graph.graph.nodes) == (least == 2)


class Marks(nn.Module):
    """Marks some positions of a copy of its mask before it asks about it, and asks about what shares memory with that copy."""

    def __init__(self, alias: bool) -> None:
        super().__init__()
        self.alias = alias
        self.head = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        own = mask.clone()
        part = own[:, 1:]
        own[mask == 2] = -1
        if ((part if self.alias else own) < 0).any().item():
            return x
        return self.head(x)


def test_a_question_about_what_was_written_to() -> None:
    """The write is computed, too; what shares its memory is not followed any more."""
    inputs = {"x": torch.randn(2, 5, 4), "mask": torch.ones(2, 5, dtype=torch.long)}
    captured = capture_module(Marks(False), inputs)
    assert len(captured.notes) == 1 and "no" in captured.notes[0]
    with pytest.raises(surgery.SurgeryError) as caught:
        capture_module(Marks(True), inputs)
    assert caught.value.diagnostics[0].code == "S0502"


class Scan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decay, self.given = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = torch.ops.surgery.recurrence(self.decay(x).sigmoid(), self.given(x), 1)
        return states + torch.ops.surgery.running_maximum(self.decay(x), states, 1)


def test_a_recurrence_of_any_length_in_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    result = surgery.compile('surg 1\nemit onnx to "m.onnx"\n', Scan(), inputs={"x": torch.randn(2, 5, 3)}, out=tmp_path)
    claims = [c for c in result.certificates if c["claim"] == "torch = onnx"]
    assert len({c["length"] for c in claims}) > 1 and all(c["ok"] for c in claims)
