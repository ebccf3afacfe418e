"""Adapters from peft, merged, carried over cuts and given back to peft, against peft itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery as api
from surgery.core.diagnostics import SurgeryError
from tests import adapters, fixtures
from tests.caching import capture_cache
from tests.zoo import ZOO

peft = pytest.importorskip("peft")

HEAD = 'surg 1\nmodel "bert" as base\n' + "".join(f'adapter {n} = load("{n}")\n' for n in ("news", "legal", "dora", "full"))
CUT = "prune heads(ratio = 50%, score = random) on layers[*].attn\nprune layers(count = 1, score = random) on layers keep layers[0], layers[2]\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with tiny models and adapters, and the working directory while the module runs."""
    folder = tmp_path_factory.mktemp("adapters")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("SURGERY_CACHE", str(capture_cache(tmp_path_factory)))
    for family in ("bert", "gpt2", "resnet"):
        fixtures.save(ZOO[family].make_model(), folder / family)
    for name in ("news", "legal", "dora"):
        adapters.example(name, folder)
    trained("full", "bert", r=2, target_modules=["query"], bias="lora_only", modules_to_save=["LayerNorm"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield folder
    patch.undo()


def base(family: str) -> nn.Module:
    cls: Any = type(ZOO[family].make_model())
    model: nn.Module = cls.from_pretrained(family).eval()
    return model


def trained(name: str, family: str, **config: Any) -> None:
    """An adapter that peft made and saved, with small values in all that trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = peft.get_peft_model(base(family), peft.LoraConfig(**config))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape))
        model.save_pretrained(name)


def outputs(model: nn.Module, family: str = "bert") -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**ZOO[family].inputs(2, 9))[0]
    return found


def theirs(*names: str, family: str = "bert") -> nn.Module:
    first, *more = names
    model = peft.PeftModel.from_pretrained(base(family), first, adapter_name=f"the {Path(first).name}")
    for name in more:
        model.load_adapter(name, adapter_name=f"the {name}")
    found: nn.Module = model
    return found


def ours(text: str, head: str = HEAD) -> Any:
    return api.compile(head + text)


def apart(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value where that is above 1."""
    return float((a.double() - b.double()).abs().max() / b.abs().max().clamp_min(1))


# ------------------------------------------------------------------ loading and merging

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("bert", {"r": 2, "target_modules": ["query", "word_embeddings"]}),
    ("bert", {"r": 2, "target_modules": ["query", "word_embeddings"], "use_dora": True, "use_rslora": True}),
    ("bert", {"r": 4, "target_modules": ["query", "value"], "rank_pattern": {"layer.0.attention.self.query": 3}, "alpha_pattern": {"value": 5}}),
    ("bert", {"r": 4, "target_modules": ["query"], "init_lora_weights": "pissa"}),
    ("bert", {"r": 2, "target_modules": ["query"], "lora_bias": True}),
    ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "layers_to_transform": [0, 2]}),
    ("resnet", {"r": 2, "target_modules": ".*convolution", "use_dora": True}),
]  # fmt: skip


@pytest.mark.parametrize("family, config", KINDS)
def test_loads_what_peft_trained_and_gives_it_back(world: Path, family: str, config: dict[str, Any]) -> None:
    trained("one", family, **config)
    want = outputs(theirs("one", family=family), family)
    assert apart(want, outputs(base(family), family)) > 1e-4
    made = ours(f'surg 1\nmodel "{family}"\nadapter one = load("one")\nmerge linear of one * 1\nemit peft to "given/{family}"\n', "")
    assert apart(outputs(made.module, family), want) <= 2e-6
    claim = next(c for c in made.certificates if c["claim"] == "peft = program")
    assert claim["ok"] and claim["max_abs_error"] <= 2e-6 * max(1.0, float(want.abs().max()))
    assert apart(outputs(theirs(f"given/{family}", family=family), family), want) <= 2e-6
    assert all(p.requires_grad for n, p in made.module.named_parameters() if ".one" in n)


