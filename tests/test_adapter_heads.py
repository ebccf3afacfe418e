"""Keys and values in front of attentions, cut with the heads that they belong to: against peft and live models whose heads are masked."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery as api
from tests import test_adapter_pairs as pairs
from tests.adapter_world import stored_bases
from tests.test_adapter_kinds import apart
from tests.test_adapter_tokens import given
from tests.zoo import ZOO

peft = pytest.importorskip("peft")

BASE: dict[str, nn.Module] = {}
N = 3
OUT = {
    "gpt2": "transformer.h.{}.attn.c_proj", "llama": "model.layers.{}.self_attn.o_proj", "bert": "encoder.layer.{}.attention.output.dense",
    "t5": "decoder.block.{}.layer.0.SelfAttention.o",
}  # fmt: skip
"""The output projections of attentions, whose inputs are heads."""


def bases() -> dict[str, nn.Module]:
    return {
        "gpt2": ZOO["gpt2"].make_model(n_layer=2), "llama": ZOO["llama"].make_model(num_hidden_layers=2),
        "bert": ZOO["bert"].make_model(num_hidden_layers=1), "t5": pairs.bases()["t5"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with stored_bases(tmp_path_factory, "heads", bases, BASE) as folder:
        yield folder


def outputs(model: nn.Module, family: str) -> Tensor:
    """The first output at the real tokens."""
    inputs = pairs.given() if family == "t5" else given(family)
    with torch.no_grad():
        found: Any = model.eval()(**inputs)
    found = next(iter(found.values())) if isinstance(found, dict) else found[0]
    mask = inputs["decoder_attention_mask" if family == "t5" else "attention_mask"]
    out: Tensor = found[:, found.shape[1] - mask.shape[1] :][mask.bool()]
    return out


def columns(model: nn.Module, family: str, layer: int) -> Tensor:
    """An output projection's weight, inputs first."""
    module: Any = model.get_submodule(OUT[family].format(layer))
    return module.weight.detach() if family == "gpt2" else module.weight.detach().T


def masked(model: nn.Module, family: str, small: nn.Module) -> nn.Module:
    """The model with a zero wherever the small one has lost an input of an output projection."""
    gone = 0
    for i in range(1 if family == "bert" else 2):
        have = {tuple(c.tolist()) for c in columns(small, family, i)}
        with torch.no_grad():
            for c in columns(model, family, i):
                if tuple(c.tolist()) not in have:
                    c.zero_()
                    gone += 1
    assert gone
    return model


def trained(family: str) -> nn.Module:
    """A folder ``one`` that peft wrote, and peft's model with it."""
    torch.manual_seed(1)
    task = {"bert": "FEATURE_EXTRACTION", "t5": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")
    model = peft.get_peft_model(copy.deepcopy(BASE[family]), peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=N))
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.normal_()
    model.save_pretrained("one")
    loaded: nn.Module = peft.PeftModel.from_pretrained(copy.deepcopy(BASE[family]), "one")
    return loaded


CUTS = {
    "gpt2": "prune heads(keep = {0: 1, 1: 3}, score = random) on layers[*].attn\n",
    "llama": "prune kv_groups(keep = 1, score = magnitude) on layers[1].attn\n",
    "bert": "prune heads(keep = 3, score = random) on layers[0].attn\n",
    "t5": "prune heads(keep = 1, score = random) on decoder.layers[*].attn\n",
}


@pytest.mark.parametrize("family", CUTS)
def test_a_loaded_prefix_loses_the_heads_that_go(world: Path, family: str) -> None:
    """Merged above the cut, below it, and into the cut artifact: what peft computes with the heads masked."""
    theirs = trained(family)
    head, load, merge = f'surg 1\nmodel "{family}"\n', 'adapter one = load("one")\n', "merge linear of one * 1\n"
    above = api.compile(head + load + merge + CUTS[family], force=True)
    assert all(c["ok"] for c in above.certificates) and any("masked" in c["claim"] for c in above.certificates)
    keep = 'emit torch to "cut"\n' if family in ("gpt2", "t5") else ""
    below = api.compile(head + load + CUTS[family] + keep + merge, force=True)
    assert "one was trained before the cut and is carried over" in below.plan.steps[-1].facts
    later = api.compile(f'surg 1\nmodel "cut"\n{load}{merge}', force=True) if keep else below
    want = outputs(masked(theirs, family, above.module), family)
    assert apart(want, outputs(BASE[family], family)) > 1e-2
    for made in (above, below, later):
        assert apart(outputs(made.module, family), want) <= 3e-6


@pytest.mark.parametrize("how", ["reparametrise = true, width = 6", "reparametrise = false"])
def test_an_inserted_prefix_loses_the_heads_that_go(world: Path, how: str) -> None:
    """The last layer of the network that makes the tables loses their rows; where query heads of a group go, its keys stay and are read by fewer."""
    start = f'surg 1\nmodel "llama"\ninsert prefix(length = {N}, {how}) on layers[*].attn as mine\n'
    groups = "true" in how
    cut = CUTS["llama"] if groups else "prune heads(ratio = 50%, score = random) on layers[0].attn\n"
    whole, small = api.compile(start), api.compile(start + cut + 'emit report to "page"\n', force=True)
    assert all(c["ok"] for c in small.certificates) and any("masked" in c["claim"] for c in small.certificates)
    sizes = [sum(p.numel() for n, p in m.module.named_parameters() if "mine" in n) for m in (whole, small)]
    assert (sizes[1] < sizes[0]) == groups
    want = outputs(masked(whole.module, "llama", small.module), "llama")
    assert apart(outputs(small.module, "llama"), want) <= 3e-6
    folded = api.compile(start + cut + 'fold all\nemit torch to "saved"\n', force=True)
    assert apart(outputs(folded.module, "llama"), want) <= 3e-6 and apart(outputs(api.load("saved"), "llama"), want) <= 3e-6


def test_layers_that_went_take_their_keys_and_values_along(world: Path) -> None:
    trained("gpt2")
    body = 'adapter one = load("one")\nprune layers(count = 1, score = random) on layers[0]\nmerge linear of one * 1\n'
    made = api.compile(f'surg 1\nmodel "gpt2"\n{body}').module
    tables = dict(made.named_parameters())
    stored = peft.utils.load_peft_weights("one")["prompt_embeddings"]
    width = stored.shape[1] // 4
    for i in (0, 1):
        mine = tables[f"one.table_{i}"].detach().transpose(0, 1).flatten(1)
        assert torch.equal(mine, stored[:, (2 + i) * width : (3 + i) * width])


def test_a_prompt_follows_a_cut_of_heads(world: Path) -> None:
    """Its pass runs through the cut layers; stored, its tables lose the heads."""
    start = f'surg 1\nmodel "gpt2"\ninsert prompt(length = {N}, std = 1) on embed.tokens as mine\n'
    live, late = api.compile(start + CUTS["gpt2"]), api.compile(start + CUTS["gpt2"] + "fold all\n")
    assert all(c["ok"] for c in live.certificates)
    want = outputs(masked(api.compile(start).module, "gpt2", live.module), "gpt2")
    assert apart(outputs(live.module, "gpt2"), want) <= 3e-6 and apart(outputs(late.module, "gpt2"), want) <= 3e-6
    folded = api.compile(start + "fold all\n" + CUTS["gpt2"])
    assert all(c["ok"] for c in folded.certificates)
    again = masked(api.compile(start + "fold all\n").module, "gpt2", folded.module)
    assert apart(outputs(folded.module, "gpt2"), outputs(again, "gpt2")) <= 3e-6
