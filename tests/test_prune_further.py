"""Families with parts of their own, pruned by spec: what goes is counted, and the rest equals the masked original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery

LM: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA2 = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 6, "num_heads": 8, "head_dim": 6, "n_groups": 2, "chunk_size": 4}
DEEPSEEK: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 20, "q_lora_rank": 8,
    "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 0,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    # a head of Mamba-2: 6 rows of the value, 6 of its gate, 1 of the step, 3 parameters; 6 channels of the convolution, norm and output
    "mamba2": ("Mamba2ForCausalLM", {**LM, **MAMBA2}, {
        "prune heads(ratio = 50%) on layers[*].mixer": 2 * 4 * (13 * 24 + 3 + 6 * (4 + 1) + 6 + 6 * 24),
        "skip bypass on layers[0].mixer": 24 + 24 * (13 * 8 + 24) + 3 * 8 + 5 * 72 + 48 + 48 * 24,
    }),
    # stage 0 begins at the stem, stage 1 has two blocks of 1x1, grouped 3x3 and 1x1 convolutions; sums are written in place
    "regnet": ("RegNetModel", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 4, "layer_type": "x"}, {
        "skip bypass on stages[1].layers[1]": 2 * 16 * 16 + 16 * 4 * 9 + 3 * 32,
        "prune channels(keep = 2) on stages[0].layers[0].conv[0]": 4 * 8 + 2 * 4 + 8 * 2 * 9,  # the same two of each group
    }),
}  # fmt: skip


@pytest.mark.parametrize("family", CASES)
def test_what_goes_is_counted_and_equal(family: str, here: Path) -> None:
    architecture, config, statements = CASES[family]
    Path("model.json").write_text(json.dumps({"model_type": family, "architectures": [architecture], **config}), "utf-8")
    for statement, removed in statements.items():
        result = surgery.compile(f"surg 1\n\n{statement}\n", "config:model.json")
        totals = result.plan.totals
        assert totals is not None and totals.params_before - totals.params_after == removed
        claims = [c for c in result.certificates if c["claim"].startswith("removed = ")]
        assert len(claims) == 1 and claims[0]["ok"] and claims[0]["max_abs_error"] <= 1e-5


def test_a_plain_checkpoint_of_latent_attention_and_shared_experts(here: Path) -> None:
    """The config says the width of the rotated part of keys, and that of a shared expert only together with the others'."""
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], **LM, **DEEPSEEK}
    Path("model.json").write_text(json.dumps({**config, "num_hidden_layers": 2, "first_k_dense_replace": 1}), "utf-8")
    spec = 'prune heads(ratio = 50%) on layers[*].attn\nprune ffn(ratio = 50%) on layers[1].ffn[*]\nprune experts(keep = 6) on layers[1].ffn[0]\nemit transformers to "plain"\n'
    result = surgery.compile(f"surg 1\n\n{spec}", "config:model.json")
    assert [c["claim"] for c in result.certificates if c["ok"]][-1] == "from_pretrained = program"
    written = json.loads(Path("plain/config.json").read_text("utf-8"))
    assert [written[n] for n in ("num_attention_heads", "intermediate_size", "moe_intermediate_size", "qk_rope_head_dim")] == [2, 20, 8, 4]
    # two groups of four experts, whose router looks at the best two of each group: every group loses one, with 3 x 24 x 8 weights and its row
    assert written["n_routed_experts"] == 6 and sum(s.removed for s in result.plan.steps[2].sites) == 2 * (3 * 24 * 8 + 24)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.relu(self.first(x)))


class Masked(nn.Module):
    """Padded positions set to zero by a mask over every value, as wav2vec 2.0 does, and noise that is drawn in evaluation, as ViT-MAE does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x[~mask.unsqueeze(-1).repeat(1, 1, x.shape[2])] = 0
        for layer in self.layers:
            x = layer(x)
        return self.head(x) + torch.rand_like(mask.to(x.dtype)).unsqueeze(-1)


def test_a_mask_over_values_and_noise_in_evaluation() -> None:
    torch.manual_seed(0)
    model, x, mask = Masked(), torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    result = surgery.compile("surg 1\n\nprune width(keep = 6) on layers[*]\n", model, inputs=(x, mask))
    assert all(c["ok"] for c in result.certificates)
    after = result.module.eval()
    kept = [int((model.stem.weight == row).all(1).nonzero()) for row in after.stem.weight]
    assert len(set(kept)) == 6
    with torch.no_grad():
        torch.manual_seed(1)
        got = after(x, mask)
        torch.manual_seed(1)
        want = model.stem(x)[..., kept] * mask.unsqueeze(-1)
        for block in model.layers:
            hidden = torch.relu(want @ block.first.weight[:, kept].T + block.first.bias)
            want = want + hidden @ block.second.weight[kept].T + block.second.bias[kept]
        want = want @ model.head.weight[:, kept].T + model.head.bias + torch.rand(2, 5).unsqueeze(-1)
    assert (got - want).abs().max() <= 1e-5
