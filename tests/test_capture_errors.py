"""What cannot be captured is refused with the line of model code that prevents it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery.core.diagnostics import SurgeryError
from surgery.model import graphjson
from surgery.model.capture import capture_config, capture_module, materialise
from surgery.model.capture.stacks import find_stacks
from tests.capture_support import captured
from tests.zoo import ZOO


def test_fixed_length_names_the_line() -> None:
    with pytest.raises(SurgeryError) as caught:
        capture_module(Loops(), {"x": torch.randn(2, 5, 3)}, dynamic={"x": {0: "batch", 1: "sequence"}})
    (found,) = caught.value.diagnostics
    assert found.code == "S0503" and "test_capture_errors.py:" in found.message and "in running" in found.message


def test_value_in_size_names_the_line() -> None:
    with pytest.raises(SurgeryError) as caught:
        capture_config(ZOO["vilt"].make_config(), "ViltModel")
    (found,) = caught.value.diagnostics
    assert found.code == "S0502" and "modeling_vilt.py:" in found.message


class Loops(nn.Module):
    """A loop over positions that no kernel of the table stands for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.running(x)

    def running(self, x: torch.Tensor) -> torch.Tensor:
        state = x[:, 0]
        for at in range(x.shape[1]):
            state = state * 0.5 + x[:, at]
        return state


