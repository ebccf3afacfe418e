"""Virtual tokens that peft trained on an encoder with a decoder, in front of our programs of T5 and BART, against peft itself."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery as api
from surgery.train.switch import disabled
from tests.adapter_world import stored_bases, trained_a_little
from tests.test_adapter_kinds import apart

peft = pytest.importorskip("peft")

BASE: dict[str, nn.Module] = {}
N = 3
PAIR: dict[str, Any] = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": N}
HEAD = 'surg 1\nmodel "{}"\nadapter one = load("one")\nmerge linear of one * 1\n'


def bases() -> dict[str, nn.Module]:
    """BART multiplies its embeddings and adds learned positions; T5 has a bias of distances."""
    import transformers

    bart = transformers.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        vocab_size=60, max_position_embeddings=32, scale_embedding=True, init_std=0.3, pad_token_id=1, decoder_start_token_id=2, eos_token_id=2, bos_token_id=0,
        forced_eos_token_id=2,
    )  # fmt: skip
    t5 = transformers.T5Config(
        d_model=16, num_layers=2, num_heads=2, d_kv=8, d_ff=24, vocab_size=60, relative_attention_num_buckets=8, relative_attention_max_distance=12,
        initializer_factor=2.0, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return dict((("bart", transformers.BartForConditionalGeneration(bart)), ("t5", transformers.T5ForConditionalGeneration(t5))))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with stored_bases(tmp_path_factory, "pairs", bases, BASE) as folder:
        yield folder


def given() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    ids, heard = torch.randint(3, 50, (2, 6), generator=g), torch.randint(3, 50, (2, 7), generator=g)
    mask, said = torch.ones_like(heard), torch.ones_like(ids)
    mask[1, 5:] = 0
    said[1, 4:] = 0
    return {"input_ids": heard, "attention_mask": mask, "decoder_input_ids": ids, "decoder_attention_mask": said}


def outputs(model: nn.Module) -> Tensor:
    """Scores of the decoder's real tokens."""
    with torch.no_grad():
        found = model.eval()(**given())
    logits: Tensor = found["logits"] if isinstance(found, dict) else found[0]
    return logits[given()["decoder_attention_mask"].bool()]


def trained(family: str, config: Any) -> Tensor:
    """A folder that peft wrote, and what peft computes with it."""
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(BASE[family]), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.8 * torch.randn(p.shape))
    model.save_pretrained("one")
    return outputs(peft.PeftModel.from_pretrained(copy.deepcopy(BASE[family]), "one"))


KINDS = [
    lambda: peft.PromptTuningConfig(**PAIR),
    lambda: peft.PromptEncoderConfig(**PAIR, encoder_hidden_size=8),
    lambda: peft.PrefixTuningConfig(**PAIR),
    lambda: peft.PrefixTuningConfig(**PAIR, prefix_projection=True, encoder_hidden_size=8),
]


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_loads_what_peft_trained(world: Path, family: str) -> None:
    for config in KINDS[1:3] if family == "bart" else KINDS[3:]:
        want = trained(family, config())
        made = api.compile(HEAD.format(family))
        assert apart(outputs(made.module), want) <= 2e-6 < 1e-3 < apart(want, outputs(BASE[family]))
        assert all(".one." in f".{n}" for n, p in made.module.named_parameters() if p.requires_grad)


def test_a_prefix_folds_is_stored_and_can_be_switched_off(world: Path) -> None:
    want = trained("t5", KINDS[2]())
    made = api.compile(HEAD.format("t5") + 'fold all\nemit torch to "saved"\n', force=True).module
    assert apart(outputs(made), want) <= 2e-6 and apart(outputs(api.load("saved")), want) <= 2e-6
    assert not any(p.requires_grad for n, p in made.named_parameters() if ".one." in f".{n}")
    with disabled(made):
        assert apart(outputs(made), outputs(BASE["t5"])) <= 1e-6


