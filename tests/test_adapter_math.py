"""Worked examples of merging adapters, without a model; names of tensors in adapter files; what a program remembers of a cut."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from surgery.core.diagnostics import SurgeryError
from surgery.model import past
from surgery.model.adapter_keys import PREFIX, key_of
from surgery.model.weights import Apply, Init, select
from surgery.passes import registry
from surgery.passes.kinds import adapter_math
from surgery.passes.kinds.geometry import Geometry

A1, B1, S1 = torch.tensor([[1.0, 0], [0, 2]]), torch.eye(2), 2.0
A2, B2, S2 = torch.tensor([[1.0, 0.5], [0, 1]]), torch.tensor([[1.0, 0], [0.5, 1]]), 1.0
TENSORS = (A1, B1, A2, B2)
SITE = Geometry("linear", 2, 2, 2)
LOW = (("low", S1), ("low", S2))


def merge(name: str, function: str, *tensors: torch.Tensor, **params: object) -> list[torch.Tensor]:
    return list(registry.function(f"merge/{name}:{function}")(*tensors, **params))


def close(a: torch.Tensor, want: list[list[float]], within: float = 1e-4) -> bool:
    return bool((a - torch.tensor(want)).abs().max() <= within)


def test_the_sum_and_its_best_factors() -> None:
    whole = merge("svd", "change", *TENSORS, parts=LOW, weights=(0.5, 0.5), size=2, site=SITE.pairs(), number=0)
    assert close(whole[1] @ whole[0], [[1.5, 0.25], [0.25, 2.625]])
    a, b, share = merge("svd", "change", *TENSORS, parts=LOW, weights=(0.5, 0.5), size=1, site=SITE.pairs(), number=0)
    assert close(b @ a, [[0.1154, 0.5438], [0.5438, 2.5626]])
    assert share.tolist() == pytest.approx([2.6781**2, 2.6781**2 + 1.4469**2], rel=1e-4)
    # all singular values in B, or their roots in both
    assert float(a.norm()) == pytest.approx(1)
    a, b, _ = merge("svd", "change", *TENSORS, parts=LOW, weights=(0.5, 0.5), size=1, site=SITE.pairs(), number=0, even=True)
    assert float(a.norm()) == pytest.approx(float(b.norm())) == pytest.approx(math.sqrt(2.6781), rel=1e-4)
    a, b, _ = merge("svd", "change", *TENSORS, parts=LOW, weights=(0.5, 0.5), size=1, site=SITE.pairs(), number=0, clamp=0.5)
    limit = float(np.quantile(torch.cat([b.flatten(), a.flatten()]).numpy(), 1.0))
    assert float(a.max()) == float(b.max()) == limit


def test_thin_factors_are_those_of_the_formed_change() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(3, 20, generator=g), torch.randn(30, 3, generator=g)
    u, s, vt = adapter_math.thin(a, b)
    assert torch.allclose(u @ s.diag() @ vt, b @ a, atol=1e-5)
    assert torch.allclose(s, torch.linalg.svdvals(b @ a)[:3], atol=1e-4)


def test_factor_by_factor_has_products_between_adapters() -> None:
    a, b = merge("linear", "each", *TENSORS, scales=(0.5 * S1, 0.5 * S2), number=0)
    assert close(b @ a, [[2.9142, 0.6036], [0.6036, 4.7463]])
    a, b = merge("linear", "each", A1, B1, scales=(-2.0,), number=0)
    assert close(b @ a, (-2 * B1 @ A1).tolist())


def test_ties_on_changes_and_on_factors() -> None:
    t1, t2 = torch.tensor([[3.0, -1], [0.5, 0.2]]), torch.tensor([[-1.0, -2], [0.6, 0.1]])
    parts, eye = (("low", 1.0), ("low", 1.0)), torch.eye(2)
    more = {"parts": parts, "weights": (1.0, 0.5), "size": 2, "site": SITE.pairs(), "number": 0, "density": 0.5, "trim": "tensor"}
    a, b, _ = merge("ties", "change", t1, eye, t2, eye, **more)
    # merged by count: what common adapter tools compute; -1 of the first and half of -2 of the second agree
    assert close(b @ a, [[3, -1], [0, 0]])
    a, b, _ = merge("ties", "change", t1, eye, t2, eye, **more, elect="weighted", divide="weight")
    assert close(b @ a, [[3, -4 / 3], [0, 0]])
    a, b = merge("ties", "each", t1, eye, t2, eye, scales=(1.0, 1.0), number=0, density=0.5, trim="tensor")
    assert close(a, [[3, -1.5], [0, 0]]) and close(b, [[1, 0], [0, 1]])


def test_dare_keeps_the_mean_and_repeats_itself() -> None:
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 40, generator=g), torch.randn(30, 2, generator=g)
    site = Geometry("linear", 30, 40, 30).pairs()

    def run(number: int) -> torch.Tensor:
        x, y, _ = merge("dare", "change", a, b, parts=(("low", 1.0),), weights=(1.0,), size=30, site=site, number=number, density=0.5)
        return y @ x

    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4))
    mean = sum(run(n) for n in range(60)) / 60
    assert float((mean - b @ a).norm() / (b @ a).norm()) < 0.2
    kept = (run(3).abs() > 1e-4).float().mean()
    assert 0.45 < float(kept) < 0.55


def test_lego() -> None:
    from surgery.passes.merge import lego

    points = torch.cat([torch.cat([A1, A2]), torch.cat([B1, B2], 1).t()], 1).double()
    means = lego.averaged(points, np.array([0, 1, 0, 1]), 2, True)
    assert close(means[:, :2].float(), [[1, 0.25], [0, 1.5]]) and close(means[:, 2:].t().float(), [[1, 0], [0.25, 1]])
    # every term its own cluster: the sum, scaled by the root of the rank
    a, b = merge("lego", "terms", *TENSORS, scales=(1.0, 1.0), size=4, number=0)
    assert close(b @ a, [[1.4142, 0.3536], [0.3536, 2.2981]])
    a, b = merge("lego", "terms", *TENSORS, scales=(0.5, -1.0), size=4, number=0, output=False)
    assert close(b @ a, (0.5 * B1 @ A1 - B2 @ A2).tolist())
    # the order of ranks does not matter, and an adapter merged with itself is itself
    turned = (A1.flip(0), B1.flip(1), A2, B2)
    same = [y @ x for x, y in (merge("lego", "terms", *t, scales=(1.0, 1.0), size=2, number=7) for t in (TENSORS, turned))]
    assert torch.allclose(*same, atol=1e-6)
    for extra in ({}, {"features": "unit"}, {"balance": True}):
        a, b = merge("lego", "terms", A2, B2, A2, B2, scales=(1.0, 1.0), size=2, number=0, **extra)
        assert close(b @ a, (B2 @ A2).tolist()), extra


def test_names_of_tensors() -> None:
    for key, role, path in (
        ("h.0.lora_A.weight", "A", "h.0"), ("h.0.lora_B.default.weight", "B", "h.0"), ("h.0.lora_B.bias", "shift", "h.0"),
        ("emb.lora_embedding_A", "embedding_A", "emb"), ("emb.lora_embedding_B.x", "embedding_B", "emb"),
        ("h.lora_magnitude_vector", "magnitude", "h"), ("h.lora_magnitude_vector.default.weight", "magnitude", "h"),
        ("h.base_layer.bias", "whole", "h.bias"), ("emb.base_layer.weight", "copy", "emb.weight"),
        ("head.modules_to_save.default.weight", "whole", "head.weight"), ("norm.weight", "whole", "norm.weight"),
        ("emb.token_adapter.trainable_tokens_delta", "rows", "emb"), ("experts.base_layer.lora_A.weight", "A", "experts.base_layer"),
    ):  # fmt: skip
        found = key_of(PREFIX + key)
        assert (found.role, found.path, found.problem) == (role, path, ""), key
    for key in ("h.lora_A.bias", "h.lora_E.default"):
        assert key_of(PREFIX + key).problem, key


def test_kept_positions_are_composed_and_stored() -> None:
    start = Init((8, 4), "float32", "ones")
    cut = select(select(start, 0, ((0, 2), (4, 8))), 0, ((1, 2), (3, 6)))  # rows 0 1 4 5 6 7, then 1 5 6 7
    source, kept, why = past.traced(cut)
    assert source is start and not why and kept[1] is None
    assert np.flatnonzero(kept[0]).tolist() == [1, 5, 6, 7]
    folded = Apply((4, 4), "float32", "adapt/lora:fold", (cut,), ())
    assert past.traced(folded)[0] is start
    assert "slicegpt" in past.traced(Apply((4, 4), "float32", "prune/slicegpt:turned", (cut,), ()))[2]
    assert past.traced(select(start, 0, ((4, 8), (0, 2))))[2]

    class Stub:
        past = past.Past(names={"a.1.w": (4, 4)}, moved={"a.1": "a.2"})
        weights = {"a.1.w": cut}
        aliases: dict[str, str] = {}

    Stub.past = past.Past(names={"a.2.w": (8, 4), "a.1.w": (8, 4)}, model={"ref": "m", "hash": "h"}).renamed({"a.2": "a.1"})
    data = past.as_json(Stub)
    read = past.of_json(data)
    assert read.gone == {"a.1.w"} and read.model == {"ref": "m", "hash": "h"}
    assert read.ancestors["a.1.w"].name == "a.2.w" and np.array_equal(read.ancestors["a.1.w"].kept[0], kept[0])
    for broken in (
        {**data, "sets": ["8:AAAA"]},
        {**data, "sets": ["99999999999:eNo="]},
        {**data, "tensors": {"a": {"shape": [3], "kept": [0]}}},
    ):
        with pytest.raises(SurgeryError) as caught:
            past.of_json(broken)
        assert caught.value.diagnostics[0].code == "S0826"
