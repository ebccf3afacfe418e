"""Virtual tokens trained by peft (prompts, p-tuning, prefixes) in front of our models, and ours as folders that peft loads."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery as api
from surgery.core.diagnostics import SurgeryError
from tests import adapters
from tests.adapter_world import stored_bases, trained_a_little
from tests.test_adapter_kinds import apart
from tests.zoo import ZOO

peft = pytest.importorskip("peft")

BASE: dict[str, nn.Module] = {}
N = 4


def bases() -> dict[str, nn.Module]:
    import transformers

    small = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99, "max_position_embeddings": 64}
    config = transformers.Gemma2Config(**small, num_hidden_layers=1, num_key_value_heads=2, head_dim=8, sliding_window=16, pad_token_id=0)
    return {
        "gpt2": ZOO["gpt2"].make_model(n_layer=2),
        "bert": ZOO["bert"].make_model(num_hidden_layers=1),
        "gemma2": transformers.Gemma2ForCausalLM(config),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with stored_bases(tmp_path_factory, "tokens", bases, BASE) as folder:
        yield folder


def given(family: str) -> dict[str, Tensor]:
    """Ids with a padded row: left for decoders, right for encoders."""
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, slice(0, 3) if family != "bert" else slice(6, 9)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: nn.Module, family: str) -> Tensor:
    """The first output at the real tokens."""
    with torch.no_grad():
        found: Tensor = model.eval()(**given(family))[0]
    return found[:, found.shape[1] - 9 :][given(family)["attention_mask"].bool()]


def trained(name: str, family: str, config: Any) -> Tensor:
    """A folder that peft wrote, with values in all that trains; what peft computes with it."""
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(BASE[family]), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.4 * torch.randn(p.shape))
    model.save_pretrained(name)
    return theirs(name, family)


def theirs(name: str, family: str) -> Tensor:
    return outputs(peft.PeftModel.from_pretrained(copy.deepcopy(BASE[family]), name), family)


def spec(family: str, more: str = "", merge: str = "merge linear of one * 1") -> str:
    return f'surg 1\nmodel "{family}"\nadapter one = load("one")\n{merge}\n{more}'


LM: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": N}
KINDS: list[tuple[str, Any]] = [
    ("gpt2", lambda: peft.PromptTuningConfig(**LM)),
    ("gpt2", lambda: peft.PromptEncoderConfig(**LM, encoder_hidden_size=8)),
    ("gpt2", lambda: peft.PromptEncoderConfig(**LM, encoder_hidden_size=8, encoder_reparameterization_type="LSTM")),
    ("gpt2", lambda: peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2])),
    ("gpt2", lambda: peft.PrefixTuningConfig(**LM)),
    ("gpt2", lambda: peft.PrefixTuningConfig(**LM, prefix_projection=True, encoder_hidden_size=8)),
    ("gpt2", lambda: peft.CartridgeConfig(**LM)),
    ("gemma2", lambda: peft.PromptTuningConfig(**LM)),  # multiplies its embeddings itself
    ("gemma2", lambda: peft.PrefixTuningConfig(**LM)),  # fewer key heads than heads
    ("bert", lambda: peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=N)),
    ("bert", lambda: peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=N)),
]


@pytest.mark.parametrize(("family", "config"), KINDS)
def test_loads_what_peft_trained(world: Path, family: str, config: Any) -> None:
    want = trained("one", family, config())
    assert apart(want, outputs(BASE[family], family)) > 1e-3
    made = api.compile(spec(family)).module
    assert apart(outputs(made, family), want) <= 2e-6
    assert all(".one." in f".{n}" for n, p in made.named_parameters() if p.requires_grad)


def test_the_prompt_of_one_task_of_several(world: Path) -> None:
    config = peft.MultitaskPromptTuningConfig(**LM, num_tasks=3, num_ranks=2, prompt_tuning_init="RANDOM")
    torch.manual_seed(0)  # peft draws what it begins with
    trained_ = peft.get_peft_model(copy.deepcopy(BASE["gpt2"]), config).eval()
    trained_a_little(trained_, 0.5)
    trained_.save_pretrained("one")
    given_ = given("gpt2")
    with torch.no_grad():
        want = trained_(**given_, task_ids=torch.tensor([1, 1]))[0][:, N:][given_["attention_mask"].bool()]
    made = api.compile('surg 1\nmodel "gpt2"\nadapter one = load("one", task = 1)\nmerge linear of one * 1\n').module
    assert apart(outputs(made, "gpt2"), want) <= 2e-6 < 1e-3 < apart(want, outputs(BASE["gpt2"], "gpt2"))
    assert code(spec("gpt2")).code == "S0782" and code(spec("gpt2").replace('load("one")', 'load("one", task = 3)')).code == "S0783"


def test_prompts_go_back_to_peft_and_folded_ones_as_a_prefix(world: Path) -> None:
    """What a folded prompt stores is what peft's cache starts with; a folder that comes and goes stays what it is."""
    text = f'surg 1\nmodel "gpt2"\ninsert prompt(length = {N}, std = 1) on embed.tokens as mine\n'
    live = api.compile(text + 'emit peft to "one"\nfold all\nemit peft to "two"\n', force=True)
    assert [c["ok"] for c in live.certificates if c["claim"] == "peft = program"] == [True, True]
    kinds = [json.loads(Path(n, "adapter_config.json").read_text("utf-8"))["peft_type"] for n in ("one", "two")]
    assert kinds == ["PROMPT_TUNING", "PREFIX_TUNING"]
    want = outputs(live.module, "gpt2")
    assert all(apart(theirs(n, "gpt2"), want) <= 2e-6 for n in ("one", "two")) and apart(want, outputs(BASE["gpt2"], "gpt2")) > 1e-3
    for name in ("one", "two"):
        api.compile(f'surg 1\nmodel "gpt2"\nadapter x = load("{name}")\nmerge linear of x * 1\nemit peft to "again"\n', force=True)
        assert load_file("again/adapter_model.safetensors").keys() == {"prompt_embeddings"}
        assert Path("again/adapter_model.safetensors").read_bytes() == Path(name, "adapter_model.safetensors").read_bytes()


