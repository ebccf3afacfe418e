"""Keys and values inserted in front of attentions, as folders of peft: where positions are rotary, and where they came from such a folder."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import surgery as api
from tests.adapter_world import stored_bases
from tests.test_adapter_kinds import apart
from tests.test_adapter_tokens import given
from tests.zoo import ZOO

peft = pytest.importorskip("peft")

BASE: dict[str, nn.Module] = {}
N = 5


def bases() -> dict[str, nn.Module]:
    """Grouped key heads, rotations of a part of each head, an encoder with learned positions."""
    return {
        "llama": ZOO["llama"].make_model(num_hidden_layers=2),
        "phi3": ZOO["phi3"].make_model(num_hidden_layers=1, partial_rotary_factor=0.5, sliding_window=None),
        "bert": ZOO["bert"].make_model(num_hidden_layers=1),
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with stored_bases(tmp_path_factory, "prefix", bases, BASE) as folder:
        yield folder


def outputs(model: nn.Module, family: str) -> Tensor:
    """The first output at the real tokens."""
    with torch.no_grad():
        found: Tensor = model.eval()(**given(family))[0]
    return found[:, found.shape[1] - 9 :][given(family)["attention_mask"].bool()]


def theirs(family: str) -> Tensor:
    return outputs(peft.PeftModel.from_pretrained(copy.deepcopy(BASE[family]), "out"), family)


@pytest.mark.parametrize(("family", "how"), [("llama", "reparametrise = true, width = 6"), ("phi3", "reparametrise = false")])
def test_a_prefix_of_a_rotary_model_goes_to_peft(world: Path, family: str, how: str) -> None:
    """Its keys are turned to the positions that peft's cache gives to what follows; trained values, plain and from a network."""
    made = api.compile(
        f'surg 1\nmodel "{family}"\ninsert prefix(length = {N}, {how}) on layers[*].attn as mine\nemit torch to "trained"\n', force=True
    ).module
    with torch.no_grad():
        for i, p in enumerate(p for p in made.parameters() if p.requires_grad):
            p.add_(0.8 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    api.save(made, "trained", force=True)
    done = api.compile('surg 1\nmodel "trained"\nemit peft to "out"\n', force=True)
    assert [c["ok"] for c in done.certificates if c["claim"] == "peft = program"] == [True]
    want = outputs(made, family)
    assert apart(theirs(family), want) <= 3e-6 < 1e-2 < apart(want, outputs(BASE[family], family))
    assert json.loads(Path("out/adapter_config.json").read_text("utf-8"))["peft_type"] == "PREFIX_TUNING"
    if how.startswith("reparametrise = false"):
        back = api.compile(f'surg 1\nmodel "{family}"\nadapter one = load("out")\nmerge linear of one * 1\n')
        assert apart(outputs(back.module, family), want) <= 3e-6


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
    """Learned positions, which a cache would move; layers without one; another adapter beside it."""
    body = f"insert prefix(length = {N}, reparametrise = false) on "
    for text, words in (
        (f'model "bert"\n{body}layers[*].attn\n', "moves the positions"),
        (f'model "llama"\n{body}layers[0].attn\n', "stands at 1"),
        (f'model "llama"\n{body}layers[*].attn\nadapt lora(rank = 1) on layers[*].attn.q\n', "another kind"),
    ):
        found = api.plan(f'surg 1\n{text}emit peft to "no"\n').diagnostics[-1]
        assert found.code == "S0793" and words in found.message, found.message
