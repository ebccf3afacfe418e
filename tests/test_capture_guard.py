"""What guards a capture: layers that only look alike are found and traced one by one, and that full trace is right too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.model.capture import Captured, capture_config, capture_module, materialise, pipeline
from surgery.model.capture.errors import Fallback
from tests.capture_support import assert_bitwise, flat_inputs, flat_outputs
from tests.zoo import ZOO

SCALES = [1.0, 1.0, 3.0, 1.0]


class Layer(nn.Module):
    """Every subclass reads its index, which is no part of what tells layers apart: transformers layers have one for their cache."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.linear = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.1 + 0.1 * index)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.tanh(self.linear(x)))


class EveryOther(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x.flip(1) if self.layer_idx % 2 else x


class Scaled(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * SCALES[self.layer_idx]


class LongerAtTheEnd(Layer):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.relu(x) if self.layer_idx == 3 else x


class Swapped(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return x - y if self.layer_idx == 1 else y - x


class Returns(Layer):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        z = y * 2
        return y if self.layer_idx == 2 else z


class Stack(nn.Module):
    def __init__(self, kind: type[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([kind(i) for i in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def compare(kind: type[Layer]) -> Captured:
    torch.manual_seed(0)
    module = Stack(kind).eval()
    capture = capture_module(module, (torch.randn(2, 5, 6),))
    graph = materialise(capture, module.state_dict())
    x = torch.randn(3, 8, 6)
    assert torch.equal(graph(x)[0], module(x))
    torch.manual_seed(1)
    want = module.train()(x)
    torch.manual_seed(1)
    assert torch.equal(graph.train()(x)[0], want)
    return capture


def test_twins_are_stamped_whatever_their_rates() -> None:
    assert compare(Layer).fallback == ""


@pytest.mark.parametrize(
    ("kind", "path", "why"),
    [
        (EveryOther, "layers.1", "it makes more than"),
        (Scaled, "layers.2", "in what it gives to "),
        (LongerAtTheEnd, "layers.3", "it makes more than"),
        (Swapped, "layers.1", "in what it gives to "),
        (Returns, "layers.2", "it returns something else"),
    ],
)
def test_layers_that_only_look_alike(kind: type[Layer], path: str, why: str) -> None:
    """The first layer that does something else is named, and the capture is right all the same."""
    fallback = compare(kind).fallback
    assert fallback.startswith(f"`{path}` does something else than `layers.0`") and why in fallback


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "gemma3_text", "t5", "swin", "mixtral", "whisper", "deberta-v2"])
def test_forced_fallback(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing every layer gives the live model's numbers, in evaluation and, same seed, in training."""
    entry, trace = ZOO[family], pipeline.trace

    def forced(model: nn.Module, call: Any, *, stubs: bool) -> Any:
        if stubs:
            raise Fallback("forced")
        return trace(model, call, stubs=stubs)

    monkeypatch.setattr(pipeline, "trace", forced)
    capture = capture_config(entry.make_config(), entry.architecture)
    assert capture.fallback == "forced"
    model = entry.make_model()
    graph = materialise(capture, model.state_dict())
    inputs = entry.inputs(3, 17)
    flat = flat_inputs(capture, inputs)
    with torch.no_grad():
        assert_bitwise(graph(*flat), flat_outputs(capture, model(**inputs)))
    inputs = entry.inputs(3, 17)
    torch.manual_seed(5)
    want = flat_outputs(capture, model.train()(**inputs))
    torch.manual_seed(5)
    assert_bitwise(graph.train()(*flat), want)
