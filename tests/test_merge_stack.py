"""``merge stack`` against models that are built by hand from the same layers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers

import surgery as api
from tests.zoo import ZOO

HEAD = 'surg 1\nmodel "base" as base\ncheckpoint one = load("one")\n'
FAMILIES = {"llama": ("model.layers", "num_hidden_layers"), "bert": ("encoder.layer", "num_hidden_layers"), "gpt2": ("h", "n_layer")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of each family."""
    root = tmp_path_factory.mktemp("stacks")
    for family in FAMILIES:
        for seed, name in enumerate(("base", "one")):
            ZOO[family].make_model(seed).save_pretrained(root / family / name)
    return root


def container(family: str, model: torch.nn.Module) -> str:
    return next(n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and n.endswith(FAMILIES[family][0]))


def by_hand(folder: Path, family: str, layers: list[tuple[str, int]]) -> torch.nn.Module:
    """The class with so many layers, filled tensor by tensor: ends of the first and the last checkpoint, layers as listed."""
    cls = getattr(transformers, ZOO[family].architecture)
    models = {n: cls.from_pretrained(folder / n, dtype=torch.float32) for n in ("base", "one")}
    config = ZOO[family].make_config()
    setattr(config, FAMILIES[family][1], len(layers))
    torch.manual_seed(9)
    out = cls._from_config(config, dtype=torch.float32).eval()
    place = container(family, out)
    late = re.compile(r"(^|\.)(norm|ln_f|lm_head|pooler)\.")
    state = {}
    for name, value in out.state_dict().items():
        found = re.fullmatch(re.escape(place) + r"\.(\d+)\.(.*)", name)
        if found:
            source, j = layers[int(found[1])]
            state[name] = models[source].state_dict()[f"{place}.{j}.{found[2]}"]
        else:
            tied = "lm_head" in name and out.config.tie_word_embeddings
            source = layers[-1][0] if late.search(name) and not tied else layers[0][0]
            state[name] = models[source].state_dict()[name]
        assert value.shape == state[name].shape
    out.load_state_dict(state)
    return out


def stacked(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch, out: Path) -> tuple[api.Result, torch.nn.Module]:
    monkeypatch.chdir(folder)
    result = api.compile(HEAD + text + f'emit torch to "{out}"\n')
    assert all(c["ok"] for c in result.certificates)
    return result, api.load(out).eval()


@pytest.mark.parametrize(
    ("family", "text", "layers"),
    [
        ("llama", "slices = [layers[0..1], layers[1..2]]) of base, one", [("base", 0), ("base", 1), ("one", 1), ("one", 2)]),
        ("bert", "slices = layers[0..2, 1..2]) of base", [("base", 0), ("base", 1), ("base", 2), ("base", 1), ("base", 2)]),
        ("gpt2", "slices = [layers[-1], layers[0]]) of one, base", [("one", 2), ("base", 0)]),
    ],
)  # fmt: skip
def test_it_is_the_model_made_by_hand(
    folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str, text: str, layers: list[tuple[str, int]]
) -> None:
    result, module = stacked(folders / family, f"merge stack({text}\n", monkeypatch, tmp_path / "a")
    live = by_hand(folders / family, family, layers)
    assert len(result.plan.steps[0].sites) == len(layers)
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    with torch.no_grad():
        want, got = live(input_ids=ids, attention_mask=mask)[0], module(input_ids=ids, attention_mask=mask)[0]
    assert torch.equal(want, got)
    if family != "bert":
        more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        expected = live.generate(ids, attention_mask=torch.ones_like(ids), **more)
        for cached in (True, False):
            assert torch.equal(module.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cached, **more), expected)
    before = sum(p.numel() for p in by_hand(folders / family, family, [("base", i) for i in range(3)]).parameters())
    assert result.plan.totals is not None and result.plan.totals.params_before == before
    assert result.plan.totals.params_after == sum(p.numel() for p in live.parameters())
    step = result.plan.steps[0]
    assert sum(s.added for s in step.sites) - sum(s.removed for s in step.sites) == result.plan.totals.params_after - before