def both(family: str) -> Tensor:
    """What peft computes with the two folders in ``both``, the way that the plan states."""
    under = peft.PeftModel.from_pretrained(copy.deepcopy(BASE[family]), "both/weights").merge_and_unload()
    return outputs(peft.PeftModel.from_pretrained(under, "both/tokens"), family)


def test_stands_beside_a_low_rank_adapter_of_any_factor(world: Path) -> None:
    """Both changes at once: peft's prompt on a base into which the other adapter is folded; and as two folders that peft loads one after the other."""
    trained("one", "bert", KINDS[-2][1]())
    adapters.write(world / "low", adapters.low(adapters.bert("value", layers=1), 4))
    body = 'surg 1\nmodel "bert"\nadapter one = load("one")\nadapter low = load("low")\n'
    made = api.compile(body + 'merge linear of one * 1, low * 0.5\nemit peft to "both"\n', force=True)
    api.compile('surg 1\nmodel "bert"\nadapter low = load("low")\nmerge linear of low * 0.5\nfold all\nemit transformers to "folded"\n')
    folded: Any = type(BASE["bert"]).from_pretrained("folded")  # type: ignore[attr-defined]
    want = outputs(peft.PeftModel.from_pretrained(folded, "one"), "bert")
    assert apart(outputs(made.module, "bert"), want) <= 3e-6 and apart(both("bert"), want) <= 3e-6
    assert next(c for c in made.certificates if c["claim"] == "peft = program")["ok"]
    assert any("merge_and_unload" in f for s in made.plan.steps for f in s.facts)
    with pytest.raises(SurgeryError) as caught:
        api.plan(body.replace('"one"', '"both"') + "merge linear of one * 1\n")
    assert 'load("both/tokens")' in caught.value.diagnostics[0].help[0]
    again = body.replace('"one"', '"both/tokens"').replace('"low"', '"both/weights"') + "merge linear of one * 1, low * 1\n"
    assert apart(outputs(api.compile(again).module, "bert"), want) <= 3e-6 and not api.plan(again).diagnostics


