"""Stored tensors that are read where they are asked for: the same elements, the same merges, the same faults."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from surgery.core.diagnostics import SurgeryError
from surgery.model import pieces
from surgery.model.checkpoint_shards import find_weights, read_tensors
from surgery.model.pieces import Pieces, arguments, flat, held_by, takes_pieces, whole
from surgery.model.realise import realise
from surgery.model.weights import Apply, Load, Scale
from surgery.passes import registry
from surgery.passes.kinds import merge_math

SHAPE = (37, 41)
METHODS: dict[str, dict[str, Any]] = {
    "linear": {}, "slerp": {"t": 0.3}, "nuslerp": {"along": "column"}, "model_stock": {"rows": True}, "task_arithmetic": {"scale": 0.7},
    "dare": {"density": 0.4, "rescale": "l1"}, "dare_ties": {"density": 0.5, "rescale": "l1"},
    "darex_q": {"density": 0.2}, "della": {"density": 0.5, "epsilon": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], dict[str, Load]]:
    folder = tmp_path_factory.mktemp("stored")
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(SHAPE, generator=generator).to(torch.bfloat16) for n in ("base", "one", "two")}
    values["odd"] = torch.tensor([1.0, float("nan"), 3.0])
    save_file(values, folder / "model.safetensors")
    loads = {n: h.load() for n, h in read_tensors(find_weights(folder)).items()}
    assert all(isinstance(e, Load) for e in loads.values())
    return values, loads  # type: ignore[return-value]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1517), st.integers(0, 1600), st.integers(1, 700), st.sampled_from([1 << 18, 64]))
def test_any_range_is_that_of_the_tensor(stored: Any, start: int, stop: int, step: int, at_once: int) -> None:
    values, loads = stored
    before, pieces.AT_ONCE = pieces.AT_ONCE, at_once
    try:
        with Pieces(loads["one"]) as read:
            at = slice(start, stop, step)
            assert torch.equal(flat(read)[at], values["one"].flatten()[at])
            assert torch.equal(flat(read)[start:stop], flat(values["one"])[start:stop])
            assert (read.dim(), read.numel(), read.dtype) == (2, 1517, torch.bfloat16) and torch.equal(whole(read), values["one"])
    finally:
        pieces.AT_ONCE = before


@pytest.mark.parametrize("name", METHODS)
def test_merges_of_stored_tensors_are_those_of_tensors(stored: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, over several chunks; no stored tensor is read as a whole."""
    values, loads = stored
    monkeypatch.setattr(merge_math, "CHUNK", 500)
    function = registry.function(f"merge/{name}:merged")
    names = ("base", "one", "two") if registry.get("merge", name).reads_base else ("one", "two")
    params: dict[str, Any] = {"weights": (1.0, 0.5), "seed": 3, "tensor": "w", "of": names, **METHODS[name]}
    if names[0] != "base":
        params["dtype"] = "bfloat16"
    if name == "model_stock":
        params["weights"] = (1.0, 1.0)
    expr = Apply(SHAPE, "bfloat16", f"merge/{name}:merged", tuple(loads[n] for n in names), tuple(params.items()))
    assert takes_pieces(function) and held_by(expr, registry.function) == sum(loads[n].nbytes for n in names)
    expected = function(*(values[n] for n in names), **params)
    monkeypatch.setattr(pieces, "SMALL", 0)
    monkeypatch.setattr(Pieces, "whole", lambda self: pytest.fail("read as a whole"))
    monkeypatch.setattr("surgery.model.realise.read", lambda load: pytest.fail("read as a whole"))
    assert held_by(expr, registry.function) == 0
    assert torch.equal(realise(expr, functions=registry.function), expected) and not torch.equal(expected, values["one"])


def test_other_expressions_and_functions_get_tensors(stored: Any) -> None:
    _, loads = stored
    scaled = Scale(SHAPE, "bfloat16", loads["one"], 2.0)
    assert held_by(scaled, registry.function) is None and not takes_pieces(registry.function("merge/linear:alone"))
    assert not takes_pieces(registry.function("merge/ties:merged"))  # goes over its tensors several times
    with ExitStack() as files:
        given = arguments([loads["one"], scaled], lambda e: realise(e), files)
        assert all(isinstance(g, torch.Tensor) for g in given)  # the first is too small to be worth it


def test_not_finite_elements_are_found_where_a_method_may_drop_them(stored: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values, loads = stored
    monkeypatch.setattr(pieces, "SMALL", 0)
    params = (("weights", (1.0,)), ("seed", 0), ("tensor", "w"), ("of", ("the model", "two")), ("density", 0.34), ("trim", "tensor"))
    with pytest.raises(SurgeryError, match="S0798: `w` of the model is not finite"):
        realise(Apply((3,), "float32", "merge/ties:merged", (loads["odd"], loads["odd"]), params), functions=registry.function)
    far = torch.tensor([3e38, 1.0, 2.0])
    with pytest.raises(SurgeryError, match="S0798: merging `w` gives values that float32 cannot hold"):
        registry.function("merge/ties:merged")(-far, far, **dict(params))
    assert bool(torch.isfinite(registry.function("merge/ties:merged")(values["odd"][:1] * 3e38, far[:1], **dict(params))).all())


def test_a_file_that_shrinks_or_goes_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(64, 64)}, file)
    load = read_tensors(find_weights(tmp_path))["w"].load()
    assert isinstance(load, Load)
    with Pieces(load) as read:
        assert float(read[0:4].sum()) == 4
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(SurgeryError, match=r"S0721: cannot read `w`.*shorter than when it was opened"):
            read[0:4096]
    file.unlink()
    with pytest.raises(SurgeryError, match="S0721: cannot read `w`"):
        Pieces(load)
