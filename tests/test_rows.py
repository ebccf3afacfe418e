"""Matrices some rows at a time: the numbers of expressions that are computed whole."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import surgery as api
from surgery.folding import Widening
from surgery.model.byrows import rows_of
from surgery.model.checkpoint_headers import read_header
from surgery.model.pieces import in_pieces
from surgery.model.realise import realise
from surgery.model.weights import Add, Apply, Cast, Expr, Load, MatMul, Scale, Select
from surgery.passes import registry
from surgery.passes.kinds import adapter_claim, lowrank
from surgery.passes.kinds.geometry import Geometry
from tests import adapters, fixtures
from tests.zoo import ZOO

SITE = Geometry("linear", 48, 20, 48)


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, Load]:
    g = torch.Generator().manual_seed(3)
    tensors = {"W": torch.randn(48, 20, generator=g).bfloat16(), "A": torch.randn(4, 20, generator=g), "B": torch.randn(48, 4, generator=g)}
    path = tmp_path / "some.safetensors"
    save_file(tensors, path)
    found = read_header(path).tensors
    return {n: Load(tuple(t.shape), str(t.dtype).removeprefix("torch."), str(path), n, found[n].span) for n, t in tensors.items()}


def parts(stored: dict[str, Load]) -> dict[str, Expr]:
    wide = Cast((48, 20), "float32", stored["W"])
    params = (("rank", 4), ("alpha", 8.0), ("site", SITE.pairs()))
    alone = Apply((48, 20), "float32", "merge/linear:alone", (stored["A"], stored["B"]), (("part", ("low", 1.5)), ("site", SITE.pairs())))
    return {
        "stored": stored["W"],
        "wide": wide,
        "folded": Apply((48, 20), "float32", "adapt/lora:fold", (wide, stored["A"], stored["B"]), params),
        "summed": Add((48, 20), "float32", (wide, Scale((48, 20), "float32", alone, 0.3))),
    }


@pytest.mark.parametrize("what", ["stored", "wide", "folded", "summed"])
def test_rows_are_those_of_the_whole(what: str, stored: dict[str, Load]) -> None:
    expr = parts(stored)[what]
    whole = realise(expr, functions=registry.function)
    with ExitStack() as files:
        rows = rows_of(expr, realise, registry.function, files)
        assert rows is not None
        found = torch.cat([rows(start, stop).clone() for start, stop in ((0, 16), (16, 32), (32, 48))])
    # a library may add up a product of fewer rows in another order
    allowed = 0.0 if what in ("stored", "wide") else 1e-6
    assert found.dtype == whole.dtype and float((found.double() - whole.double()).abs().max()) <= allowed


def test_what_has_no_rows_of_its_own_is_computed_whole(stored: dict[str, Load]) -> None:
    wide = parts(stored)["wide"]
    onto = Apply(
        (48, 20),
        "float32",
        "adapt/lora:fold",
        (wide, wide, stored["A"], stored["B"]),
        (("rank", 4), ("base", True), ("site", SITE.pairs())),
    )
    turned = Apply(
        (48, 20), "float32", "adapt/lora:fold", (wide, stored["A"], stored["B"]),
        (("rank", 4), ("site", Geometry("linear", 20, 48, 20, transposed=True).pairs())),
    )  # fmt: skip
    product = MatMul((48, 20), "float32", stored["B"], stored["A"])
    with ExitStack() as files:
        for expr in (
            onto,
            turned,
            product,
            Select((20, 20), "float32", wide, 0, ((0, 20),)),
            Scale((48, 20), "bfloat16", stored["W"], 2.0),
        ):
            assert rows_of(expr, realise, registry.function, files) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_is_folded_from_its_file_with_the_same_bits(dtype: torch.dtype, transposed: bool, tmp_path: Path) -> None:
    """Large enough to be read block by block; of a transposed one all rows are needed at once."""
    g = torch.Generator().manual_seed(5)
    site = Geometry("linear", 400, 200, 400, transposed=transposed)
    made = {"W": torch.randn((200, 400) if transposed else (400, 200), generator=g).to(dtype), "A": torch.randn(4, 200, generator=g)}
    made["B"] = torch.randn(400, 4, generator=g)
    save_file(made, tmp_path / "w.safetensors")
    found = read_header(tmp_path / "w.safetensors").tensors
    name = str(dtype).removeprefix("torch.")
    loads = [
        Load(tuple(t.shape), str(t.dtype).removeprefix("torch."), str(tmp_path / "w.safetensors"), n, found[n].span)
        for n, t in made.items()
    ]
    assert in_pieces(loads[0])
    params = {"rank": 4, "alpha": 6.0, "site": site.pairs()}
    expr = Apply(loads[0].shape, name, "adapt/lora:fold", tuple(loads), tuple(params.items()))
    expected = registry.function("adapt/lora:fold")(*made.values(), **params).to(dtype)
    assert torch.equal(realise(expr, functions=registry.function), expected) and not torch.equal(expected, made["W"])


def test_a_product_that_adds_has_the_bits_of_a_product_and_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(4)
    weight, t = torch.randn(48, 20, generator=g), {"A": torch.randn(4, 20, generator=g), "B": torch.randn(48, 4, generator=g)}
    with torch.no_grad():
        for alpha in (8.0, 4.0, 1.0, 10.0):
            lora = registry.get("adapt", "lora")(rank=4, alpha=alpha)
            expected = weight + (t["B"] @ t["A"]).mul(alpha / 4)
            assert torch.equal(lora.fold_into(SITE, t, weight.clone()), expected)  # type: ignore[attr-defined]
            monkeypatch.setattr(lowrank, "adds_last", lambda *sizes: False)
            assert torch.equal(lora.fold_into(SITE, t, weight.clone()), expected)  # type: ignore[attr-defined]
            monkeypatch.undo()


def test_a_sum_that_no_single_weight_can_tell_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program before the merge shares its graph with the one after it until the whole model has to be run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapter_claim, "probes", lambda program, chosen: None)
    monkeypatch.setattr(adapter_claim, "is_small", lambda program: False)
    fixtures.save(ZOO["bert"].make_model(), tmp_path / "bert")
    adapters.example("news", tmp_path)
    made = api.compile('surg 1\nmodel "bert"\nadapter news = load("news")\nmerge linear of news * 0.5\nemit transformers to "out"\n')
    (claim,) = [c for c in made.certificates if c["claim"] == "merged = weighted sum"]
    assert claim["ok"] and claim["max_abs_error"] < 1e-5 and claim["samples"] == ["random", "padded"]


def test_a_half_tensor_of_nobody_is_not_widened(stored: dict[str, Load]) -> None:
    class Held:
        def __init__(self, **weights: Expr) -> None:
            self.weights = weights

    wide = Cast((48, 20), "float32", stored["W"])
    change = Widening(Held(w=stored["W"]), Held(w=wide))  # type: ignore[arg-type]
    params = (("rank", 4), ("alpha", 8.0), ("site", SITE.pairs()))
    folded = change(Apply((48, 20), "bfloat16", "adapt/lora:fold", (stored["W"], stored["A"], stored["B"]), params))
    assert folded == Apply((48, 20), "float32", "adapt/lora:fold", (wide, stored["A"], stored["B"]), params)
    with pytest.raises(LookupError):
        change(Scale((48, 20), "bfloat16", Load((48, 20), "bfloat16", "elsewhere", "W", (0, 1920)), 2.0))
