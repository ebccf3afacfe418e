"""Every family: stored, built again, called as the live model is."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from surgery.model import graphjson
from surgery.model.runtime import build_module
from tests.programs import program_for
from tests.zoo import ZOO


def floats(value):
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]


@pytest.mark.parametrize("family", [name for name, entry in ZOO.items() if entry.capturable])
def test_family(family):
    entry = ZOO[family]
    model = entry.make_model()
    program = program_for(model)
    text = json.dumps(graphjson.dump(program.graph))
    assert json.dumps(graphjson.dump(graphjson.load(json.loads(text)))) == text
    module = build_module(program, {n: e.tensor for n, e in program.weights.items()})
    assert set(module.state_dict()) == set(model.state_dict())
    inputs = entry.inputs(3, 17)
    with torch.no_grad():
        want, got = model(**copy.deepcopy(inputs)), module(**copy.deepcopy(inputs))
    assert type(want) is type(got)
    for name in got:
        for a, b in zip(floats(want[name]), floats(got[name]), strict=True):
            assert torch.equal(a, b), name
