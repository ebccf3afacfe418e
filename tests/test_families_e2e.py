"""The whole path on every family: a checkpoint, a spec, a plan, a module that trains, a second spec that folds, an ONNX file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import surgery
from surgery import driver
from tests.caching import capture_cache
from tests.families import CASES, ONNX, trained_like
from tests.zoo import ZOO

SIZES = ((3, 17), (1, 6))
"""(batch, length) of the inputs: neither is what was traced; the first has padding."""


EXPORT = 'surg 1\n\nemit onnx(optimize = none) to "model.onnx"\n'
"""Unfused, so that every tensor has its own name; fused graphs have tests of their own."""


class Run:
    """What the tests of one family share: each step is made on first use."""

    def __init__(self, family: str, folder: Path) -> None:
        self.case, self.entry, self.folder = CASES[family], ZOO[family], folder
        self.live = trained_like(self.entry)
        self.live.save_pretrained(folder / "base")  # type: ignore[operator]
        self.own = {n for n, _ in self.live.named_parameters(remove_duplicate=False)}
        self.declared = self.case.added + sum(
            p.numel()
            for n, p in self.live.named_parameters()
            if self.case.biases and n.startswith(self.case.biases) and n.endswith(".bias")
        )

    @property
    def text(self) -> str:
        checks = "expect same_output(at = init)\nexpect runs(batch = 2, length = 9)\n"
        return f'surg 1\n\n{self.case.statements()}\n\n{checks}\nemit torch to "adapted"\n'

    @cached_property
    def plan(self) -> surgery.Plan:
        return surgery.plan(self.text, str(self.folder / "base"))

    @cached_property
    def adapted(self) -> Path:
        surgery.compile(self.text, str(self.folder / "base"), out=self.folder)
        return self.folder / "adapted"

    @cached_property
    def trained(self) -> Path:
        """The adapted module as training would leave it: every trainable parameter moved."""
        module = surgery.load(self.adapted)
        generator = torch.Generator().manual_seed(11)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        return surgery.save(module, self.folder / "trained")

    @cached_property
    def folded(self) -> Path:
        text = 'surg 1\n\nfold all on **\n\nexpect same_output(at = fold)\n\nemit torch to "folded"\n'
        surgery.compile(text, str(self.trained), out=self.folder)
        return self.folder / "folded"

    @cached_property
    def exported(self) -> surgery.Result:
        return surgery.compile(EXPORT, str(self.folded), out=self.folder)

    def call(self, module: nn.Module, batch: int, length: int) -> Any:
        with torch.no_grad():
            return module(**self.entry.inputs(batch, length))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SURGERY_CACHE", str(capture_cache(tmp_path_factory)))
        yield _Runs(tmp_path_factory)


class _Runs(dict[str, Run]):
    def __init__(self, folders: pytest.TempPathFactory) -> None:
        super().__init__()
        self.folders = folders

    def __missing__(self, family: str) -> Run:
        self[family] = Run(family, self.folders.mktemp(family))
        return self[family]


def floats(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point()]


def difference(left: Any, right: Any) -> float:
    """The largest difference of any output, in units of that output's size (at least one)."""
    worst = 0.0
    for a, b in zip(floats(left), floats(right), strict=True):
        assert a.shape == b.shape
        if a.numel():
            worst = max(worst, float((a - b).abs().max()) / max(1.0, float(a.abs().max())))
    return worst


@pytest.mark.parametrize("family", CASES)
def test_the_plan_counts_what_the_config_says(runs: dict[str, Run], family: str) -> None:
    run = runs[family]
    plan, total = run.plan, sum(p.numel() for p in run.live.parameters())
    assert plan.ok, plan.diagnostics
    assert [sum(s.added for s in step.sites) for step in plan.steps][: len(run.case.lines)] == [count for _, count in run.case.lines]
    assert plan.totals is not None
    assert plan.totals.params_before == total
    assert plan.totals.params_after == total + run.case.added
    assert plan.totals.trainable == run.declared


@pytest.mark.parametrize("family", CASES)
def test_every_parameter_has_a_place(runs: dict[str, Run], family: str) -> None:
    run = runs[family]
    shown = json.loads(json.dumps(driver.show(str(run.folder / "base")).as_json()))
    places = {s["path"] for s in shown["sites"] if s["op"] != "region"}
    reasons = {u["path"]: u["why"] for u in shown["unresolved"]}
    names: dict[int, list[str]] = {}
    for name, parameter in run.live.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    lost = [tied for tied in names.values() if not any(n.rpartition(".")[0] in places or n in places or n in reasons for n in tied)]
    assert not lost and all(reasons.values())
    roles = [s["role"] for s in shown["sites"]]
    assert len(set(roles)) == len(roles)


@pytest.mark.parametrize("family", CASES)
def test_the_emitted_module_is_the_live_model_at_init(runs: dict[str, Run], family: str) -> None:
    run = runs[family]
    module = surgery.load(run.adapted)
    for batch, length in SIZES:
        want, got = run.call(run.live, batch, length), run.call(module, batch, length)
        assert type(want) is type(got) and list(want) == list(got)
        assert difference(want, got) <= 1e-5
    assert sum(p.numel() for n, p in module.named_parameters() if n not in run.own) == run.case.added
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == run.declared


