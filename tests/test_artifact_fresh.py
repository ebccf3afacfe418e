"""Artifacts in a process that has seen nothing but them: what methods attached is found by its tag."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import surgery
import surgery.passes.kinds
from surgery.model import modules
from tests.driver_support import ROOT, checkpoint, write

SCRIPT = """
import json, sys, torch, surgery
model = surgery.load(sys.argv[1]).eval()
with torch.no_grad():
    values = model(input_ids=torch.arange(3, 15).reshape(2, 6))[0].flatten().tolist()
from surgery.model import artifact, modules
from surgery.passes import registry
found = {tag: str(modules.find(tag, artifact.modules_through(registry.get))) for tag in [*json.loads(sys.argv[2]), "surgery.nothing"]}
print(json.dumps([values, found]))
"""


def test_a_fresh_process_opens_what_methods_attached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        "adapt lora(rank = 2) on layers[0].attn.q",
        "insert prefix(length = 2) on layers[1].attn",
        "insert bottleneck(width = 4) after layers[*].ffn",
    ]
    write("a.surg", "\n".join(["surg 1", "", *lines, 'emit torch to "out"', ""]))
    surgery.compile(Path("a.surg"), checkpoint("bert"), out=tmp_path)
    with torch.no_grad():
        values = surgery.load("out").eval()(input_ids=torch.arange(3, 15).reshape(2, 6))[0]
    for file in pkgutil.iter_modules(surgery.passes.kinds.__path__):
        importlib.import_module(f"surgery.passes.kinds.{file.name}")
    tags = {tag: str(cls) for tag, cls in modules._BY_TAG.items() if cls.__module__.startswith("surgery.")}
    command = [sys.executable, "-c", SCRIPT, "out", json.dumps(sorted(tags))]
    ran = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    assert ran.returncode == 0, ran.stderr
    got, found = json.loads(ran.stdout)
    assert found == tags | {"surgery.nothing": "None"} and {"surgery.insert", "surgery.memory", "surgery.shortcut"} <= set(tags)
    assert torch.allclose(torch.tensor(got), values.flatten(), atol=1e-6)