def test_one_adapter_with_factor_one_is_kept_as_it_is(world: Path) -> None:
    """Also biases and modules that were trained whole; the merge is selectable and folds."""
    made = ours("merge linear of full * 1 as it\nfold all on @it\nexpect same_output(at = fold) within 1e-5\n")
    assert apart(outputs(made.module), outputs(theirs("full"))) <= 2e-6
    stored = load_file("full/adapter_model.safetensors")
    state = made.module.state_dict()
    for key in ("embeddings.LayerNorm.weight", "encoder.layer.1.output.LayerNorm.bias"):
        assert torch.equal(state[key], stored[adapters.PREFIX + key])
    made = ours("merge cat of dora * 1\n")
    state, stored = made.module.state_dict(), load_file("dora/adapter_model.safetensors")
    path = adapters.BERT.format(1, "query")
    for mine, key in (("A", "lora_A.weight"), ("B", "lora_B.weight"), ("magnitude", "lora_magnitude_vector")):
        assert torch.equal(state[f"{path}.dora.{mine}"], stored[f"{adapters.PREFIX}{path}.{key}"])


def test_agrees_with_add_weighted_adapter(world: Path) -> None:
    names, weights = ("news", "second"), (0.7, -0.3)
    adapters.write(Path("second"), adapters.low(adapters.bert("query", "key"), 4, seed=9), lora_alpha=6)
    head = HEAD + 'adapter second = load("second")\n'
    ties = {"density": 0.5, "majority_sign_method": "total"}
    for kind, more, method in (
        ("cat", {}, "cat"), ("svd", {"svd_rank": 3}, "svd(rank = 3)"), ("linear", {}, "linear(factorwise = true)"),
        ("svd", {"svd_rank": 3, "svd_clamp": 0.9}, "svd(rank = 3, clamp = 90%)"),
        ("ties", ties, "ties(density = 50%, trim = tensor, factorwise = true)"),
        ("ties_svd", {**ties, "svd_rank": 5}, "ties(density = 50%, trim = tensor, rank = 5)"),
    ):  # fmt: skip
        model = theirs(*names)
        model.add_weighted_adapter([f"the {n}" for n in names], list(weights), "merged", kind, **more)
        model.set_adapter("merged")
        text = f"merge {method} of news * {weights[0]}, second * {weights[1]}\n"
        assert apart(outputs(ours(text, head).module), outputs(model)) <= 5e-6, method


def exact(weights: dict[str, float]) -> nn.Module:
    """The base with the weighted changes of adapters in its weights."""
    found, start = base("bert"), base("bert").state_dict()
    state = found.state_dict()
    for name, weight in weights.items():
        for key, value in theirs(name).merge_and_unload().state_dict().items():
            state[key] += weight * (value - start[key])
    return found


def test_peft_scales_a_merge_twice_where_the_first_adapter_is_rslora(world: Path) -> None:
    """peft copies ``use_rslora`` into the merged adapter, whose scale is then the root of its rank; here it is 1."""
    want = outputs(exact({"legal": 0.5, "news": 0.5}))
    model = theirs("legal", "news")
    model.add_weighted_adapter(["the legal", "the news"], [0.5, 0.5], "merged", "cat")
    model.set_adapter("merged")
    assert apart(outputs(model), want) > 0.1
    assert apart(outputs(ours("merge cat of legal * 0.5, news * 0.5\n").module), want) <= 5e-6


def test_sums_are_exact_for_all_kinds_and_by_layer(world: Path) -> None:
    made = ours("merge linear of news * 0.5, full * -0.5\nmerge cat of legal * 0.5\n")
    claims = [c for c in made.certificates if c["claim"] == "merged = weighted sum"]
    assert len(claims) == 2 and all(c["ok"] and c["max_abs_error"] <= 5e-6 for c in claims)
    want = outputs(exact({"news": 0.5, "full": -0.5}))
    assert apart(outputs(ours("merge linear of news * 0.5, full * -0.5\n").module), want) <= 5e-6
    want = outputs(exact({"news": 0.5, "dora": 0.5}))

    assert apart(outputs(ours("merge svd(rank = full) of news * 0.5, dora * 0.5\n").module), want) <= 5e-6
    made = ours("merge linear(weights = [[0, 0, 1], {0..1: 0, 2: 1}]) of news, legal\n")
    want = outputs(ours("merge linear of news, legal on layers[2]\n").module)
    assert apart(outputs(made.module), want) <= 1e-6
    plain = outputs(ours("merge linear of news * 0.25, legal * 0.75\n").module)
    assert apart(outputs(ours("merge linear(normalize = true) of news, legal * 3\n").module), plain) <= 1e-6


def test_a_selector_restricts_and_says_what_it_leaves(world: Path) -> None:
    made = ours("merge linear of news * 1 on layers[1].attn.q as it\n")
    assert [a for a in made.module.state_dict() if ".it." in a] == [f"{adapters.BERT.format(1, 'query')}.it.{t}" for t in "AB"]
    facts = made.plan.steps[0].facts
    assert facts == ("left out by the selector: 5 parts of news, layers[0, 2].attn.q, layers[0..2].attn.v",)


