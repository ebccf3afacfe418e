"""Adapters folded into checkpoints of half precision: the numbers are those of float32, rounded once."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import surgery as api
from tests import adapters, fixtures
from tests.zoo import ZOO


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fold_rounds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.chdir(tmp_path)
    fixtures.save(ZOO["bert"].make_model().to(dtype), tmp_path / "bert")
    adapters.example("news", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = api.compile('surg 1\nmodel "bert"\nadapter news = load("news")\nmerge linear of news\nemit transformers to "out"\n')
    (folded,) = [c for c in made.certificates if c["claim"] == "folded = unfolded"]
    assert folded["ok"] and folded["max_abs_error"] < 1e-5  # far below what rounding the weights does to the outputs
    before, after, low = (load_file(Path(n)) for n in ("bert/model.safetensors", "out/model.safetensors", "news/adapter_model.safetensors"))
    changed = 0
    for name, value in after.items():
        at = adapters.PREFIX + name.removesuffix(".weight")
        want = before[name].float()
        if f"{at}.lora_A.weight" in low:
            want += 2.0 * (low[f"{at}.lora_B.weight"] @ low[f"{at}.lora_A.weight"])
            changed += 1
        away = (value.float() - want).abs()
        assert value.dtype == dtype and bool((away <= 0.5001 * torch.finfo(dtype).eps * want.abs() + 1e-7).all()), name
    assert changed == 6
