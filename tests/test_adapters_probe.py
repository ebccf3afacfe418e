"""The evidence of folds and sums in large models: single weights on random inputs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery as api
from surgery import compiling
from surgery.core.diagnostics import SurgeryError
from surgery.passes import registry
from surgery.passes.kinds import adapter_claim, delta_probe
from tests import adapters, fixtures
from tests.zoo import ZOO

SUM = "merged = weighted sum, of 6 weights, first, middle and last of each kind"


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a BERT and adapters, in which every model counts as too large to be run for a claim."""
    monkeypatch.chdir(tmp_path)
    for module in (adapter_claim, compiling):
        monkeypatch.setattr(module, "is_small", lambda program: False)
    fixtures.save(ZOO["bert"].make_model(), tmp_path / "bert")
    for name in ("news", "legal", "dora"):
        adapters.example(name, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield tmp_path


HEAD = 'surg 1\nmodel "bert"\n' + "".join(f'adapter {n} = load("{n}")\n' for n in ("news", "legal", "dora"))


def test_weights_stand_for_the_model(large: Path) -> None:
    made = api.compile(HEAD + 'merge linear of news * 0.5\nemit transformers to "out"\n')
    claims: dict[str, Any] = {c["claim"]: c for c in made.certificates}
    assert set(claims) >= {SUM, "folded = unfolded"}
    assert claims["folded = unfolded"]["samples"] == ["6 weights, first, middle and last of each kind"]
    assert all(c["ok"] and c["max_abs_error"] < 1e-5 for c in made.certificates)


def test_a_wrong_fold_is_found(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora: Any = registry.get("adapt", "lora")
    true = lora.fold
    monkeypatch.setattr(lora, "rows", lambda *a: None)
    monkeypatch.setattr(lora, "fold", lambda self, site, t, weight: true(self, site, t, weight) + 0.01)
    with pytest.raises(SurgeryError) as caught:
        api.compile(HEAD + 'merge linear of news\nemit transformers to "out"\n')
    assert [d.code for d in caught.value.diagnostics] == ["S0844"] and not Path("out").exists()


def test_every_reading_method_is_computed_as_it_stands(large: Path) -> None:
    """DoRA reads the weight, and stands on one that another adapter changes: live and folded agree, and differ from the base."""
    text = HEAD + "merge linear of dora\nmerge linear of legal as second\n"
    session = api.compile(text + 'emit transformers to "out"\n')
    (folded,) = [c for c in session.certificates if c["claim"] == "folded = unfolded"]
    assert folded["ok"] and folded["max_abs_error"] < 1e-5


def test_what_is_not_linear_is_run(large: Path) -> None:
    from surgery.model.live import Tensors
    from surgery.opening import open_program

    program, _ = open_program("bert", use_cache=False)
    assert delta_probe.probes(program, []) == []
    probe = delta_probe.Probe("encoder.layer.0.attention.self.query.weight", False, "encoder.layer.0.attention.self.query.bias")
    (out,) = delta_probe.outputs(program, Tensors(registry.function), [probe])
    layer = ZOO["bert"].make_model().encoder.layer[0].attention.self.query
    x = torch.randn(delta_probe.INPUTS, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(out, layer(x).detach())
    made = api.compile('surg 1\nmodel "bert"\nadapt lora(rank = 2) on embed.tokens\nemit transformers to "out"\n')
    assert {c["claim"]: c["samples"] for c in made.certificates}["folded = unfolded"] == ["random", "padded"]
