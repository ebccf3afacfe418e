"""Families with parts of their own, pruned by spec: what goes is counted, and the rest equals the masked original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import surgery

LM: dict[str, Any] = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
MAMBA2 = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 6, "num_heads": 8, "head_dim": 6, "n_groups": 2, "chunk_size": 4}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    # a head of Mamba-2: 6 rows of the value, 6 of its gate, 1 of the step, 3 parameters; 6 channels of the convolution, norm and output
    "mamba2": ("Mamba2ForCausalLM", {**LM, **MAMBA2}, {
        "prune heads(ratio = 50%) on layers[*].mixer": 2 * 4 * (13 * 24 + 3 + 6 * (4 + 1) + 6 + 6 * 24),
        "skip bypass on layers[0].mixer": 24 + 24 * (13 * 8 + 24) + 3 * 8 + 5 * 72 + 48 + 48 * 24,
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
