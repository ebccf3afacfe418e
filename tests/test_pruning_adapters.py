"""Adapters that are pruned together with their layer: pruning, adapting and folding in any order give what the algebra says."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery.compiling import fold_all
from surgery.core.diagnostics import SurgeryError
from surgery.model import graphjson
from surgery.model.cut import cut
from surgery.model.program import Origin, Program
from surgery.model.weights import Init
from surgery.opening import capture
from surgery.passes import registry
from surgery.passes.kinds import delta
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.operation import Resolved
from tests.cut_support import TENSORS, Done, difference, remove, structure

SITES = {"splora": ("up", "down", "conv", "grouped"), "sppara": ("conv", "grouped"), "splopa": ("up", "down")}
STREAM, HIDDEN, CHANNELS = 8, 12, 6


class Small(nn.Module):
    """A residual feed-forward block, and two convolutions of which one is grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(5, STREAM)
        self.up, self.down = nn.Linear(STREAM, HIDDEN), nn.Linear(HIDDEN, STREAM)
        self.conv, self.grouped = nn.Conv1d(3, CHANNELS, 3, padding=1), nn.Conv1d(CHANNELS, CHANNELS, 5, padding=2, groups=2)
        self.last = nn.Conv1d(CHANNELS, 2, 1)
        self.leave = nn.Linear(STREAM, 3)

    def forward(self, x: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        h = self.enter(x)
        h = h + self.down(torch.relu(self.up(h)))
        return self.leave(h), self.last(torch.relu(self.grouped(torch.relu(self.conv(image)))))


@cache
def captured() -> tuple[Program, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    inputs = (torch.randn(2, 5), torch.randn(2, 3, 9))
    return capture(Small(), inputs), inputs


def attached(program: Program, method: str, sites: tuple[str, ...], **params: object) -> Program:
    made = program.copy()
    chosen = tuple(s for s in made.anatomy.modules if s.path in sites)
    assert len(chosen) == len(sites)
    one = registry.get("adapt", method)(**params)
    delta.apply(made, Resolved("adapt", method, "on", chosen, (one,) * len(sites), Origin(verb="adapt", method=method)))
    return made


def trained(program: Program, seed: int) -> Program:
    """The program with random numbers in everything that adapters added, as a training leaves them."""
    made = program.copy()
    for i, name in enumerate(sorted({made.aliases.get(t, t) for a in made.attachments for t in a.tensors})):
        old = made.weights[name]
        made.weights[name] = Init(old.shape, old.dtype, "normal", (0.0, 0.3), 1000 * seed + i)
    return made


def folded(program: Program) -> Program:
    made = program.copy()
    fold_all(made, Origin(verb="fold"))
    return made


def pruned(program: Program, units: dict[tuple[str, int], list[int]]) -> Done:
    """Without units of the classes of some stored axes of the model itself."""
    dims = program.dims
    return remove(program, {dims.leaves(dims.parameters[name][axis])[-1]: gone for (name, axis), gone in units.items()})


def weights(program: Program) -> dict[str, Tensor]:
    return {name: TENSORS.of(program, name) for name in program.weights}


def alike(a: Program, b: Program) -> None:
    """One graph and equal weights up to rounding."""
    left, right = weights(a), weights(b)
    assert sorted(left) == sorted(right)
    for name in left:
        assert left[name].shape == right[name].shape and torch.allclose(left[name], right[name], atol=1e-6), name
    assert graphjson.dump(a.graph) == graphjson.dump(b.graph)


@st.composite
def specs(draw: st.DrawFn) -> tuple[str, dict[str, object], tuple[str, ...], dict[tuple[str, int], list[int]], int]:
    """A method with its parameters, the sites it stands on, the units that go, and a seed for what training leaves."""
    method = draw(st.sampled_from(sorted(SITES)))
    block = 4 if method == "splopa" else 1
    params: dict[str, object] = {"init_range": draw(st.sampled_from([0.0, 1e-4]))}
    if method == "splora":
        params["rank"] = draw(st.integers(1, 4))
    if method == "splopa":
        params |= {"block": block, "prototypes": draw(st.integers(1, 3))}
    sites = tuple(draw(st.lists(st.sampled_from(SITES[method]), min_size=1, unique=True)))

    def gone(size: int) -> list[int]:
        blocks = draw(st.lists(st.integers(0, size // block - 1), unique=True, max_size=size // block - 1))
        return [b * block + i for b in blocks for i in range(block)]

    units = {("up.weight", 0): gone(HIDDEN), ("enter.weight", 0): gone(STREAM)}
    if method != "splopa":
        group = [draw(st.integers(0, 2))] if draw(st.booleans()) else []
        units[("grouped.weight", 0)] = group  # as many of each group
    return method, params, sites, {k: v for k, v in units.items() if v}, draw(st.integers(0, 99))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(specs())
def test_any_order_of_pruning_adapting_and_folding(spec):
    method, params, sites, units, seed = spec
    base, inputs = captured()
    trained_whole = trained(attached(base, method, sites, **params), seed)
    adapt_prune = pruned(trained_whole, units)
    # the adapter of the pruned layer stands where the pruned adapter stands, and is as large
    prune_adapt = attached(pruned(base, units).after, method, sites, **params)
    assert graphjson.dump(adapt_prune.after.graph) == graphjson.dump(prune_adapt.graph)
    assert {n: e.shape for n, e in adapt_prune.after.weights.items()} == {n: e.shape for n, e in prune_adapt.weights.items()}
    assert [(a.site.shape, a.site.rows) for a in adapt_prune.after.attachments] == [
        (a.site.shape, a.site.rows) for a in prune_adapt.attachments
    ]
    # prune then fold is fold then prune
    alike(folded(adapt_prune.after), pruned(folded(trained_whole), units).after)
    # and all of it is the masked original
    assert adapt_prune.error(inputs, torch.float64) <= 1e-9
    assert (
        difference(
            adapt_prune.run(inputs), Done(trained_whole, folded(adapt_prune.after), adapt_prune.group, adapt_prune.result).run(inputs)
        )
        <= 1e-5
    )
    for a in adapt_prune.after.attachments:
        site: Geometry = adapt_prune.after.module(a.module).site
        assert sum(t.numel() for t in adapt_prune.after.module(a.module).parameters()) == a.method.count(site)


def test_the_count_after_pruning_is_the_papers():
    """r (|kept in| + |kept out|): 2 (4 + 2), and 2 more for the bias."""
    model = nn.Sequential(nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))
    program = attached(capture(model, (torch.randn(2, 9),)), "splora", ("2",), rank=2)
    dims = program.dims
    done = remove(program, {dims.leaves(dims.parameters["2.weight"][1])[0]: [0, 3], dims.leaves(dims.parameters["2.weight"][0])[0]: [1, 2]})
    added = sum(t.numel() for t in done.after.module("2.splora").parameters())
    assert added == 2 * (4 + 2) and added + done.after.weights["2.bias"].shape[0] == 14


def test_blocks_are_kronecker_products():
    site = Geometry("linear", 2, 4, 2)
    method = registry.get("adapt", "splopa")(prototypes=1, block=2)
    t = {"positions": torch.tensor([[[1.0, 2.0]]]), "columns": torch.tensor([[1.0, 3.0]]), "rows": torch.tensor([[1.0, 0.0]])}
    assert torch.equal(method.delta(site, t, torch.zeros(2, 4)), torch.tensor([[1.0, 0, 2, 0], [3, 0, 6, 0]]))
    assert registry.get("adapt", "splopa")().count(Geometry("linear", 64, 64, 64)) == 4352


def test_the_central_tap():
    torch.manual_seed(0)
    site = Geometry("conv", 4, 6, 4, kernel=(3, 5), stride=(1, 1), padding=(1, 2), dilation=(1, 1), groups=2)
    x, weight, p = torch.randn(2, 6, 7, 8), torch.randn(4, 3, 3, 5), torch.randn(4, 3)
    method = registry.get("adapt", "sppara")()
    whole = site.convolve(x, site.from_canonical(method.fold(site, {"P": p}, weight.reshape(4, -1))))
    beside = torch.nn.functional.conv2d(x, p[:, :, None, None], groups=2)
    assert torch.allclose(whole, site.convolve(x, weight) + beside, atol=1e-5)


def test_a_part_of_a_block_cannot_go():
    base, _ = captured()
    program = attached(base, "splopa", ("up",), block=4, prototypes=2)
    group = program.dims.remove({program.dims.leaves(program.dims.parameters["up.weight"][0])[0]: [1]})
    shapes = structure(program.dims)
    with pytest.raises(SurgeryError) as caught:
        cut(program, group, Origin(verb="prune"))
    assert caught.value.diagnostics[0].code == "S0431" and "blocks of 4" in str(caught.value)
    assert structure(program.dims).keys() == shapes.keys() and program.weights["up.weight"].shape == (HIDDEN, STREAM)


def test_parallel_convolutions_leave_folded(tmp_path, monkeypatch):
    """The central taps stand in the kernels that onnxruntime and transformers load."""
    from transformers import ResNetConfig, ResNetModel

    import surgery as api

    ort = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", image_size=16)
    model = ResNetModel(config).eval()
    model.save_pretrained("base")
    made = api.compile(
        'surg 1\nmodel "base"\nadapt sppara(init_range = 0.3) on **.conv\nemit onnx(optimize = none) to "out.onnx"\nemit transformers to "out"\n'
    )
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        want, plain = made.module(pixel_values=x)[0], model(pixel_values=x)[0]
        loaded = ResNetModel.from_pretrained("out").eval()(pixel_values=x)[0]
    served = torch.from_numpy(ort.InferenceSession("out.onnx").run(None, {"pixel_values": x.numpy()})[0])
    scale = want.abs().max()
    assert (plain - want).abs().max() > 1e-2 * scale
    assert (loaded - want).abs().max() <= 1e-5 * scale and (served - want).abs().max() <= 1e-5 * scale
    assert any("sppara" in n for n, _ in made.module.named_parameters())