def test_the_part_of_a_fused_projection(world: Path) -> None:
    adapters.write(Path("fused"), adapters.low([f"transformer.h.{i}.attn.c_attn" for i in range(3)], 4, out=96))
    head = 'surg 1\nmodel "gpt2"\nadapter fused = load("fused")\n'
    whole = ours("merge linear of fused * 1 on layers[*].attn.{q, k, v}\n", head)
    assert apart(outputs(whole.module, "gpt2"), outputs(theirs("fused", family="gpt2"), "gpt2")) <= 2e-6
    some = ours('merge linear of fused * 1 on layers[*].attn.v\nemit peft to "values"\n', head)
    given = load_file("values/adapter_model.safetensors")
    for i in range(3):
        key = f"{adapters.PREFIX}transformer.h.{i}.attn.c_attn.lora_B.weight"
        old = load_file("fused/adapter_model.safetensors")[key]
        assert torch.equal(given[key][64:], old[64:]) and not given[key][:64].any()
    assert apart(outputs(some.module, "gpt2"), outputs(theirs("values", family="gpt2"), "gpt2")) <= 2e-6


# ------------------------------------------------------------------ over cuts


def test_carried_over_a_cut_is_cut_along(world: Path) -> None:
    """In one spec and in a second one on the artifact, DoRA's magnitudes and modules trained whole included: bit for bit."""
    both = "merge linear of dora * 1\nmerge linear of full * 1\nmerge linear of news * 0.5\n"
    ours(CUT + 'emit torch to "pruned"\n')
    want = ours(both + CUT).module.state_dict()
    one, two = ours(CUT + both), ours(both, HEAD.replace('"bert"', '"pruned"'))
    for made in (one, two):
        state = made.module.state_dict()
        assert state.keys() == want.keys()
        assert all(torch.equal(state[n], want[n]) for n in want)
        told = [f for s in made.plan.steps if s.verb == "merge" for f in s.facts]
        assert "news was trained before the cut and is carried over" in told
        assert any(f.startswith("2 parts of news went with what was dropped: encoder.layer.1.") for f in told)
    # the artifact of the artifact remembers the first model, too
    api.compile('surg 1\nmodel "pruned"\nprune ffn(ratio = 50%, score = magnitude) on layers[*].ffn\nemit torch to "twice"\n')
    adapters.write(Path("wide"), adapters.low(["encoder.layer.2.output.dense"], 4, inp=64))
    made = api.compile('surg 1\nmodel "twice"\nadapter wide = load("wide")\nmerge linear of wide * 1\n')
    assert made.module.get_parameter("encoder.layer.1.output.dense.wide.A").shape == (4, 32)


def test_inputs_of_a_magnitude_need_the_weight_before_the_cut(world: Path) -> None:
    adapters.write(
        Path("down"), adapters.low([f"encoder.layer.{i}.output.dense" for i in range(3)], 2, inp=64, magnitude=True), r=2, use_dora=True
    )
    head, prune = 'surg 1\nmodel "bert"\nadapter down = load("down")\n', "prune ffn(ratio = 50%, score = magnitude) on layers[*].ffn\n"
    want = ours("merge linear of down * 1\n" + prune, head).module.state_dict()
    got = ours(prune + "merge linear of down * 1\n", head).module.state_dict()
    assert all(torch.equal(got[n], want[n]) for n in want)
    api.compile(f'surg 1\nmodel "bert"\n{prune}emit torch to "narrow"\n')
    with pytest.raises(SurgeryError) as caught:
        ours("merge linear of down * 1\n", head.replace("bert", "narrow"))
    assert caught.value.diagnostics[0].code == "S0789" and "magnitude" in caught.value.diagnostics[0].message


# ------------------------------------------------------------------ to peft