@pytest.mark.parametrize("family", CASES)
def test_training_reaches_what_was_declared_and_nothing_else(runs: dict[str, Run], family: str) -> None:
    run = runs[family]
    module = surgery.load(run.trained)
    outputs = [t for t in floats(module(**run.entry.inputs(3, 17))) if t.requires_grad]
    generator = torch.Generator().manual_seed(5)
    loss: Any = sum((t * torch.randn(t.shape, generator=generator)).sum() for t in outputs)
    loss.backward()
    reached = {n for n, p in module.named_parameters() if p.grad is not None and bool(p.grad.abs().sum() > 0)}
    assert reached == {n for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("family", CASES)
def test_a_second_spec_folds_what_was_trained(runs: dict[str, Run], family: str) -> None:
    run = runs[family]
    trained, folded = surgery.load(run.trained), surgery.load(run.folded)
    for batch, length in SIZES:
        want, got = run.call(trained, batch, length), run.call(folded, batch, length)
        assert type(want) is type(got)
        assert difference(want, got) <= 1e-5
        assert difference(run.call(run.live, batch, length), got) > 1e-3  # training moved it
    left = {type(m).__name__ for m in folded.modules()}
    assert "DeltaModule" not in left


@pytest.mark.parametrize("family", ONNX)
def test_the_onnx_file_computes_the_same_under_the_same_names(runs: dict[str, Run], family: str) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    run = runs[family]
    claims = [c for c in run.exported.certificates if c["claim"] == "torch = onnx"]
    assert claims and all(c["ok"] for c in claims)
    files = [p for p in run.exported.artifacts if p.suffix == ".onnx"]
    module = surgery.load(run.folded)
    state = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    stored = {i.name: i for p in files for i in onnx.load(p).graph.initializer}
    for name in set(state) & set(stored):
        assert torch.equal(state[name].detach(), torch.from_numpy(onnx.numpy_helper.to_array(stored[name]).copy()))
    dead = {n for n, p in module.named_parameters() if not any(t in stored for t in _tied(module, p))}
    assert all("masked_spec" in n or "pos_conv" in n or "logit" in n for n in dead), dead  # what no operation of the call reads

    inputs = run.entry.inputs(*SIZES[0])
    feeds = {k: v.numpy() for k, v in inputs.items() if isinstance(v, Tensor)}
    cache = inputs.get("past_key_values")
    for i, layer in enumerate(cache.layers if cache is not None else ()):
        feeds |= {f"past_key_values.{i}.key": layer.keys.numpy(), f"past_key_values.{i}.value": layer.values.numpy()}
    got: dict[str, Any] = {}
    for path in files:  # an encoder is run before its decoder, which reads what it gave
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        batch = len(next(iter(feeds.values())))
        for own in (i for i in session.get_inputs() if ".decoder." in i.name):  # nothing was decoded yet
            feeds[own.name] = np.zeros([batch, own.shape[1], 0, own.shape[3]], np.float32)
        out = dict(zip(names, session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()}), strict=True))
        if path.name.endswith(".encoder.onnx"):
            feeds |= {"encoder_hidden_states": out["last_hidden_state"], "encoder_attention_mask": feeds.get("attention_mask")}
            feeds |= {n.replace("present", "past_key_values"): v for n, v in out.items() if n.startswith("present.")}
            out = {"encoder_last_hidden_state": out["last_hidden_state"]}
        got |= out
    want = run.call(module, *SIZES[0])
    for key in want:
        if isinstance(want[key], Tensor):
            assert difference(want[key], torch.from_numpy(got[key])) <= 1e-4
    for i, layer in enumerate(want["past_key_values"].layers if cache is not None else ()):
        assert difference(layer.keys, torch.from_numpy(got[f"present.{i}.key"])) <= 1e-4
        assert difference(layer.values, torch.from_numpy(got[f"present.{i}.value"])) <= 1e-4


def _tied(module: nn.Module, parameter: nn.Parameter) -> list[str]:
    return [n for n, p in module.named_parameters(remove_duplicate=False) if p is parameter]


def test_onnx_bytes_are_the_same_every_time_and_large_weights_stand_apart(runs: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from surgery.backends import onnx_files

    run = runs["vit"]
    first = run.exported.artifacts[0]
    surgery.compile(EXPORT, str(run.folded), out=run.folder / "again")
    assert (run.folder / "again" / "model.onnx").read_bytes() == first.read_bytes()

    monkeypatch.setattr(onnx_files, "INLINE_LIMIT", 4096)
    surgery.compile(EXPORT, str(run.folded), out=run.folder / "apart")
    path = run.folder / "apart" / "model.onnx"
    assert len(list(path.parent.glob("model.onnx.*.data"))) == 1
    assert path.stat().st_size < first.stat().st_size
    onnx.checker.check_model(str(path))
    feeds = {k: v.numpy() for k, v in run.entry.inputs(2, 9).items()}
    a, b = (runtime.InferenceSession(str(p), providers=["CPUExecutionProvider"]).run(None, feeds) for p in (first, path))
    assert all((x == y).all() for x, y in zip(a, b, strict=True))


class Bessel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.project(x))


def test_an_operation_that_onnx_does_not_have_is_named(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(surgery.SurgeryError) as caught:
        surgery.compile(EXPORT, Bessel(), inputs={"x": torch.randn(3, 4)}, out=tmp_path)
    (found,) = caught.value.diagnostics
    assert found.code == "S0841" and "bessel_j0" in found.message
    assert not list(tmp_path.iterdir())
