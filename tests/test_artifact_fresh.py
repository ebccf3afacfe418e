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


def test_what_loads_may_differ_by_the_rounding_of_large_values_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs in the hundreds behind a prefix: an artifact with them is emitted again; one that computes something else is not."""
    from surgery.backends import to_torch
    from surgery.core.diagnostics import SurgeryError

    monkeypatch.chdir(tmp_path)
    text = (
        "surg 1\n\ninsert prefix(length = 3) on layers[*].attn\ninsert bottleneck(width = 4) beside layers[*].ffn\nunfreeze all on head\n"
    )
    module = surgery.compile(text, checkpoint("llama")).module
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * (100.0 if "head" in name else 0.5))
    surgery.save(module, "large")
    found = surgery.compile('surg 1\n\nemit torch to "again"\n', "large", out=tmp_path).certificates
    (entry,) = [c for c in found if c["claim"] == "loaded = program"]
    assert entry["ok"] and entry["tolerance"] > 1e-4 and entry["max_abs_error"] <= entry["tolerance"]
    loaded = to_torch.artifact.load

    def moved(*args: object, **kwargs: object) -> torch.nn.Module:
        other = loaded(*args, **kwargs)  # type: ignore[arg-type]
        with torch.no_grad():
            other.get_parameter("model.layers.0.mlp.up_proj.weight")[0].add_(0.1)
        return other

    monkeypatch.setattr(to_torch.artifact, "load", moved)
    with pytest.raises(SurgeryError) as caught:
        surgery.compile('surg 1\n\nemit torch to "wrong"\n', "large", out=tmp_path)
    assert caught.value.diagnostics[0].code == "S0836" and not (tmp_path / "wrong").exists()


def test_a_weight_beyond_half_precision_is_not_written_as_infinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file, save_file

    from tests.driver_support import surgery as run

    monkeypatch.chdir(tmp_path)
    file = Path(checkpoint("bert")) / "model.safetensors"
    name = "encoder.layer.1.output.dense.weight"
    tensors = load_file(file)
    tensors[name][3, 4] = 7e4
    save_file(tensors, file, metadata={"format": "pt"})
    for backend in ("torch", "transformers"):
        for dtype, codes in (("fp16", ["S0874"]), ("bf16", [])):
            write("a.surg", f'surg 1\n\nemit {backend}(dtype = {dtype}) to "out-{backend}-{dtype}"\n')
            ran = run("compile", "a.surg", "bert")
            assert ran.codes == codes and Path(f"out-{backend}-{dtype}").exists() == (not codes)
            assert not codes or (f"`{name}` overflows in fp16: it holds 70000" in ran.err and "a.surg:3:1" in ran.err)


def test_a_weight_file_that_was_damaged_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and headers fit; the hash, which the lock needs anyway, does not."""
    from tests.driver_support import surgery as run

    monkeypatch.chdir(tmp_path)
    surgery.compile('surg 1\n\nadapt lora(rank = 2) on layers[0].attn.q\nemit torch to "out"\n', checkpoint("bert"), out=tmp_path)
    file = Path("out/model.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    write("a.surg", 'surg 1\n\nfold all\nemit torch to "next"\n')
    assert run("compile", "a.surg", "out").code == 0
    file.write_bytes(data)
    ran = run("compile", "a.surg", "out", "--force")
    assert ran.codes == ["S0822"] and "model.safetensors in out is not the file that surgery wrote" in ran.err
    file.unlink()
    file.write_bytes(bytes(data[: len(data) // 2]) + bytes([data[len(data) // 2] ^ 0x40]) + bytes(data[len(data) // 2 + 1 :]))
    assert run("compile", "a.surg", "out", "--force").code == 0
