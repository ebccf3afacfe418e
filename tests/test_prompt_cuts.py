"""Cuts of models with virtual tokens in front: what only the prompt pass computes fixes no size of the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest

import surgery
from tests.caching import capture_cache
from tests.zoo import ZOO


def test_width_goes_with_the_prompt(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2 looks positions up, also those of the prompt: embeddings that end in the pass."""
    monkeypatch.setenv("SURGERY_CACHE", str(capture_cache(tmp_path_factory)))
    ZOO["gpt2"].make_model().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    cut = "prune width(ratio = 25%)\n"
    result = surgery.compile(f"surg 1\ninsert prompt(length = 3, std = 1) on embed.tokens\n{cut}", str(tmp_path / "base"))
    claims = {c["claim"]: c for c in result.certificates}
    assert claims["removed = masked"]["ok"] and claims["removed = masked"]["max_abs_error"] <= 1e-5
    assert result.plan.steps[1].sites[0].removed > 0
    alone = surgery.plan(f"surg 1\n{cut}", str(tmp_path / "base"))
    assert sum(s.removed for s in alone.steps[0].sites) == sum(s.removed for s in result.plan.steps[1].sites) - 3 * 8
