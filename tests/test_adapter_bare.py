"""Factors of bare parameters (``target_parameters`` of peft): fused experts, whichever way they are stored."""

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
from tests.adapter_world import stored_bases
from tests.test_adapter_kinds import apart
from tests.zoo import ZOO

peft = pytest.importorskip("peft")

BASE: dict[str, nn.Module] = {}


def bases() -> dict[str, nn.Module]:
    """Mixtral keeps ``[experts, out, in]``; GPT-OSS ``[experts, in, out]``, gates and values in turns."""
    import transformers

    config = transformers.GptOssConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2, vocab_size=99, sliding_window=16, max_position_embeddings=64, layer_types=["full_attention"],
    )  # fmt: skip
    return dict((("mixtral", ZOO["mixtral"].make_model(num_hidden_layers=1)), ("oss", transformers.GptOssForCausalLM(config))))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with stored_bases(tmp_path_factory, "bare", bases, BASE) as folder:
        yield folder


def trained(name: str, family: str, **more: Any) -> None:
    torch.manual_seed(len(name))
    config = peft.LoraConfig(lora_alpha=6, init_lora_weights=False, task_type="CAUSAL_LM", **{"r": 2, "target_modules": [], **more})
    peft.get_peft_model(copy.deepcopy(BASE[family]), config).save_pretrained(name)


def outputs(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return found


def theirs(family: str, *names: str) -> Tensor:
    """The base with these folders merged into it one after the other."""
    model: Any = copy.deepcopy(BASE[family])
    for name in names:
        model = peft.PeftModel.from_pretrained(model, name).merge_and_unload()
    return outputs(model)


BOTH = ["experts.down_proj", "mlp.experts.gate_up_proj"]


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mixtral", {"target_parameters": BOTH, "target_modules": ["q_proj"]}),
        ("mixtral", {"target_parameters": ["experts.down_proj", "q_proj.weight"], "target_modules": ["k_proj"], "use_rslora": True}),
        ("oss", {"target_parameters": BOTH}),
    ],
)
def test_loads_what_peft_trained(world: Path, family: str, more: dict[str, Any]) -> None:
    trained("one", family, **more)
    made = api.compile(f'surg 1\nmodel "{family}"\nadapter one = load("one")\nmerge linear of one * 1\n')
    want = theirs(family, "one")
    assert apart(outputs(made.module), want) <= 2e-6 < 1e-2 < apart(want, outputs(BASE[family]))
    assert next(c for c in made.certificates if c["claim"] == "merged = weighted sum")["ok"]


def test_several_are_added_and_not_merged_otherwise(world: Path) -> None:
    trained("one", "mixtral", target_parameters=BOTH)
    trained("other", "mixtral", target_parameters=BOTH, r=3)
    head = 'surg 1\nmodel "mixtral"\nadapter one = load("one")\nadapter other = load("other")\n'
    made = api.compile(head + "merge linear of one * 1, other * 1\nfold all\n")
    assert apart(outputs(made.module), theirs("mixtral", "one", "other")) <= 2e-6
    assert [d.code for d in api.plan(head + "merge svd of one * 1, other * 1\n").diagnostics] == ["S0786"]
    part = api.plan(head + "merge linear of one * 1 on layers[0].ffn.experts.up\n")
    assert [s.role for s in part.steps[-1].sites] == ["layers[0].ffn.experts.up"]


def test_what_cannot_be_said_is_refused(world: Path) -> None:
    trained("one", "mixtral", target_parameters=BOTH)
    text = 'surg 1\nmodel "mixtral"\nadapter one = load("one")\n{}merge linear of one * 1\n'
    config = Path("one/adapter_config.json")
    said, tensors = json.loads(config.read_text("utf-8")), load_file("one/adapter_model.safetensors")
    for names, number in (([*BOTH, 3], "S0783"), (["experts.down_proj"], "S0784"), (None, "S0783"), (["experts.router"], "S0784")):
        config.write_text(json.dumps({**said, "target_parameters": names}), "utf-8")
        assert api.plan(text.format("")).diagnostics[-1].code == number, names
    config.write_text(json.dumps(said), "utf-8")
    save_file({k: v[:, :16].clone() if "lora_A" in k else v for k, v in tensors.items()}, "one/adapter_model.safetensors")
    assert api.plan(text.format("")).diagnostics[-1].code == "S0785"


@pytest.mark.parametrize("family", ["mixtral", "oss"])
def test_adapters_on_experts_go_to_peft_and_come_back(world: Path, family: str) -> None:
    """Two on one tensor, of other ranks and scales, one beside them on a layer: peft loads it with equal outputs, and so do we."""
    body = (
        "adapt lora(rank = 2, alpha = 6) on layers[*].ffn.experts.down as one\nadapt rslora(rank = 3, dropout = 0.5) on layers[*].ffn.experts.gate as two\n"
        "adapt lora(rank = 2) on layers[*].ffn.experts.{up, down} as three\nadapt lora(rank = 4, alpha = 2) on layers[*].attn.q as four\n"
    )
    if family == "oss":  # its gates and values take turns in one tensor
        body = "adapt lora(rank = 2, alpha = 6) on layers[*].ffn.experts.* as one\nadapt lora(rank = 4, alpha = 2) on layers[*].attn.q as four\n"
    made = api.compile(f'surg 1\nmodel "{family}"\n{body}emit torch to "trained"\n', force=True).module
    with torch.no_grad():
        for i, p in enumerate(p for p in made.parameters() if p.requires_grad):
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    api.save(made, "trained", force=True)
    done = api.compile('surg 1\nmodel "trained"\nemit peft to "given"\n', force=True)
    assert [c["ok"] for c in done.certificates if c["claim"] == "peft = program"] == [True]
    want = outputs(made)
    assert apart(want, outputs(BASE[family])) > 1e-2
    assert apart(theirs(family, "given"), want) <= 2e-6
    assert apart(outputs(peft.PeftModel.from_pretrained(copy.deepcopy(BASE[family]), "given")), want) <= 2e-6
    back = api.compile(f'surg 1\nmodel "{family}"\nadapter one = load("given")\nmerge linear of one * 1\n')
    assert apart(outputs(back.module), want) <= 2e-6