@pytest.mark.parametrize("tokens", ["prefix(length = 4, reparametrise = false) on layers[*].attn", "prompt(length = 4) on embed.tokens"])
def test_tokens_and_weights_that_were_trained_here_go_to_two_folders(world: Path, tokens: str) -> None:
    """Fresh factors change nothing, so that the certificate stirs them; a bias that trains goes with the weights, a table of positions with the tokens."""
    text = f'surg 1\nmodel "gpt2"\ninsert {tokens}\nadapt lora(rank = 2) on layers[*].attn.o\nunfreeze biases on layers[0].ffn.up\n'
    made = api.compile(text + 'emit peft to "both"\nemit torch to "trained"\n', force=True)
    assert [c["ok"] for c in made.certificates if c["claim"] == "peft = program"] == [True]
    with torch.no_grad():
        for i, p in enumerate(p for p in made.module.parameters() if p.requires_grad):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    api.save(made.module, "trained", force=True)
    api.compile('surg 1\nmodel "trained"\nemit peft to "both"\n', force=True)
    want = outputs(made.module, "gpt2")
    assert apart(both("gpt2"), want) <= 3e-6 < 1e-2 < apart(want, outputs(BASE["gpt2"], "gpt2"))
    mixed = text.replace("unfreeze biases on layers[0].ffn.up", "adapt dora(rank = 2) on layers[0].ffn.down")
    found = api.plan(mixed + 'emit peft to "no"\n').diagnostics[-1]
    assert found.code == "S0793" and "another kind" in found.message


def test_tokens_lose_the_features_that_a_cut_took(world: Path) -> None:
    trained("one", "bert", KINDS[-2][1]())
    made = api.compile(
        'surg 1\nmodel "bert"\nadapter one = load("one")\nprune width(ratio = 50%, score = magnitude)\nmerge linear of one * 1\n'
    )
    left = dict(made.module.named_parameters())
    table, now = BASE["bert"].embeddings.word_embeddings.weight, left["embeddings.word_embeddings.weight"]  # type: ignore[union-attr]
    kept = [next(i for i in range(32) if torch.equal(table[:, i], now[:, j])) for j in range(16)]
    assert torch.equal(left["one.embeddings"], load_file("one/adapter_model.safetensors")["prompt_embeddings"][:, kept])


def code(text: str) -> Any:
    return next(d for d in api.plan(text).diagnostics if d.code != "S0788")


def test_what_cannot_stand_in_front_says_why(world: Path) -> None:
    trained("one", "gpt2", KINDS[0][1]())
    trained("two", "gpt2", KINDS[4][1]())
    assert code(spec("gpt2", merge="merge linear of one * 0.5")).code == "S0786"
    both = 'surg 1\nmodel "gpt2"\nadapter one = load("one")\nadapter two = load("two")\n'
    assert code(both + "merge linear of one * 1, two * 1\n").code == "S0786"
    assert code(both + "merge linear of one * 1 as a\nmerge linear of two * 1 as b\n").code == "S0492"
    assert code(spec("gpt2", merge="merge ties of one * 1")).code == "S0786"
    assert code(spec("gpt2", merge="merge linear of one * 1 on layers[*]")).code == "S0791"
    config = json.loads(Path("one/adapter_config.json").read_text("utf-8"))
    tensors = load_file("one/adapter_model.safetensors")
    bad: list[tuple[dict[str, Any], dict[str, Tensor], str, str]] = [
        ({"num_virtual_tokens": 3}, {}, "S0783", "3 virtual tokens"),
        ({"token_dim": "x"}, {}, "S0783", "`token_dim`"),
        ({"num_transformer_submodules": 2}, {}, "S0783", "`num_transformer_submodules` is 2"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 3}, {}, "S0782", "3 tasks"),
        ({"peft_type": "PREFIX_TUNING", "prompt_tuning_init": None}, {}, "S0783", "keys and values of 2 layers"),
        ({"sideways": True}, {}, "S0782", "`sideways`"),
        ({"token_dim": 8}, {"prompt_embeddings": tensors["prompt_embeddings"][:, :8].contiguous()}, "S0785", "8 features"),
        ({}, {"prompt_embeddings": torch.zeros(4, 32, dtype=torch.long)}, "S0783", "int64"),
        ({}, {"prompt_embeddings": torch.zeros(4)}, "S0783", "shape"),
        ({}, {"lost": torch.zeros(4)}, "S0783", "no `prompt_embeddings`"),
    ]
    for change, values, number, words in bad:
        Path("one/adapter_config.json").write_text(json.dumps({**config, **change}), "utf-8")
        save_file(values or tensors, "one/adapter_model.safetensors")
        found = code(spec("gpt2"))
        assert found.code == number and words in found.message, (found.code, found.message, words)
    Path("one/adapter_config.json").write_text(json.dumps(config), "utf-8")
    save_file({"prompt_embeddings": tensors["prompt_embeddings"] * float("nan")}, "one/adapter_model.safetensors")
    with pytest.raises(SurgeryError) as caught:
        api.compile(spec("gpt2"))
    assert caught.value.diagnostics[0].code == "S0787"
