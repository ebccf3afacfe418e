"""Keys and values inserted in front of attentions, as folders of peft: what its cache can say, against peft itself, and what it cannot."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import surgery as api
from tests import test_adapter_pairs as pairs
from tests.adapter_world import stored_bases
from tests.test_adapter_kinds import apart
from tests.test_adapter_tokens import given
from tests.zoo import ZOO

peft = pytest.importorskip("peft")

BASE: dict[str, nn.Module] = {}
N = 5


def bases() -> dict[str, nn.Module]:
    """Grouped key heads, rotations of a part of each head and in some layers alone; learned positions of a decoder, of an encoder and of a decoder beside
    one; biases by distance."""
    import transformers

    small: dict[str, Any] = {
        "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    smol = transformers.SmolLM3Config(**small, num_hidden_layers=2, num_key_value_heads=1, no_rope_layers=[1, 0])
    return {
        "smol": transformers.SmolLM3ForCausalLM(smol),
        "phi": transformers.PhiForCausalLM(transformers.PhiConfig(**small, num_hidden_layers=1)),
        "llama": ZOO["llama"].make_model(num_hidden_layers=2),
        "bert": ZOO["bert"].make_model(num_hidden_layers=1),
        "gpt2": ZOO["gpt2"].make_model(n_layer=2),
        **pairs.bases(),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with stored_bases(tmp_path_factory, "prefix", bases, BASE) as folder:
        yield folder


def outputs(model: nn.Module, family: str) -> Tensor:
    """The first output at the real tokens."""
    if family in ("bart", "t5"):
        return pairs.outputs(model)
    with torch.no_grad():
        found: Tensor = model.eval()(**given(family))[0]
    return found[:, found.shape[1] - 9 :][given(family)["attention_mask"].bool()]


def theirs(family: str) -> Tensor:
    return outputs(peft.PeftModel.from_pretrained(copy.deepcopy(BASE[family]), "out"), family)


def emitted(text: str) -> tuple[nn.Module, dict[str, Any]]:
    """The module of a spec with other values in all that trains, its folder ``out``, and what the folder's config says."""
    made = api.compile(f'surg 1\n{text}emit torch to "trained"\n', force=True).module
    with torch.no_grad():
        for i, p in enumerate(p for p in made.parameters() if p.requires_grad):
            p.add_(0.8 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    api.save(made, "trained", force=True)
    done = api.compile('surg 1\nmodel "trained"\nemit peft to "out"\n', force=True)
    assert [c["ok"] for c in done.certificates if c["claim"] == "peft = program"] == [True]
    return made, json.loads(Path("out/adapter_config.json").read_text("utf-8"))


LOADED = 'adapter one = load("{}")\nmerge linear of one * 1\n'
HOWS = [
    ("llama", "reparametrise = true, width = 6", "layers[*].attn"),
    ("phi", "reparametrise = false", "layers[*].attn"),
    ("smol", "reparametrise = false", "layers[*].attn"),
    ("gpt2", "reparametrise = true, width = 6", "layers[*].attn"),
    ("bert", "reparametrise = false", "layers[*].attn"),
    ("bart", "reparametrise = false", "decoder.layers[*].attn"),
]


@pytest.mark.parametrize(("family", "how", "where"), HOWS)
def test_a_prefix_goes_to_peft_and_comes_back(world: Path, family: str, how: str, where: str) -> None:
    """Where positions are rotary its keys are turned to those that peft's cache gives to what follows; a table of positions goes along, further down."""
    made, config = emitted(f'model "{family}"\ninsert prefix(length = {N}, {how}) on {where} as mine\n')
    want = outputs(made, family)
    assert apart(theirs(family), want) <= 3e-6 < 1e-2 < apart(want, outputs(BASE[family], family))
    assert config["peft_type"] == "PREFIX_TUNING" and (config["modules_to_save"] is None) == (family in ("llama", "phi", "smol"))
    back = api.compile(f'surg 1\nmodel "{family}"\n{LOADED.format("out")}emit peft to "again"\n', force=True)
    assert apart(outputs(back.module, family), want) <= 3e-6
    first, second = (load_file(f"{n}/adapter_model.safetensors") for n in ("out", "again"))
    assert torch.equal(first["prompt_embeddings"], second["prompt_embeddings"])


def test_the_plan_says_that_positions_are_lost(world: Path) -> None:
    rows = BASE["gpt2"].config.n_positions  # type: ignore[union-attr]
    plan = api.plan(f'surg 1\nmodel "gpt2"\ninsert prefix(length = {N}) on layers[*].attn\nemit peft to "out"\n')
    assert any(f"the last {N} of {rows} positions cannot be used" in f for s in plan.steps for f in s.facts)
    long = api.plan(f'surg 1\nmodel "gpt2"\ninsert prefix(length = {rows}) on layers[*].attn\nemit peft to "out"\n').diagnostics[-1]
    assert long.code == "S0793" and f"nothing is left of {rows} positions" in long.message


def test_a_decoders_prefix_has_a_place_for_every_layer(world: Path) -> None:
    """peft reads every second layer of a file, so that two layers share one of those that it trained itself; ours, trained further, has twice as many."""
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(BASE["t5"]), pairs.KINDS[2]())
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_()
    model.save_pretrained("one")
    made, config = emitted(f'model "t5"\n{LOADED.format("one")}')
    want = outputs(made, "t5")
    assert apart(theirs("t5"), want) <= 3e-6 < 1e-2 < apart(want, outputs(BASE["t5"], "t5")) and config["num_layers"] == 4
    back = api.compile(f'surg 1\nmodel "t5"\n{LOADED.format("out")}').module
    assert apart(outputs(back, "t5"), want) <= 3e-6


def test_what_came_from_peft_to_an_encoder_goes_back_bit_for_bit(world: Path) -> None:
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(BASE["bert"]), peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=N))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_()
    model.save_pretrained("one")
    done = api.compile('surg 1\nmodel "bert"\nadapter one = load("one")\nmerge linear of one * 1\nemit peft to "out"\n', force=True)
    assert [c["ok"] for c in done.certificates if c["claim"] == "peft = program"] == [True]
    files = [Path(f, "adapter_model.safetensors").read_bytes() for f in ("one", "out")]
    assert files[0][8 + int.from_bytes(files[0][:8], "little") :] == files[1][8 + int.from_bytes(files[1][:8], "little") :]


def test_what_no_cache_can_say_is_refused(world: Path) -> None:
    """Biases by distance, which entries of a cache have; layers without one; the attentions of an encoder beside a decoder."""
    body = f"insert prefix(length = {N}, reparametrise = false) on "
    for text, words in (
        (f'model "t5"\n{body}decoder.layers[*].attn\n', "entry j of 5 gets the one of the distance"),
        (f'model "llama"\n{body}layers[0].attn\n', "stands at 1"),
        (f'model "bart"\n{body}encoder.layers[*].attn\n', "the decoder's own alone"),
        (f'model "bart"\n{body}decoder.layers[*].cross\n', "what the encoder made"),
        (f'model "t5"\n{body}decoder.layers[0].attn\n', "stands at 1"),
    ):
        found = api.plan(f'surg 1\n{text}emit peft to "no"\n').diagnostics[-1]
        assert found.code == "S0793" and words in found.message and found.help, (found.code, found.message)
