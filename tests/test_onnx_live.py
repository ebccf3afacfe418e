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
    """The table and the first layer of the network are one for both attentions and one input each; other values give what torch gives with them."""
    spec = 'surg 1\n\ninsert prefix(length = 3, width = 5) on layers[*].attn\nemit torch to "prefixed"\nemit onnx(live = [prefix]) to "live.onnx"\n'
    result = surgery.compile(spec, "bert")
    module = surgery.load("prefixed").eval()
    generator = torch.Generator().manual_seed(3)
    other = {n: 0.5 * torch.randn(p.shape, generator=generator) for n, p in module.named_parameters() if ".prefix." in n}
    given = inputs_of("live.onnx")
    assert len(other) == 7 and all(given[n] == list(t.shape) or any(isinstance(s, str) for s in given[n]) for n, t in other.items())
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


def test_sizes_that_hang_together_are_closed(work: Path) -> None:
    """The sides of a Kronecker product cannot grow one by one: they are inputs of one size, and the certificate exchanges such values."""
    spec = 'surg 1\n\ninsert phm(width = 4, n = 2) after layers[0].ffn as it\nemit onnx(live = [it], optimize = none) to "phm.onnx"\n'
    result = surgery.compile(spec, "bert")
    mine = {n: s for n, s in inputs_of("phm.onnx").items() if ".it." in n}
    assert mine and all(isinstance(size, int) for shape in mine.values() for size in shape)
    record = next(json.loads(p.value) for p in onnx.load("phm.onnx").metadata_props if p.key == "surgery.adapters")
    assert set(record[0]["tensors"]) == set(mine)
    assert [c["adapter"] for c in result.certificates if "adapter" in c] == ["of its own size"]
