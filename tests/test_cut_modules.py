"""Cuts of small hand-made modules: every kind of leaf says what it has become, and what cannot be cut says why and where."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.core.diagnostics import SurgeryError
from surgery.driver import load_spec
from surgery.folding import stir
from surgery.model import cost
from surgery.model.cut import cut
from surgery.model.cut_sizes import NewSizes
from surgery.model.program import Origin, Program
from surgery.model.walk import inside, tensors, tree
from surgery.opening import capture
from surgery.passes.resolve import resolve
from surgery.session import apply
from tests.cut_support import free, observed_specs, remove, same_classes, some_units


class Image(nn.Module):
    """Convolutions of every kind, and norms with and without parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular")
        self.first = nn.BatchNorm2d(8, affine=False)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.second = nn.GroupNorm(3, 6)
        self.grouped = nn.Conv2d(6, 9, 1, groups=3)
        self.third = nn.GroupNorm(1, 9, affine=False)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.first(self.stem(x)).relu())
        x = self.third(self.grouped(self.second(self.up(x)).relu()))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class Text(nn.Module):
    """A table, an attention without a stated scale, and norms of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 12, padding_idx=0)
        self.qkv = nn.Linear(12, 36)
        self.out = nn.Linear(12, 12)
        self.norm = nn.LayerNorm(12)
        self.last = nn.RMSNorm(12)
        self.plain = nn.LayerNorm(12, elementwise_affine=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        q, k, v = self.qkv(self.norm(x)).split(12, -1)
        q, k, v = (t.reshape(*ids.shape, 3, 4).transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(*ids.shape, 12))
        return self.plain(x) + self.last(x)  # type: ignore[no-any-return]


def programs() -> dict[str, tuple[Program, list[Tensor]]]:
    torch.manual_seed(0)
    image, ids = torch.randn(2, 3, 6, 6), torch.randint(1, 20, (2, 5))
    return {"image": (capture(Image(), (image,)), [image]), "text": (capture(Text(), (ids,)), [ids])}


@pytest.mark.parametrize("name", ["image", "text"])
def test_every_class_of_every_leaf(name):
    program, inputs = programs()[name]
    leaves = free(program.dims)
    assert len(leaves) >= 4
    for i, leaf in enumerate(leaves):
        done = remove(program, {leaf: some_units(leaf, i)})
        assert done.error(inputs) <= 1e-5, str(done.group)
        same_classes(done)
        assert list(observed_specs(done.after, inputs)) == [], str(done.group)
    everything = remove(program, {leaf: [0] for leaf in leaves if leaf.size > 1})
    assert everything.error(inputs) <= 1e-5


def test_leaves_say_what_they_are():
    program, _ = programs()["image"]
    dims = program.dims
    stem = dims.leaves(dims.parameters["stem.weight"][0])[0]
    group = dims.leaves(dims.parameters["grouped.weight"][0])[0]
    done = remove(program, {stem: [0, 7], group: [1]})
    module = done.after.module
    assert (module("stem").out_channels, module("first").num_features, module("depth").groups, module("depth").in_channels) == (6, 6, 6, 6)
    assert done.after.weights["up.weight"].shape == (6, 4, 2, 2)
    assert (module("second").num_groups, module("second").num_channels, module("grouped").groups) == (2, 4, 2)
    assert (module("grouped").in_channels, module("grouped").out_channels) == (4, 6)
    assert module("head").in_features == 6


def test_a_derived_scale_is_written_out():
    program, inputs = programs()["text"]
    dims = program.dims
    width = next(leaf for leaf in dims.leaves(dims.parameters["qkv.weight"][0]) if "default_scale" in leaf.flags)
    done = remove(program, {width: [1]})
    assert done.error(inputs) <= 1e-6
    scales: list[Any] = [n.kwargs.get("scale") for n in done.after.graph.graph.nodes if "scaled_dot" in str(n.target)]
    scales += [m.scale for m in done.after.graph.modules() if hasattr(m, "enable_gqa")]
    assert scales == [0.5]


def refusal(model: nn.Module, example: Tensor, parameter: str, units: list[int]) -> str:
    program = capture(model, (example,))
    with pytest.raises(SurgeryError) as caught:
        cut(program, program.dims.coupled(parameter, 0, units), Origin(verb="prune"))
    assert caught.value.diagnostics[0].code == "S0430"
    return str(caught.value)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.renorm(self.up(x), 2, 0, 1.0))  # type: ignore[no-any-return]


def test_an_operation_without_a_rule_is_named_with_its_layer():
    model = nn.Sequential(nn.Linear(4, 6), nn.ModuleList([Layer(), Layer()])[0], Layer())

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])
            self.enter = nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            for layer in self.layers:
                x = layer(x)
            return x

    assert "aten.renorm.default has no dimension rule" in refusal(model, torch.randn(2, 4), "1.up.weight", [0])
    assert "of layers.1" in refusal(Deep(), torch.randn(2, 4), "layers.1.up.weight", [0])


class Squeezed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).unsqueeze(1).squeeze())  # type: ignore[no-any-return]


def test_an_axis_that_would_be_squeezed_away_stays():
    assert "drops axes of size one" in refusal(Squeezed(), torch.randn(3, 4), "up.weight", [0])


def test_the_tree_is_walked_as_torch_walks_it() -> None:
    """Shared modules and tensors stand once, or at each of their places."""
    shared = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": nn.Sequential(shared, nn.BatchNorm1d(2)), "b": shared, "c": nn.Sequential(nn.Sequential(shared))})
    assert tree(model) == list(model.named_modules()) and tree(model, every=True) == list(model.named_modules(remove_duplicate=False))
    parameters, buffers = tensors(model)
    assert list(parameters) == [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert list(buffers) == [n for n, _ in model.named_buffers(remove_duplicate=False)]
    assert inside(model, "c.0.0") is shared and inside(model, "") is model


def test_costs_after_a_cut_are_known_before_it() -> None:
    """What the plan says of operations is counted on the analysis of the model before the cut; counted anew it is the same."""
    program = capture(Image().eval(), (torch.randn(2, 3, 8, 8),))
    counted = 0
    for i, leaf in enumerate(free(program.dims)):
        if leaf.size < 2:
            continue
        mine = program.copy()
        group = mine.dims.remove({leaf: some_units(leaf, i)})
        sizes = NewSizes(group.dims, group.keep)
        foreseen = cost.foreseen(mine, cost.count(mine), sizes)
        cut(mine, group, Origin(), sizes)
        assert foreseen == cost.count(mine).per_token < cost.count(program).per_token
        counted += 1
    assert counted >= 3


class Groups(nn.Module):
    """Convolutions in groups whose groups go when channels go."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.depth(self.grouped(self.first(x)))).mean((2, 3))


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "pissa"])
def test_adapters_lose_the_rank_of_the_groups_that_go(method: str) -> None:
    """The rank is shared out among the groups, so a cut of groups takes a part of it; the scale stays."""
    torch.manual_seed(3)
    base = capture(Groups().eval(), (torch.randn(2, 3, 6, 6),))
    changed = 0
    for path in ("grouped", "depth"):
        program = base.copy()
        statement = load_spec(f'surg 1\nadapt {method}(rank = 8) on "{path}"\n').statements[0]
        apply(program, resolve(program, statement))
        program = stir(program)
        module = program.module(program.attachments[0].module)
        for leaf in free(program.dims):
            done = remove(program, {leaf: [0]})
            (attachment,) = done.after.attachments
            after = done.after.module(attachment.module)
            assert done.error((torch.randn(2, 3, 6, 6),), torch.float64) <= 1e-6, (path, leaf)
            assert after.site.groups == done.after.module(path).groups and after.method == attachment.method
            assert after.method.rank * module.site.groups == 8 * after.site.groups and after.method.scale() == pytest.approx(
                module.method.scale()
            )
            assert sum(p.numel() for p in after.parameters()) == after.method.count(after.site)
            changed += after.method.rank != 8
    assert changed >= 3
