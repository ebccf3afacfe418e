"""Further kinds of folders that peft writes, layer by layer against the weights that peft merges, and peft itself where it cannot merge."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import surgery as api
from surgery.core.diagnostics import SurgeryError
from surgery.core.source import NOWHERE
from surgery.model import adapter_more
from surgery.model.adapter import open_adapter
from surgery.model.realise import realise
from surgery.model.weights import Apply
from surgery.passes import registry
from surgery.passes.kinds import adapter_more as forms
from surgery.passes.kinds import adapter_waves
from tests import fixtures
from tests.test_adapter_dense import T, Two, held, stirred
from tests.test_adapter_kinds import BASE, apart, outputs, theirs, trained, world
from tests.zoo import ZOO

peft = pytest.importorskip("peft")
__all__ = ["world"]

KINDS: dict[str, Callable[[], Any]] = {
    "pvera": lambda: peft.PveraConfig(r=4, **T),
    "unilora": lambda: peft.UniLoraConfig(r=2, save_indices=True, **T),
    "tinylora": lambda: peft.TinyLoraConfig(r=2, u=8, weight_tying=1.0, **T),
    "glora": lambda: peft.GloraConfig(r=3, **T),
    "glora vector": lambda: peft.GloraConfig(r=3, config_A_B="vector", config_C="vector", config_D_E="vector", **T),
    "glora constant": lambda: peft.GloraConfig(r=3, config_A_B="constant", config_C="none", config_D_E="none", **T),
    "beft": lambda: peft.BeftConfig(**T),
    "deft": lambda: peft.DeftConfig(r=3, alpha=6, **T),
    "deft qr": lambda: peft.DeftConfig(r=3, decomposition_method="qr", para=True, **T),
    "supertuning": lambda: peft.SupertuningConfig(sparsity=0.9, r=2, lora_alpha=4, **T),
    "peanut": lambda: peft.PeanutConfig(r=3, depth=2, act_fn="silu", scaling=0.7, **T),
    "osf": lambda: peft.OSFConfig(effective_rank=0.25, rank_pattern={"down": 5}, **T),
    "frod": lambda: peft.FrodConfig(progressbar=False, sparse_rate=0.1, **T),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=20, **T),
    "waveft sym": lambda: peft.WaveFTConfig(n_frequency=30, wavelet_family="sym5", random_loc_seed=3, n_frequency_pattern={"up": 11}, **T),
    "waveft coif": lambda: peft.WaveFTConfig(n_frequency=20, wavelet_family="coif3", proportional_parameters=True, **T),
    "waveft bare": lambda: peft.WaveFTConfig(n_frequency=20, use_idwt=False, **T),
}


def module_of(folder: Path, base: nn.Module, task: int | None = None) -> nn.Module:
    """The base with what the folder makes of its weights and biases."""
    found = open_adapter(str(folder), "one", folder, NOWHERE, task=task)
    new: dict[str, Tensor] = {}
    for path, low in found.parts.items():
        weight: Any = base.get_parameter(f"{path}.weight")
        a, b = (realise(e, functions=registry.function) for e in (low.a, low.b))
        new[f"{path}.weight"] = weight + low.scale * (b @ a[:, : weight.shape[1]])
    for path, part in found.dense.items():
        weight, bias = held(base.get_parameter(f"{path}.weight")), held(base.get_parameter(f"{path}.bias"))
        if part.function:
            name = part.function if ":" in part.function else f"kinds/adapter_forms:{part.function}"
            expr = Apply(weight.shape, "float32", name, (weight, *part.tensors), (("axis", 1), *part.params))
            new[f"{path}.weight"] = realise(expr, functions=registry.function)
        if part.bias:
            given = part.tensors if part.bias_tensors is None else part.bias_tensors
            params = part.params if part.bias_tensors is None else part.bias_params
            extra = (("inputs", 1),) if part.reads_weight else ()
            args = (bias, weight, *given) if part.reads_weight else (bias, *given)
            new[f"{path}.bias"] = realise(
                Apply(bias.shape, "float32", part.bias, args, (("axis", 0), *extra, *params)), functions=registry.function
            )
    assert new
    with torch.no_grad():
        for name, value in new.items():
            base.get_parameter(name).copy_(value)
    return base


X = torch.randn(5, 16, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_becomes_what_peft_makes_of_it(name: str, tmp_path: Path) -> None:
    """What peft computes with the folder that it wrote, layers and biases at once; of GLoRA forms that cannot be merged in peft, too."""
    model = stirred(KINDS[name]()).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        want, plain = model(X), Two()(X)
        got = module_of(tmp_path, Two())(X)
    assert apart(got, want) <= 4e-6 and apart(plain, want) > 1e-2, (apart(got, want), apart(plain, want))


def test_every_wavelet_is_orthogonal_and_what_peft_has() -> None:
    from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
    from peft.tuners.waveft.wavelet import Wavelet

    assert adapter_waves.families() == adapter_more.FAMILIES
    for family in adapter_waves.families():
        h = np.array(adapter_waves.lowpass(family))
        moments = int(family.strip("dbsymcoif")) * (2 if family.startswith("coif") else 1)
        for shift in range(len(h) // 2):
            assert abs(h[2 * shift :] @ h[: len(h) - 2 * shift] - (shift == 0)) < 1e-9, family
        signs = (-1.0) ** np.arange(len(h))
        around = np.arange(len(h)) / len(h)
        assert all(abs((signs * around**p) @ h) < 1e-8 for p in range(moments)), family
        assert np.abs(h - np.array(Wavelet(family).rec_lo)).max() < 1e-8
        assert WAVELET_REDUCTIONS[family] == (len(h) - 2, len(h) - 2)
    broken = np.array(Wavelet("coif4").rec_lo)
    assert abs(broken @ broken - 1) > 1e-3  # why the two are refused


def test_functions_of_a_network_are_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    assert tuple(forms.ACTIVATIONS) == adapter_more.ACTIVATIONS
    for name, function in forms.ACTIVATIONS.items():
        assert torch.allclose(function(X), ACT2FN[name](X), atol=1e-6), name


def test_vectors_that_layers_share_follow_the_order_of_the_model(world: Path) -> None:
    """TinyLoRA numbers them by peft's way through the model, which is not that of the file's keys: alone, and in two groups of three layers."""
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "0.output.dense"]
    for tying in (0.0, 0.6):
        trained("one", "bert", peft.TinyLoraConfig(r=2, u=8, weight_tying=tying, target_modules=targets))
        count = sum("tinylora_v" in k for k in load_file("one/adapter_model.safetensors"))
        assert count == (6 if tying == 0 else 2)
        made = api.compile('surg 1\nmodel "bert"\nadapter one = load("one")\nmerge linear of one * 1\n').module
        assert (
            apart(outputs(made, "bert"), theirs("one", "bert")) <= 3e-6 < 1e-3 < apart(outputs(BASE["bert"], "bert"), theirs("one", "bert"))
        )


def test_a_basis_that_the_config_does_not_make_is_refused(world: Path) -> None:
    """peft makes FRoD's basis anew when it loads, and mixes it with the stored one: with another ``regularization_alpha`` that is another model."""
    model = ZOO["bert"].make_model(num_hidden_layers=3, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    fixtures.save(model, world / "deep")
    BASE["deep"] = model.eval()
    inputs = ZOO["bert"].inputs(2, 9)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(
        copy.deepcopy(model), peft.FrodConfig(progressbar=False, sparse_rate=0.1, target_modules=["query", "output.dense"])
    )
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
        want = adapted.eval()(**inputs)[0]
    adapted.save_pretrained("one")
    text = 'surg 1\nmodel "deep"\nadapter one = load("one")\nmerge linear of one * 1\n'
    with torch.no_grad():
        assert apart(api.compile(text).module(**inputs)[0], want) <= 4e-6
    path = Path("one/adapter_config.json")
    said = json.loads(path.read_text("utf-8"))
    for alpha in (0.1, 5.0):
        path.write_text(json.dumps({**said, "regularization_alpha": alpha}), "utf-8")
        with torch.no_grad():
            assert apart(peft.PeftModel.from_pretrained(copy.deepcopy(model), "one").eval()(**inputs)[0], want) > 1e-2
        with pytest.raises(SurgeryError) as caught:
            api.compile(text)
        found = caught.value.diagnostics[-1]
        assert found.code == "S0783" and "not the one that its config makes" in found.message and not Path("out").exists()
    path.write_text(json.dumps({**said, "regularization_alpha": "x"}), "utf-8")
    assert api.plan(text).diagnostics[-1].code == "S0783"


def test_one_task_of_several_is_taken_and_has_to_be_said(tmp_path: Path) -> None:
    """Poly's mixture for one task is a product of thin factors, against peft with that task in every row."""
    model = stirred(peft.PolyConfig(r=2, n_tasks=3, n_skills=2, n_splits=2, **T)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "module_logits" in name:
                p.copy_(torch.randn(p.shape))
    model.save_pretrained(tmp_path)
    x = X.unsqueeze(1)
    for task in range(3):
        with torch.no_grad():
            parts, tasks = model.base_model.model, torch.full((5,), task)
            want = parts.norm(parts.down(parts.up(x, task_ids=tasks).tanh(), task_ids=tasks))
            got = module_of(tmp_path, Two(), task=task)(x)
        assert apart(got, want) <= 4e-6 and apart(Two()(x), want) > 1e-2
    for task, code, words in ((None, "S0782", "3 tasks"), (3, "S0783", "task 3")):
        with pytest.raises(SurgeryError) as caught:
            open_adapter(str(tmp_path), "one", tmp_path, NOWHERE, task=task)
        assert caught.value.diagnostics[0].code == code and words in caught.value.diagnostics[0].message


def test_folders_without_what_they_need_say_so(tmp_path: Path) -> None:
    bad: list[tuple[Any, str, str]] = [
        (peft.UniLoraConfig(r=2, **T), "S0782", "order in which peft visits"),
        (peft.PveraConfig(r=4, sample_at_inference=True, **T), "S0782", "drawn at random for every call"),
        (peft.TinyLoraConfig(r=2, u=8, save_projection=False, **T), "S0783", "projections"),
        (peft.SupertuningConfig(sparsity=0.9, save_precomputed_indices=False, **T), "S0783", "places of its values"),
        (peft.FrodConfig(progressbar=False, save_projection=False, **T), "S0783", "shared bases"),
        (peft.WaveFTConfig(n_frequency=20, wavelet_family="coif5", **T), "S0783", "not orthogonal"),
        (peft.PeanutConfig(r=3, act_fn="quick_gelu", **T), "S0783", "quick_gelu"),
        (peft.LilyConfig(r=4, **T), "S0782", "every input"),
        (peft.PsoftConfig(r=4, **T), "S0782", "signs"),
    ]
    for i, (config, code, words) in enumerate(bad):
        folder = tmp_path / str(i)
        stirred(config).save_pretrained(folder)
        with pytest.raises(SurgeryError) as caught:
            open_adapter(str(folder), "one", folder, NOWHERE)
        found = caught.value.diagnostics[0]
        assert found.code == code and any(words in t for t in (found.message, *found.notes)), (found.code, found.message, found.notes)


@pytest.mark.parametrize(
    ("name", "part", "change", "code"),
    [
        ("unilora", "indices_A", lambda t: t + 900, "S0783"),
        ("supertuning", "indices", lambda t: t * 0 - 1, "S0783"),
        ("frod", "s_indices.up", lambda t: t + 90, "S0783"),
        ("glora", "up.glora_B.Xu", lambda t: t[:, :3], "S0783"),
        ("glora", "up.glora_E.X", None, "S0783"),
        ("osf", "S_low", lambda t: t[:2], "S0783"),
        ("peanut", "encoders.1", None, "S0783"),
        ("peanut", "decoders.0", lambda t: t[:2], "S0783"),
        ("tinylora", "tinylora_v", None, "S0783"),
        ("deft", "deft_R", lambda t: t.long(), "S0783"),
        ("waveft", "spectrum", lambda t: t[:7], "S0783"),
        ("pvera", "pvera_A", lambda t: t[:3], "S0783"),
        ("beft", "beft_bias", lambda t: t.flatten(), "S0783"),
    ],
)
def test_damaged_folders_are_refused(name: str, part: str, change: Any, code: str, tmp_path: Path) -> None:
    stirred(KINDS[name]()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    assert any(part in k for k in tensors)
    save_file({k: change(v).clone() if part in k and change else v for k, v in tensors.items() if change or part not in k}, file)
    with pytest.raises(SurgeryError) as caught:
        module_of(tmp_path, Two())
    assert caught.value.diagnostics[0].code == code


def test_every_kind_that_peft_has_is_read_or_refused_with_a_reason(tmp_path: Path) -> None:
    from surgery.model.adapter_config import KINDS as KNOWN
    from surgery.model.adapter_forms import WHY_NOT
    from surgery.model.adapter_tokens import fields_of

    for kind in peft.PeftType:
        name = kind.value
        assert [name == "LORA", name in KNOWN, fields_of(name) is not None, name in WHY_NOT].count(True) == 1, name
    for name, why in WHY_NOT.items():
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": name}), "utf-8")
        with pytest.raises(SurgeryError) as caught:
            open_adapter(str(tmp_path), "one", tmp_path, NOWHERE)
        assert caught.value.diagnostics[0].code == "S0782" and caught.value.diagnostics[0].notes == (why,)
