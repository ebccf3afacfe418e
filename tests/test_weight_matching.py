"""``merge weight_matching``: what was only put into another order is found again, and nothing that is moved computes anything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery as api
from surgery.opening import capture
from surgery.passes.kinds.match import Matching
from surgery.passes.kinds.match_axes import AXES, find_units, ranges
from tests.zoo import ZOO

HEAD = 'surg 1\nmodel "base" as base\ncheckpoint moved = load("moved")\ncheckpoint one = load("one")\n'


def shuffled(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def moved_llama(state: dict[str, Tensor], layers: int, groups: int, per_group: int, d: int) -> dict[str, Tensor]:
    """Everything of a Llama in another order, written out by hand: stream, key-value groups, query heads in them, value columns, hidden units."""
    out = {n: t.clone() for n, t in state.items()}
    for i in range(layers):
        at = f"model.layers.{i}."
        up = shuffled(state[at + "mlp.up_proj.weight"].shape[0], 10 + i)
        for name in ("gate_proj", "up_proj"):
            out[at + f"mlp.{name}.weight"] = out[at + f"mlp.{name}.weight"][up]
        out[at + "mlp.down_proj.weight"] = out[at + "mlp.down_proj.weight"][:, up]
        order = shuffled(groups, 20 + i)
        heads = torch.stack([shuffled(per_group, 30 + 7 * i + g) for g in range(groups)])
        columns = torch.stack([shuffled(d, 60 + 7 * i + g) for g in range(groups)])
        width = state[at + "self_attn.q_proj.weight"].shape[1]
        q = out[at + "self_attn.q_proj.weight"].view(groups, per_group, d, width)
        k = out[at + "self_attn.k_proj.weight"].view(groups, d, width)
        v = out[at + "self_attn.v_proj.weight"].view(groups, d, width)
        o = out[at + "self_attn.o_proj.weight"].view(width, groups, per_group, d)
        out[at + "self_attn.q_proj.weight"] = torch.stack([q[order[g]][heads[g]] for g in range(groups)]).reshape(-1, width)
        out[at + "self_attn.k_proj.weight"] = k[order].reshape(-1, width)
        out[at + "self_attn.v_proj.weight"] = torch.stack([v[order[g]][columns[g]] for g in range(groups)]).reshape(-1, width)
        blocks = [o[:, order[g]][:, heads[g]][:, :, columns[g]] for g in range(groups)]
        out[at + "self_attn.o_proj.weight"] = torch.stack(blocks, 1).reshape(width, -1)
    stream = shuffled(state["model.norm.weight"].shape[0], 1)
    for name, tensor in out.items():
        if "o_proj" in name or "down_proj" in name or tensor.dim() == 1:
            out[name] = tensor[stream]
        else:
            out[name] = tensor[:, stream]
    return {n: t.contiguous() for n, t in out.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("matching")
    for seed, name in enumerate(("base", "one")):
        ZOO["llama"].make_model(seed).save_pretrained(root / name)
    model = ZOO["llama"].make_model(0)
    model.load_state_dict(moved_llama(dict(model.state_dict()), 3, 2, 2, 8))
    model.save_pretrained(root / "moved")
    for name, seed in (("bert", 0), ("bert-one", 1)):
        ZOO["bert"].make_model(seed).save_pretrained(root / name)
    return root


def test_a_copy_in_another_order_is_found_again(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder)
    base, other = load_file("base/model.safetensors"), load_file("moved/model.safetensors")
    assert not torch.equal(base["lm_head.weight"], other["lm_head.weight"])
    for t in (1, 0.5):
        result = api.compile(HEAD + f'merge weight_matching(t = {t}) of moved\nemit transformers to "{tmp_path}/out{t}"\n')
        assert all(c["ok"] for c in result.certificates)
        claim = next(c for c in result.certificates if c["claim"] == "moved in the model's order = moved")
        assert claim["max_abs_error"] < 1e-5
        got = load_file(tmp_path / f"out{t}/model.safetensors")
        assert all(torch.equal(got[n], base[n]) for n in base)
    assert "-> 1.0000" in result.plan.render_text() and "distance" in result.plan.render_text()
    plain = api.compile(HEAD + f'merge linear of base, moved\nemit transformers to "{tmp_path}/plain"\n')
    assert plain.artifacts and not torch.equal(load_file(tmp_path / "plain/model.safetensors")["lm_head.weight"], base["lm_head.weight"])


def test_another_checkpoint_comes_closer_and_computes_what_it_did(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(folder)
    base, one = load_file("base/model.safetensors"), load_file("one/model.safetensors")
    for run in ("a", "b"):
        api.compile(HEAD + f'merge weight_matching(t = 1, seed = 3) of one\nemit transformers to "{tmp_path}/{run}"\n')
    got = load_file(tmp_path / "a/model.safetensors")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    # permutations change no singular value, and the two models no longer lie as far apart
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight", "model.embed_tokens.weight"):
        assert torch.allclose(torch.linalg.svdvals(got[name]), torch.linalg.svdvals(one[name]), atol=1e-5)
    distance = {k: sum(float((base[n] - m[n]).square().sum()) for n in base) for k, m in (("one", one), ("got", got))}
    assert distance["got"] < 0.85 * distance["one"]
    import transformers

    live = transformers.LlamaForCausalLM.from_pretrained("one", dtype=torch.float32)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.float32)
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float((live(ids).logits - again(ids).logits).abs().max()) < 1e-6


def test_axes_can_be_chosen_and_what_stays_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    spec = 'surg 1\nmodel "bert" as base\ncheckpoint one = load("bert-one")\n'
    plan = api.plan(spec + "merge weight_matching of one\n")
    facts = " / ".join(plan.steps[0].facts)
    assert "they are in the model's output" in facts and "heads (and values, keys inside)" in facts and "compile reads the weights" in facts
    result = api.compile(spec + "merge weight_matching(axes = [heads, head_dim]) of one on layers[0..1].attn\n")
    assert result.plan.ok
    for text, code in (
        ("merge weight_matching(axes = [width]) of one\n", "S0799"),
        ("merge weight_matching(axes = [depth]) of one\n", "S0250"),
        ("merge weight_matching(vocab = common) of one\n", "S0250"),
        ("merge weight_matching of one * 1, one * -1\n", "S0775"),
    ):
        assert [d.code for d in api.plan(spec + text).diagnostics if d.is_error] == [code]


class Net(nn.Module):
    """Two layers with a hidden one of four units."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out


