"""Adapters of other kinds than LoRA, trained by peft: AdaLoRA, VeRA, LoHa, LoKr, IA3 and OFT load, merge and go back to peft, against peft itself."""

from __future__ import annotations

import copy
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
from surgery.core.source import NOWHERE
from surgery.model.adapter import open_adapter
from surgery.passes.kinds import adapter_forms
from tests import adapters, fixtures
from tests.caching import capture_cache
from tests.zoo import ZOO

peft = pytest.importorskip("peft")

FEW: dict[str, dict[str, Any]] = {"bert": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1}, "resnet": {}}
BASE: dict[str, nn.Module] = {}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("kinds")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("SURGERY_CACHE", str(capture_cache(tmp_path_factory)))
    for family in FEW:
        model = ZOO[family].make_model(**FEW[family])
        fixtures.save(model, folder / family)
        BASE[family] = model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield folder
    patch.undo()


def trained(name: str, family: str, config: Any, seed: int = 0) -> None:
    """A folder that peft wrote, with small values in all that trains."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(BASE[family]), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn(p.shape))
    model.save_pretrained(name)


def theirs(name: str, family: str) -> Tensor:
    return outputs(peft.PeftModel.from_pretrained(copy.deepcopy(BASE[family]), name), family)


def outputs(model: nn.Module, family: str) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(**ZOO[family].inputs(2, 9))[0]
    return found


def apart(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max() / b.abs().max().clamp_min(1))


Q, D = "query", "intermediate.dense"
KINDS: list[tuple[str, Any]] = [
    ("bert", lambda: peft.AdaLoraConfig(target_modules=[Q, D], init_r=4, target_r=2, total_step=10, lora_alpha=8)),
    ("bert", lambda: peft.VeraConfig(r=6, target_modules=[Q, D])),
    ("bert", lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=[Q, D], alpha_pattern={D: 2}, init_weights=False)),
    ("resnet", lambda: peft.LoHaConfig(r=2, alpha=3, target_modules=".*stages.0.*convolution", init_weights=False)),
    ("bert", lambda: peft.LoKrConfig(r=2, alpha=5, target_modules=[Q, D], init_weights=False, modules_to_save=["pooler"])),
    ("bert", lambda: peft.LoKrConfig(r=1, alpha=5, decompose_both=True, target_modules=[Q], init_weights=False)),
    ("bert", lambda: peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])),
    ("gpt2", lambda: peft.IA3Config(target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True)),
    ("bert", lambda: peft.OFTConfig(r=0, oft_block_size=8, target_modules=[Q, D])),
    ("bert", lambda: peft.OFTConfig(r=0, oft_block_size=16, block_share=True, use_cayley_neumann=False, target_modules=[D])),
]  # fmt: skip


@pytest.mark.parametrize(("family", "config"), KINDS)
def test_loads_what_peft_trained(world: Path, family: str, config: Any) -> None:
    trained("one", family, config())
    want = theirs("one", family)
    assert apart(want, outputs(BASE[family], family)) > 1e-4
    made = api.compile(f'surg 1\nmodel "{family}"\nadapter one = load("one")\nmerge linear of one * 1\n')
    assert apart(outputs(made.module, family), want) <= 3e-6
    assert next(c for c in made.certificates if c["claim"] == "merged = weighted sum")["ok"]


@pytest.mark.parametrize("config", [KINDS[2][1], KINDS[6][1]])
def test_goes_back_to_peft_beside_a_lora(world: Path, config: Any) -> None:
    """Two kinds in one model: LoHa stays thin factors, IA3 becomes whole weights; the folder is a LoRA that peft loads."""
    trained("other", "bert", config())
    adapters.write(world / "low", adapters.low(adapters.bert("value", layers=1), 4))
    text = 'surg 1\nmodel "bert"\nadapter other = load("other")\nadapter low = load("low")\nmerge linear of other * 0.5, low * 2\nemit peft to "given"\n'
    made = api.compile(text, force=True)
    claims = {c["claim"]: c for c in made.certificates}
    assert claims["merged = weighted sum"]["ok"] and claims["peft = program"]["ok"]
    assert apart(theirs("given", "bert"), outputs(made.module, "bert")) <= 3e-6
    alone = [theirs(n, "bert") for n in ("other", "low")]
    assert min(apart(outputs(made.module, "bert"), t) for t in (*alone, outputs(BASE["bert"], "bert"))) > 1e-4


def test_the_rank_is_what_the_product_has(world: Path) -> None:
    """LoHa of rank 3 is a product of rank 9, LoKr of two sides the product of their ranks; nothing of the tensors is read to know it."""
    trained("loha", "bert", KINDS[2][1]())
    trained("lokr", "bert", KINDS[5][1]())
    ranks = [{p.rank for p in open_adapter(n, n, world, NOWHERE).parts.values()} for n in ("loha", "lokr")]
    assert ranks == [{9}, {1}]


def test_three_terms_were_trained_as_four() -> None:
    q = torch.tensor([[[0.0, 0.3], [-0.3, 0.0]]])
    powers = [torch.linalg.matrix_power(q, i) for i in range(5)]
    four = powers[0] + 2 * powers[1] + 2 * powers[2] + powers[3]
    assert torch.allclose(adapter_forms._cayley(q, 4), four) and torch.equal(adapter_forms._cayley(q, 3), adapter_forms._cayley(q, 4))
    assert torch.allclose(adapter_forms._cayley(q, 2), powers[0] + 2 * powers[1]) and torch.equal(adapter_forms._cayley(q, 1), powers[0])
    exact = adapter_forms._cayley(q, 0)[0]
    assert torch.allclose(exact @ exact.T, torch.eye(2), atol=1e-6)


def refused(text: str) -> Any:
    (found,) = api.plan(text).diagnostics
    return found


def test_what_is_not_in_the_folder_or_not_a_change_is_refused(world: Path) -> None:
    head = 'surg 1\nmodel "bert"\nadapter one = load("one")\nmerge linear of one * 1\n'
    trained("one", "bert", peft.VeraConfig(r=4, target_modules=[Q], save_projection=False))
    assert refused(head).code == "S0783" and "projections" in refused(head).message
    adapters.write(world / "one", adapters.low(adapters.bert("query", layers=1), 4), use_bdlora=True)
    assert refused(head).code == "S0782" and "`use_bdlora`" in refused(head).message
    peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1).save_pretrained("one")
    found = refused(head)
    assert found.code == "S0782" and "gates inside of attention" in found.notes[0]
    trained("one", "bert", KINDS[6][1]())
    tensors = load_file("one/adapter_model.safetensors")
    key = next(k for k in tensors if "key" in k)
    save_file({**tensors, key: torch.ones(7, 1)}, "one/adapter_model.safetensors")
    assert refused(head).code == "S0785" and "32 outputs" in refused(head).message
    save_file({**tensors, key: tensors[key] * float("nan")}, "one/adapter_model.safetensors")
    with pytest.raises(SurgeryError) as caught:
        api.compile(head)
    assert caught.value.diagnostics[0].code == "S0787"
