"""Adapters that change whole weights, or experts, carried over cuts: equal to the cut of the adapted model, bit for bit where both select."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery as api
from tests import fixtures
from tests.test_adapter_kinds import BASE, trained, world
from tests.zoo import ZOO

peft = pytest.importorskip("peft")
__all__ = ["world"]

CUT = "prune ffn(ratio = 50%, score = random) on layers[0].ffn\nprune heads(ratio = 50%, score = random) on layers[0].attn\n"
TURNS: dict[str, Callable[[], Any]] = {
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=["0.output.dense"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, target_modules=["attention.output.dense"]),
    "miss": lambda: peft.MissConfig(r=8, init_weights="bat", target_modules=["query"]),
    "road": lambda: peft.RoadConfig(variant="road_2", group_size=8, target_modules=["intermediate.dense"]),
}
"""Kinds that need the weight before the cut."""
ADDS: dict[str, Callable[[], Any]] = {
    "waves": lambda: peft.WaveFTConfig(n_frequency=20, target_modules=["key"]),
    "ia": lambda: peft.IA3Config(target_modules=["value"], feedforward_modules=[]),
}
"""Kinds that do not."""


def head(model: str, kinds: dict[str, Any]) -> tuple[str, str]:
    loads = "".join(f'adapter {k} = load("{k}")\n' for k in kinds)
    return f'surg 1\nmodel "{model}"\n{loads}', "".join(f"merge linear of {k} * 1\n" for k in kinds)


def state(text: str) -> dict[str, torch.Tensor]:
    return dict(api.compile(text, force=True).module.state_dict())


def test_a_change_of_whole_weights_is_computed_before_the_cut_and_cut_with_it(world: Path) -> None:
    """After the cut, before it, and on the cut artifact: there the weight before the cut is gone, so that only what does not depend on it goes on."""
    kinds = TURNS | ADDS
    for name, make in kinds.items():
        trained(name, "bert", make())
    start, merges = head("bert", kinds)
    want = state(start + merges + CUT)
    got = api.compile(start + CUT + 'emit torch to "cut"\n' + merges, force=True)
    found, plain = got.module.state_dict(), dict(api.load("cut").state_dict())
    changed = [n for n in want if not torch.equal(want[n], plain[n])]
    assert len(changed) >= 8 and found.keys() == want.keys()
    assert all(torch.equal(found[n], want[n]) for n in want)
    assert all(f"{s.text.split()[3]} was trained before the cut and is carried over" in s.facts for s in got.plan.steps[-len(kinds) :])
    start, merges = head("cut", ADDS)
    made = state(start + merges)
    mine = [n for n in want if ".key." in n or ".value." in n]
    assert len(mine) == 4 and all(torch.equal(made[n], want[n]) for n in mine)
    start, merges = head("cut", TURNS)
    for merge in merges.splitlines():
        refused = api.plan(f"{start}{merge}\n").diagnostics[-1]
        assert refused.code == "S0789" and "not stored any more" in refused.message


def test_what_stands_between_the_cut_and_the_adapter_stays(world: Path) -> None:
    """A mask after the cut: the change is that of the weight that the adapter was trained on, and stays off the zeros."""
    trained("oft", "bert", TURNS["oft"]())
    start, merge = head("bert", {"oft": None})
    path, mask = "encoder.layer.0.output.dense.weight", "prune mask(ratio = 30%, score = magnitude) on layers[0].ffn.down\n"
    plain, turned, both = (state(start + CUT + more)[path] for more in ("", merge, mask + merge))
    kept = both != 0
    assert 0.6 < float(kept.float().mean()) < 0.8
    assert torch.allclose(both[kept], turned[kept], atol=1e-6) and not torch.allclose(both[kept], plain[kept], atol=1e-3)


def test_factors_of_experts_lose_what_the_tensor_lost(world: Path) -> None:
    """Some experts, and some features of each, against the cut of the model that has the adapter folded in."""
    model = ZOO["mixtral"].make_model(num_hidden_layers=1)
    fixtures.save(model, world / "mixtral")
    BASE["mixtral"] = model.eval()
    config = peft.LoraConfig(
        r=2, target_modules=[], target_parameters=["experts.down_proj", "mlp.experts.gate_up_proj"], task_type="CAUSAL_LM"
    )
    trained("moe", "mixtral", config)
    start, merge = head("mixtral", {"moe": None})
    cut = "prune experts(keep = 2, score = random) on layers[0].ffn.experts\nprune width(ratio = 50%, score = random)\n"
    want = api.compile(f"{start}{merge}fold all\n{cut}").module
    got = api.compile(f"{start}{cut}{merge}fold all\n")
    one, two = dict(want.state_dict()), got.module.state_dict()
    assert one.keys() == two.keys() and any(t.dim() == 3 and t.shape[0] == 2 for t in one.values())
    assert max(float((one[n] - two[n]).abs().max()) for n in one) <= 1e-6
    assert "moe was trained before the cut and is carried over" in next(s for s in got.plan.steps if s.verb == "merge").facts
    assert isinstance(want, nn.Module)