@pytest.mark.parametrize(("family", "times"), [("t5", 2), ("bart", 2), ("bart", 1)])
def test_the_prompt_of_one_task_of_several(world: Path, family: str, times: int) -> None:
    """With tokens for both sides the second half stands in front of the decoder; peft makes its inputs from labels then."""
    base: Any = copy.deepcopy(BASE[family])
    config = peft.MultitaskPromptTuningConfig(**PAIR, num_tasks=3, num_ranks=2, num_transformer_submodules=times)
    torch.manual_seed(0)  # peft draws what it begins with
    model = peft.get_peft_model(base, config).eval()
    trained_a_little(model, 0.8)
    model.save_pretrained("one")
    said = given()
    labels = said.pop("decoder_input_ids")
    said["decoder_attention_mask"] = torch.ones_like(labels)
    ids = torch.cat([torch.full((2, 1), base.config.decoder_start_token_id), labels[:, :-1]], 1)
    mask = {} if times == 1 else {"decoder_attention_mask": said["decoder_attention_mask"]}
    with torch.no_grad():
        want = model(
            input_ids=said["input_ids"], attention_mask=said["attention_mask"], labels=labels, task_ids=torch.tensor([1, 1]), **mask
        ).logits
        plain = base(**said, decoder_input_ids=ids).logits
    rounding = 2e-6 * max(1.0, float(want.abs().max()))
    made = api.compile(HEAD.format(family).replace('load("one")', 'load("one", task = 1)'))
    with torch.no_grad():
        found: Any = made.module.eval()(**said, decoder_input_ids=ids)
    got = found["logits"] if isinstance(found, dict) else found[0]
    assert apart(got, want[:, want.shape[1] - 6 :]) <= rounding < 1e-3 < apart(got, plain)
    assert any("`generate` leaves them out" in f for s in made.plan.steps for f in s.facts) == (times == 2)
    assert sum(p.requires_grad for p in made.module.parameters()) == times
    again = HEAD.format(family).replace('load("one")', 'load("one", task = 2)') + 'fold all\nemit torch to "saved"\n'
    pair = api.compile(again, force=True).module, api.load("saved")
    with torch.no_grad():
        one, two = (m.eval()(**said, decoder_input_ids=ids)[0] for m in pair)
    assert torch.equal(one, two) and apart(one, got) > 1e-3
    if times == 2:  # goes back as the one task of a folder
        text = HEAD.format(family).replace('load("one")', 'load("one", task = 1)') + 'emit peft to "out"\n'
        done = api.compile(text, force=True)
        assert [c["ok"] for c in done.certificates if c["claim"] == "peft = program"] == [True]
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(BASE[family]), "out").eval()
        with torch.no_grad():
            back = theirs(
                input_ids=said["input_ids"], attention_mask=said["attention_mask"], labels=labels, task_ids=torch.tensor([0, 0]), **mask
            ).logits
        assert apart(back, want) <= rounding


def test_prompts_go_back_to_peft(world: Path, family: str = "bart") -> None:
    made = api.compile(f'surg 1\nmodel "{family}"\ninsert prompt(length = {N}, std = 1) on embed.tokens\nemit peft to "one"\n', force=True)
    assert [c["ok"] for c in made.certificates if c["claim"] == "peft = program"] == [True]
    want = outputs(made.module)
    assert (
        apart(outputs(peft.PeftModel.from_pretrained(copy.deepcopy(BASE[family]), "one")), want)
        <= 2e-6
        < 1e-3
        < apart(want, outputs(BASE[family]))
    )
    assert apart(outputs(api.compile(HEAD.format(family)).module), want) <= 2e-6


def test_what_is_for_another_sort_of_model_says_so(world: Path) -> None:
    trained("t5", KINDS[0]())
    config = Path("one/adapter_config.json")
    said = json.loads(config.read_text("utf-8"))
    for change, code, words in (
        ({"num_transformer_submodules": 1}, "S0783", "3 virtual tokens"),
        ({"task_type": "CAUSAL_LM"}, "S0783", "num_transformer_submodules"),
        ({"task_type": "CAUSAL_LM", "num_transformer_submodules": 1, "num_virtual_tokens": 6}, "S0785", "an encoder with a decoder"),
        ({"peft_type": "CARTRIDGE"}, "S0782", "prompt_tuning_init"),
    ):
        config.write_text(json.dumps({**said, **change}), "utf-8")
        found = api.plan(HEAD.format("t5")).diagnostics[-1]
        assert found.code == code and words in found.message, (found.code, found.message)