def test_every_change_goes_to_peft(world: Path) -> None:
    """Several adapters on a layer, methods that peft has no word for, biases and norms that train, a trained artifact."""
    for text in (
        "adapt lora(rank = 2) on layers[*].attn.q\nadapt rslora(rank = 3) on layers[*].attn.{q, v} as more\n",
        "adapt splora(rank = 2) on layers[*].attn.q\n",
        "adapt bitfit on layers[*]\n",
        "adapt dora(rank = 2) on layers[*].ffn.up\nunfreeze norms on layers[1]\n",
    ):
        made = api.compile(f'surg 1\nmodel "bert"\n{text}emit peft to "to"\n', force=True)
        assert next(c for c in made.certificates if c["claim"] == "peft = program")["ok"]
        module = made.module
        assert apart(outputs(module), outputs(theirs("to"))) <= 2e-6
        names = set(load_file("to/adapter_model.safetensors"))
        assert not any("lora" in n for n in names) if "bitfit" in text else names
    api.compile('surg 1\nmodel "bert"\nadapt pissa(rank = 2, alpha = 4) on layers[*].attn.q\nemit torch to "started"\n')
    module = api.load("started")
    with torch.no_grad():
        for n, p in module.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    want = outputs(module)
    api.save(module, "learned")
    made = api.compile('surg 1\nmodel "learned"\nemit peft to "principal"\n')
    assert apart(outputs(theirs("principal")), want) <= 1e-5  # peft takes the principal part out of the base again


def test_half_precision_and_owners(world: Path) -> None:
    text = 'surg 1\nmodel "bert"\nadapt lora(rank = 2) on layers[*].attn.q\nemit peft(dtype = bf16) to "mine"\n'
    Path("mine.surg").write_text(text)
    api.compile("mine.surg")
    first = Path("mine/adapter_model.safetensors").read_bytes()
    assert {t.dtype for t in load_file("mine/adapter_model.safetensors").values()} == {torch.bfloat16}
    api.compile("mine.surg")  # its own output may be replaced, with the same bytes
    assert Path("mine/adapter_model.safetensors").read_bytes() == first
    Path("other.surg").write_text(text)
    with pytest.raises(SurgeryError) as caught:
        api.compile("other.surg")
    assert caught.value.diagnostics[0].code == "S0803"


# ------------------------------------------------------------------ bad input


def test_bad_adapters_leave_nothing_behind(world: Path) -> None:
    tensors = adapters.low(adapters.bert("query"), 4)
    for name, change, code in (
        ("pickled", None, "S0705"), ("cut", {"lora_A": torch.zeros(0)}, "S0783"), ("torn", {}, "S0783"), ("alora", {}, "S0782"),
        ("olora", {}, "S0782"), ("infinite", {"lora_B": torch.full((32, 4), float("inf"))}, "S0787"),
    ):  # fmt: skip
        path = Path("bad") / name
        config = {"alora": {"alora_invocation_tokens": [1]}, "olora": {"init_lora_weights": "olora"}}.get(name, {})
        mine = {k: next((v for part, v in (change or {}).items() if part in k), t) for k, t in tensors.items()}
        if name == "torn":
            mine = {k: t for k, t in mine.items() if "lora_A" in k}
        adapters.write(path, mine, **config)
        if name == "pickled":
            (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
        with pytest.raises(SurgeryError) as caught:
            api.compile(f'surg 1\nmodel "bert"\nadapter bad = load("bad/{name}")\nmerge linear of bad * 1\nemit torch to "nothing"\n')
        assert [d.code for d in caught.value.diagnostics] == [code], name
        assert not Path("nothing").exists()


def test_an_adapter_of_surgery_knows_its_base(world: Path) -> None:
    """By the hash of config and tensor headers, which another checkpoint under the same name does not have."""
    api.compile('surg 1\nmodel "bert"\nadapt lora(rank = 2) on layers[*].attn.q\nemit peft to "known"\n')
    head = 'adapter known = load("known")\nmerge linear of known * 1\n'
    assert not api.plan('surg 1\nmodel "bert"\n' + head).diagnostics
    other = Path("other/bert")
    fixtures.save(ZOO["bert"].make_model(3).to(torch.bfloat16), other)
    assert [d.code for d in api.plan('surg 1\nmodel "other/bert"\n' + head).diagnostics] == ["S0788"]
    tensors = load_file("known/adapter_model.safetensors")
    save_file({k.replace("query", "quary"): t for k, t in tensors.items()}, "known/adapter_model.safetensors")
    (found,) = api.plan('surg 1\nmodel "bert"\n' + head).diagnostics
    assert found.code == "S0784" and any("did you mean `encoder.layer.0.attention.self.query`?" in h for h in found.help)
    save_file({k.replace("encoder", "bert.encoder"): t for k, t in tensors.items()}, "known/adapter_model.safetensors")
    (found,) = api.plan('surg 1\nmodel "bert"\n' + head).diagnostics
    assert found.code == "S0784" and any("holds this one as `bert`" in h for h in found.help)