def test_scaled_copies_change_nothing_and_the_checkpoint_loads(folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Depth up-scaling as an identity, emitted as a plain checkpoint; all layers of one model are that model."""
    monkeypatch.chdir(folders / "llama")
    out = tmp_path / "deep"
    text = "merge stack(slices = [layers[0..2, 1..2]], scale = {0..2: 1, 3..4: 0}) of base\nexpect layers == 5\nexpect same_output(at = init)\n"
    result = api.compile(HEAD + text.replace("expect same_output(at = init)\n", "") + f'emit transformers to "{out}"\n')
    assert {c["claim"] for c in result.certificates} == {"stacked = the layers in this order", "from_pretrained = program"}
    deep = transformers.LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    base = transformers.LlamaForCausalLM.from_pretrained("base", dtype=torch.float32)
    assert deep.config.num_hidden_layers == 5
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert float((deep(ids).logits - base(ids).logits).abs().max()) <= 1e-6
    whole = api.compile(HEAD + f'merge stack of base\nemit transformers to "{tmp_path}/same"\n')
    assert all(c["max_abs_error"] == 0 for c in whole.certificates)
    same = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "same", dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), base.state_dict().values(), strict=True))


def test_copies_may_share_tensors_and_later_lines_see_the_new_layers(
    folders: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (
        "merge stack(slices = layers[0..2, 0..2], share = true) of base as deep\n"
        "prune layers(count = 1, score = magnitude) on layers[0..1]\nadapt lora(rank = 2) on layers[*].attn.q\nexpect layers == 5\n"
    )
    monkeypatch.chdir(folders / "llama")
    plain = api.plan(HEAD + "merge stack(slices = layers[0..2, 0..2], share = true) of base as deep\nexpect layers == 6 \n")
    assert plain.ok and plain.totals is not None and plain.totals.params_after == plain.totals.params_before
    result = api.plan(HEAD + text.replace(", share = true", ""))
    assert result.ok, result.diagnostics
    text = HEAD + "prune ffn(ratio = 25%) on layers[0].ffn\nmerge stack(slices = layers[0..1, 0]) of base\n"
    result = api.compile(text + f'emit torch to "{tmp_path}/ragged"\n')
    module = api.load(tmp_path / "ragged")
    assert [module.get_submodule(f"model.layers.{i}.mlp.up_proj").out_features for i in range(3)] == [48, 64, 48]
    shared, _ = stacked(folders / "llama", "merge stack(slices = layers[0..1, 0], share = true) of base\n", monkeypatch, tmp_path / "s")
    deep = shared.module
    assert deep.get_parameter("model.layers.2.mlp.up_proj.weight") is deep.get_parameter("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("merge stack(slices = [layers[0..9]]) of base\n", "S0779"),
        ("merge stack(slices = [layers[0], layers[1]]) of base\n", "S0779"),
        ("merge stack(slices = [decoder.layers[0]]) of base\n", "S0779"),
        ("merge stack(slices = layers) of base\n", "S0220"),
        ("merge stack of base on layers[0]\n", "S0779"),
        ("merge stack(slices = [3]) of base\n", "S0220"),
        ("merge stack of base * 2\n", "S0775"),
        ("merge stack(slices = layers[0..1], scale = [1, 1, 1]) of base\n", "S0307"),
        ("adapt lora(rank = 2) on layers[0].attn.q\nmerge stack of base, base\n", "S0799"),
    ],
)  # fmt: skip
def test_what_cannot_be_stacked(folders: Path, monkeypatch: pytest.MonkeyPatch, text: str, code: str) -> None:
    monkeypatch.chdir(folders / "llama")
    try:
        found = [d.code for d in api.plan(HEAD + text).diagnostics if d.is_error]
    except api.SurgeryError as exc:
        found = [d.code for d in exc.diagnostics]
    assert found == [code]
