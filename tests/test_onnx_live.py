"""What stays live in an ONNX graph besides thin factors: prefixes with what their layers share, and modules whose sizes hang together."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import surgery
from surgery.backends import onnx_live
from tests.zoo import ZOO

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("live")
    ZOO["bert"].make_model(num_hidden_layers=2, hidden_size=16, intermediate_size=24).save_pretrained(home / "bert")  # type: ignore[operator]
    old = Path.cwd()
    os.chdir(home)
    yield home
    os.chdir(old)


def inputs_of(path: str) -> dict[str, list[Any]]:
    return {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in onnx.load(path).graph.input}


def test_a_prefix_is_exchanged_in_a_session_with_what_its_layers_share(work: Path) -> None:
    """The table and the first layer of the network are one for both attentions and one input each. Other values give what torch gives with them."""
    spec = """surg 1

insert prefix(length = 3, width = 5) on layers[*].attn
emit torch to "whole"
emit onnx(live = [prefix]) to "live.onnx"
"""
    result = surgery.compile(spec, "bert")
    module = surgery.load("whole").eval()
    generator = torch.Generator().manual_seed(3)
    other = {n: 0.5 * torch.randn(p.shape, generator=generator) for n, p in module.named_parameters() if ".prefix." in n}
    given = inputs_of("live.onnx")
    assert len(other) == 7 and set(other) <= set(given)
    record = next(json.loads(p.value) for p in onnx.load("live.onnx").metadata_props if p.key == "surgery.adapters")
    assert {n for entry in record for n in entry["tensors"]} >= set(other)
    session = runtime.InferenceSession("live.onnx")
    feeds = {"input_ids": IDS.numpy(), "attention_mask": np.ones_like(IDS.numpy()), "token_type_ids": np.zeros_like(IDS.numpy())}
    before = session.run(None, feeds)[0]
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in other:
                parameter.copy_(other[name])
        want = module(**{n: torch.from_numpy(v) for n, v in feeds.items()})[0].numpy()
    got = session.run(None, feeds | {n: t.numpy() for n, t in other.items()})[0]
    assert np.abs(got - want).max() <= 1e-4 and np.abs(got - before).max() > 1e-2
    swapped = [c for c in result.certificates if c["claim"] == "torch = onnx with another adapter"]
    assert swapped and all(c["ok"] for c in swapped)


class Kronecker(torch.nn.Module):
    """Two low-rank factors, and a product whose sides go with the width of the input."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"low.a": (3, 6), "low.b": (6, 3), "side.a": (2, 2), "side.b": (3, 3)}
        for path, shape in shapes.items():
            owner, _, leaf = path.partition(".")
            if not hasattr(self, owner):
                self.add_module(owner, torch.nn.Module())
            getattr(self, owner).register_parameter(leaf, torch.nn.Parameter(torch.ones(shape)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.low.a.T @ self.low.b.T + x @ torch.kron(self.side.a, self.side.b)  # type: ignore[union-attr, operator, arg-type]


def test_sizes_that_hang_together_cannot_grow_one_by_one() -> None:
    """Nothing is closed where all open axes may grow; of a graph that leaves more open than the model takes, the module with those sizes is."""
    root, names = Kronecker(), ["low.a", "low.b", "side.a", "side.b"]

    def graph(**shapes: list[Any]) -> Any:
        values = [onnx.helper.make_tensor_value_info(n.replace("_", "."), onnx.TensorProto.FLOAT, s) for n, s in shapes.items()]
        return onnx.helper.make_model(onnx.helper.make_graph([], "model", values, []))

    x = [torch.ones(2, 6)]
    fixed = graph(low_a=["rank", 6], low_b=[6, "rank"], side_a=[2, 2], side_b=[3, 3])
    assert onnx_live.tied(root, fixed, names, x) == frozenset()
    wide = graph(low_a=["rank", 6], low_b=[6, "rank"], side_a=["n", "n"], side_b=["m", "m"])
    assert onnx_live.tied(root, wide, names, x) == {"side.a", "side.b"}