class Blocks(nn.Module):
    """A loop over blocks, whose number is no size: it is one for several sizes. With ``pairs`` a number that fixes none."""

    def __init__(self, pairs: bool) -> None:
        super().__init__()
        self.pairs = pairs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pairs:
            return x.reshape(x.shape[0], x.shape[1] // 2, 6)
        parts = [x[:, 4 * at : 4 * at + 4].cumsum(1) for at in range((x.shape[1] + 3) // 4)]
        return torch.cat(parts, 1)


def test_a_number_of_blocks_is_no_open_size() -> None:
    axes = {"x": {0: "batch", 1: "sequence"}}
    with pytest.raises(SurgeryError) as caught:
        capture_module(Blocks(False), {"x": torch.randn(2, 10, 3)}, dynamic=axes)
    (found,) = caught.value.diagnostics
    assert found.code == "S0503" and "test_capture_errors.py:" in found.message and "sizes of 9 to 12 only" in found.notes[0]
    graph = materialise(capture_module(Blocks(True), {"x": torch.randn(2, 10, 3)}, dynamic=axes), {})
    x = torch.randn(3, 26, 3)
    assert torch.equal(graph(x)[0], Blocks(True)(x))


class Looks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:
            return x + 1
        return x


class Picks(nn.Module):
    """A product whose number of rows is the number of positive entries."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x[x > 0].reshape(-1, 3))


class Splits(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(4, 3) * 2


class Foreign(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(x.numpy() + 1)


class Odd(nn.Module):
    def forward(self, x: torch.Tensor, /) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("module", "inputs", "dynamic", "code", "text"),
    [
        (Looks(), (torch.randn(2, 3),), "batch", "S0502", "test_capture_errors.py:"),
        (Picks(), (torch.ones(2, 3),), "batch", "S0502", "test_capture_errors.py:"),
        (Splits(), (torch.randn(4, 3),), "batch", "S0503", "test_capture_errors.py:"),
        (Foreign(), (torch.randn(2, 3),), "batch", "S0501", "test_capture_errors.py:"),
        (Looks(), (torch.randn(2, 3), 1), "batch", "S0506", "Looks.forward"),
        (Looks(), {"y": torch.randn(2, 3)}, "batch", "S0506", "Looks.forward"),
        (Odd(), (torch.randn(2, 3),), "batch", "S0506", "by position only"),
        (nn.Linear(3, 3), (torch.randn(2, 3),), "rows", "S0506", "'rows'"),
        (nn.Linear(3, 3), (torch.randn(2, 3),), {"z": {0: "batch"}}, "S0506", "'z'"),
    ],
)
def test_refused(module: nn.Module, inputs: object, dynamic: object, code: str, text: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        capture_module(module, inputs, dynamic=dynamic)  # type: ignore[arg-type]
    (found,) = caught.value.diagnostics
    assert found.code == code and text in found.message and found.help


@pytest.mark.parametrize(
    ("config", "architecture", "text"),
    [
        ({"model_type": "no_such_family"}, None, "no_such_family"),
        ({"model_type": "bert"}, "NoSuchModel", "NoSuchModel"),
        ({"model_type": "bert"}, "AutoConfig", "AutoConfig"),
        ({"model_type": "bert", "hidden_size": 30, "num_attention_heads": 4}, "BertModel", "BertModel"),
        ({"model_type": "bert", "hidden_size": "big"}, "BertModel", "'hidden_size' expected int, got str"),
    ],
)
def test_unfit_config(config: dict[str, object], architecture: str | None, text: str) -> None:
    with pytest.raises(SurgeryError) as caught:
        capture_config(config, architecture)
    (found,) = caught.value.diagnostics
    assert found.code == "S0504" and text in found.message


def test_missing_and_wrong_tensors() -> None:
    state = ZOO["vit"].make_model().state_dict()
    name = "layernorm.weight"
    with pytest.raises(SurgeryError, match=r"S0507: there is no tensor for 'layernorm\.weight'"):
        materialise(captured("vit"), {k: v for k, v in state.items() if k != name})
    with pytest.raises(SurgeryError, match="S0507"):
        materialise(captured("vit"), {**state, name: torch.zeros(3)})


def test_nothing_stays_patched() -> None:
    """A failed trace leaves the module, torch and transformers as they were."""
    rand, register = torch.rand, nn.Module.register_parameter
    module = nn.Sequential(nn.Sequential(nn.Linear(3, 3), Looks()), nn.Sequential(nn.Linear(3, 3), Looks()))
    with pytest.raises(SurgeryError):
        capture_module(module, (torch.randn(2, 3),))
    assert torch.rand is rand and nn.Module.register_parameter is register
    assert all("forward" not in m.__dict__ for m in module.modules())
    assert all(p.requires_grad and p.device.type == "cpu" for p in module.parameters())


def test_stacks_of_plain_modules() -> None:
    block = lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU())  # noqa: E731
    assert find_stacks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []
    holder = nn.Module()
    holder.layers = nn.ModuleList([block(), block()])
    holder.lone = nn.ModuleList([block()])
    assert find_stacks(holder) == ["layers.0", "layers.1", "lone.0"]


def test_twins_that_differ_are_traced_apart() -> None:
    """Equal shapes are not enough: a layer with another constant must not be stamped from its neighbour."""

    class Layer(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.factor = factor
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x) * self.factor

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Layer(1.5), Layer(1.5), Layer(2.5), Layer(1.5)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model().eval()
    capture = capture_module(model, (torch.randn(2, 4),))
    x = torch.randn(5, 4)
    assert torch.equal(materialise(capture, model.state_dict())(x)[0], model(x))


class Parts(nn.Module):
    def __init__(self, *names: str) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(4, 4) for name in names})
        self.scales = nn.ParameterDict({name: nn.Parameter(torch.full((4,), 1.5)) for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, part in self.parts.items():
            x = part(x) * self.scales[name]
        return x


def test_names_are_refused_before_any_work_or_survive_storing() -> None:
    x = torch.randn(3, 4)
    for name in ("b b", "class", "__x", "ä", "a/b"):
        with pytest.raises(SurgeryError) as caught:
            capture_module(Parts("a", name), (x,))
        assert caught.value.diagnostics[0].code == "S0511" and repr(name) in caught.value.diagnostics[0].message
    module = Parts("a-b", "0", "In", "c_d").eval()
    capture = capture_module(module, (x,))
    capture.graph = graphjson.load(graphjson.dump(capture.graph))
    assert torch.equal(materialise(capture, module.state_dict())(x)[0], module(x))