def test_any_module_and_its_average_after_matching() -> None:
    net = Net(0)
    program = capture(net, (torch.ones(2, 3),))
    order = torch.tensor([2, 0, 3, 1])
    state = {n: t.detach().clone() for n, t in net.state_dict().items()}
    other = {"first.weight": state["first.weight"][order], "first.bias": state["first.bias"][order],
             "second.weight": state["second.weight"][:, order], "second.bias": state["second.bias"]}  # fmt: skip
    units = find_units(program, list(state), AXES).units
    assert [u.leaves[0].size for u in units] == [4]
    matching = Matching(program.dims, {}, list(state), state.__getitem__, other.__getitem__, units, 100, 0, lambda done, total: None)
    before, start = matching.distance(moved=True), matching.alignment()
    matching.run()
    end = matching.alignment()
    assert before > 0.1 and matching.distance(moved=True) == 0 and matching.done == 2
    assert start is not None and end is not None and start[1] < 0.9 and abs(end[1] - 1) < 1e-12
    for name, tensor in other.items():
        assert torch.equal(matching.moved(name, tensor), state[name])
        assert torch.equal((state[name] + matching.moved(name, tensor)) / 2, state[name])
    x = torch.randn(5, 3)
    plain = Net(0)
    plain.load_state_dict({n: (state[n] + other[n]) / 2 for n in state})
    assert float((plain(x) - net(x)).detach().abs().max()) > 1e-3


def test_orders_as_ranges() -> None:
    import numpy as np

    assert ranges(np.array([0, 1, 2])) == ((0, 3),)
    assert ranges(np.array([2, 0, 1, 5, 6, 3])) == ((2, 3), (0, 2), (5, 7), (3, 4))
