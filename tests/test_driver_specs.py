"""Every spec of `specs/` compiles as it stands, agrees with its lock, and the first one's plan reads as documented."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.caching import capture_cache
from tests.driver_support import ROOT, Ran, surgery

SPECS = sorted(p.name for p in (ROOT / "specs").glob("*.surg"))
SECOND = {"fold_and_export.surg": "quickstart.surg"}
"""Specs that run on the output of another."""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Ran, Path]]:
    """All specs compiled in order of need, in a folder where only `specs` is what it is in the repository."""
    home = tmp_path_factory.mktemp("specs")
    (home / "specs").symlink_to(ROOT / "specs")
    kept = {k: os.environ.get(k) for k in ("SURGERY_CACHE", "NO_COLOR")}
    os.environ.update(SURGERY_CACHE=str(capture_cache(tmp_path_factory)), NO_COLOR="1")
    old = Path.cwd()
    os.chdir(home)
    done: dict[str, tuple[Ran, Path]] = {}
    try:
        for name in sorted(SPECS, key=lambda n: n in SECOND):
            ran = surgery("compile", f"specs/{name}", "--locked", "--format", "json")
            done[name] = (ran, home)
    finally:
        os.chdir(old)
        for key, value in kept.items():
            if value is None:
                os.environ.pop(key)
            else:
                os.environ[key] = value
    return done


@pytest.mark.parametrize("name", SPECS)
def test_compiles_as_locked(compiled: dict[str, tuple[Ran, Path]], name: str) -> None:
    ran, home = compiled[name]
    assert ran.code == 0, ran.out
    document = ran.json
    plan: dict[str, Any] = document["plan"]
    assert plan["diagnostics"] == [] and all(e["ok"] for e in plan["expect"]) and plan["expect"]
    assert document["certificates"] and all(c["ok"] for c in document["certificates"])
    emits = [s for s in plan["steps"] if s["verb"] == "emit"]
    assert emits and all((home / s["params"]["to"]).exists() for s in emits)
    assert {str(Path(a)) for a in document["artifacts"]} >= {s["params"]["to"] for s in emits}


@pytest.mark.parametrize("name", SPECS)
def test_what_was_emitted_opens(compiled: dict[str, tuple[Ran, Path]], name: str) -> None:
    import torch

    import surgery as api

    ran, home = compiled[name]
    plan = ran.json["plan"]
    for step in plan["steps"]:
        if (step["verb"], step["method"]) == ("emit", "torch"):
            module = api.load(home / step["params"]["to"])
            named = dict(module.named_parameters())
            assert sum(p.numel() for p in named.values()) == plan["totals"]["params_after"]
            assert sum(p.numel() for p in named.values() if p.requires_grad) == plan["totals"]["trainable"]
            stored = json.loads((home / step["params"]["to"] / "surgery.json").read_text("utf-8"))
            assert stored["trainable"] == sorted(n for n, p in named.items() if p.requires_grad)
            assert all(torch.isfinite(p).all() for p in named.values())


QUICKSTART = """\
plan of specs/quickstart.surg on minilm (bert, 22,713,216 parameters, 86.6 MiB)

   8  adapt lora(rank = r, alpha = 16, dropout = 5%) on layers[*].attn.{q, v}
      12 sites: layers[0..5].attn.q, layers[0..5].attn.v (384 x 384)
      + 73,728 parameters, 73,728 train
      output at init: unchanged; folds: merge

  13  emit torch to "build/minilm-lora"

  14  emit onnx to "build/minilm-lora.onnx"

  15  emit report to "build/minilm-lora.html"

  ok      expect trainable <= 0.5%
          73,728 = 36,864 (encoder.layer.*.attention.self.query.lora) + 36,864
          (encoder.layer.*.attention.self.value.lora)
          0.3236% of 22,786,944 params, limit 0.5% = 113,934.7
  later   expect same_output(at = init) within 1e-06
          measured by compile

                       before       after
  parameters       22,713,216  22,786,944  +0.325%
  trainable        22,713,216      73,728  0.324% of the model after
  bytes              86.6 MiB    86.9 MiB  +0.325%
  flops per token      22.4 M      22.6 M  +0.658%, at length 128
"""


def test_the_plan_of_the_quickstart(here: Path) -> None:
    (here / "specs").symlink_to(ROOT / "specs")
    ran = surgery("plan", "specs/quickstart.surg")
    assert ran.code == 0
    assert ran.out == QUICKSTART
