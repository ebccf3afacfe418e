"""Every other kind of folder that peft writes for a change of weights, layer by layer against the weights that peft merges."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
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
from surgery.model.adapter_forms import WHY_NOT
from surgery.model.realise import realise
from surgery.model.weights import Apply, Held
from surgery.passes import registry
from tests.test_adapter_kinds import apart, outputs, theirs, trained, world

peft = pytest.importorskip("peft")
__all__ = ["world"]


class Two(nn.Module):
    """A layer with more outputs, and one with more inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.norm = nn.Linear(16, 24), nn.Linear(24, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.norm(self.down(self.up(x).tanh()))
        return found


T: dict[str, Any] = {"target_modules": ["up", "down"]}
KINDS: dict[str, Callable[[], Any]] = {
    "boft": lambda: peft.BOFTConfig(boft_block_size=8, **T),
    "coft": lambda: peft.OFTConfig(r=0, oft_block_size=8, coft=True, eps=0.5, **T),
    "coft shared, exact": lambda: peft.OFTConfig(
        r=0, oft_block_size=8, coft=True, eps=0.1, block_share=True, use_cayley_neumann=False, **T
    ),
    "hra": lambda: peft.HRAConfig(r=4, **T),
    "hra orthogonal": lambda: peft.HRAConfig(r=4, apply_GS=True, **T),
    "miss": lambda: peft.MissConfig(r=5, **T),
    "miss bat": lambda: peft.MissConfig(r=8, init_weights="bat", **T),
    "miss mini": lambda: peft.MissConfig(r=8, mini_r=4, init_weights="mini", **T),
    "c3a": lambda: peft.C3AConfig(block_size=8, **T),
    "delora": lambda: peft.DeloraConfig(r=4, **T),
    "gralora": lambda: peft.GraloraConfig(r=8, gralora_k=4, **T),
    "gralora hybrid": lambda: peft.GraloraConfig(r=8, gralora_k=2, hybrid_r=3, **T),
    "hira": lambda: peft.HiraConfig(r=4, **T),
    "randlora": lambda: peft.RandLoraConfig(r=5, randlora_alpha=8, **T),
    "shira": lambda: peft.ShiraConfig(r=2, **T),
    "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=12, vector_length=8, **T),
    "road 1": lambda: peft.RoadConfig(variant="road_1", group_size=8, **T),
    "road 2": lambda: peft.RoadConfig(variant="road_2", group_size=8, **T),
    "road 4": lambda: peft.RoadConfig(variant="road_4", group_size=8, **T),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=20, **T),
}


def stirred(config: Any, base: nn.Module | None = None) -> Any:
    """peft's model with values in all that trains."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base or Two()), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape))
    return model


def held(t: Tensor) -> Held:
    return Held(tuple(t.shape), "float32", str(t.data_ptr()), t.detach())


def made(folder: Path, base: nn.Module) -> dict[str, Tensor]:
    """The weights and biases of both layers as the folder has them."""
    found = open_adapter(str(folder), "one", folder, NOWHERE)
    out: dict[str, Tensor] = {}
    for path, low in found.parts.items():
        a, b = (realise(e, functions=registry.function) for e in (low.a, low.b))
        out[f"{path}.weight"] = base.get_submodule(path).weight + low.scale * (b @ a)  # type: ignore[operator]
    for path, part in found.dense.items():
        layer: Any = base.get_submodule(path)
        for leaf, function, axis in (("weight", part.function, 1), ("bias", part.bias, 0)):
            if function:
                name = function if ":" in function else f"kinds/adapter_forms:{function}"
                old = getattr(layer, leaf)
                expr = Apply(tuple(old.shape), "float32", name, (held(old), *part.tensors), (("axis", axis), *part.params))
                out[f"{path}.{leaf}"] = realise(expr, functions=registry.function)
    return out


@pytest.mark.parametrize("name", KINDS)
def test_a_layer_becomes_what_peft_merges(name: str, tmp_path: Path) -> None:
    model = stirred(KINDS[name]())
    model.save_pretrained(tmp_path)
    base, merged = Two(), dict(model.merge_and_unload().named_parameters())
    found = made(tmp_path, base)
    assert {"up.weight", "down.weight"} <= set(found)
    for key, old in base.named_parameters():
        want = merged[key]
        if key in found:
            assert apart(found[key], want) <= 2e-6 < apart(old, want), key
        else:
            assert torch.equal(old, want), key


def test_factors_of_a_butterfly_reach_across_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft makes more than one factor with its extension for devices alone: here with the same blocks built on the processor."""
    from peft.tuners.boft import layer

    def blocks(turns: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*t) for t in turns])

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer.FastBlockDiag, "apply", blocks)
    model = stirred(peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["up"]))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.up.boft_R"].shape == (2, 4, 4, 4)
    base, merged = Two(), model.merge_and_unload()
    assert apart(made(tmp_path, base)["up.weight"], merged.up.weight) <= 2e-6 < apart(base.up.weight, merged.up.weight)


def test_norms_and_rows_of_a_table_are_read_too(world: Path) -> None:
    """Trained rows stay one tensor with the head that is tied to the table."""
    trained("one", "bert", peft.LNTuningConfig(target_modules=["LayerNorm"]))
    load = 'adapter one = load("one")\nmerge linear of one * 1\n'
    assert apart(outputs(api.compile(f'surg 1\nmodel "bert"\n{load}').module, "bert"), theirs("one", "bert")) <= 1e-6
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, trainable_token_indices=[8, 3, 7], task_type="CAUSAL_LM")
    trained("one", "gpt2", config)
    module = api.compile(f'surg 1\nmodel "gpt2"\n{load}').module
    assert apart(outputs(module, "gpt2"), theirs("one", "gpt2")) <= 3e-6
    table = module.get_parameter("transformer.wte.weight")
    assert module.get_parameter("lm_head.weight") is table
    rows = next(v for k, v in load_file("one/adapter_model.safetensors").items() if "trainable_tokens" in k)
    assert torch.equal(table[[8, 3, 7]], rows)


def test_a_whole_change_goes_through_the_driver_and_back_to_peft(world: Path) -> None:
    trained("one", "bert", peft.RoadConfig(variant="road_2", group_size=8, target_modules=["query"]))
    made_ = api.compile('surg 1\nmodel "bert"\nadapter one = load("one")\nmerge linear of one * 1\nemit peft to "given"\n', force=True)
    assert apart(outputs(made_.module, "bert"), theirs("one", "bert")) <= 3e-6
    assert apart(theirs("given", "bert"), theirs("one", "bert")) <= 3e-6


def test_what_does_not_fit_or_is_no_change_says_so(world: Path, tmp_path: Path) -> None:
    def refused() -> Any:
        return api.plan('surg 1\nmodel "bert"\nadapter one = load("one")\nmerge linear of one * 1\n').diagnostics[-1]

    config, tensors = Path("one/adapter_config.json"), Path("one/adapter_model.safetensors")
    trained("one", "bert", peft.ShiraConfig(r=2, target_modules=["query"]))
    good = load_file(tensors)
    save_file({k: v + 1000 if "indices" in k else v for k, v in good.items()}, tensors)
    with pytest.raises(SurgeryError) as caught:
        api.compile('surg 1\nmodel "bert"\nadapter one = load("one")\nmerge linear of one * 1\nfold all\nemit torch to "never"\n')
    assert caught.value.diagnostics[0].code == "S0783" and not Path("never").exists()
    save_file({k: v for k, v in good.items() if "indices" not in k}, tensors)
    assert refused().code == "S0783" and "shira_indices" in refused().message
    trained("one", "bert", peft.RandLoraConfig(r=4, target_modules=["query"], save_projection=False))
    save_file({k: v for k, v in load_file(tensors).items() if "randlora_A" not in k}, tensors)
    assert refused().code == "S0783" and "random bases" in refused().message
    trained("one", "bert", peft.BOFTConfig(boft_block_size=8, target_modules=["query"]))
    save_file({k: v[:16].clone() if "boft_s" in k else v for k, v in load_file(tensors).items()}, tensors)
    assert refused().code == "S0785" and "another size" in refused().message
    trained("one", "bert", peft.TrainableTokensConfig(token_indices=[5, 9], target_modules=["word_embeddings"]))
    said = json.loads(config.read_text("utf-8"))
    for indices, number in (([5], "S0783"), ([5, 5], "S0783"), (["5", 9], "S0783"), ([5, 99], "S0785")):
        config.write_text(json.dumps({**said, "token_indices": indices}), "utf-8")
        assert refused().code == number
    for kind, why in WHY_NOT.items():
        config.write_text(json.dumps({"peft_type": kind}), "utf-8")
        assert refused().code == "S0782" and refused().notes == (why,)


@pytest.mark.parametrize(
    ("name", "part", "change", "words"),
    [
        ("gralora hybrid", "A_general", None, "no `gralora_A_general`"),
        ("miss", "miss_block", lambda t: t[:3], "blocks of 5"),
        ("miss bat", "miss_block", lambda t: t.long(), "int64"),
        ("fourierft", "spectrum", lambda t: t[:7], "says 20"),
        ("coft shared, exact", "oft_R", lambda t: torch.cat([t, t]), "block_share"),
        ("vblora", "vector_bank", lambda t: t.long(), "int64"),
        ("randlora", "randlora_B", lambda t: t.reshape(-1), "do not go together"),
        ("boft", "boft_s", lambda t: t[:0], "[0, 1]"),
        ("delora", "delora_w_norm", lambda t: t[:3], "do not go together"),
        ("road 4", "road_theta", lambda t: t[:9], "do not go together"),
    ],
)
def test_damaged_folders_are_refused_when_they_are_opened(name: str, part: str, change: Any, words: str, tmp_path: Path) -> None:
    stirred(KINDS[name]()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    kept = {k: change(v).clone() if part in k and change else v for k, v in tensors.items() if change or part not in k}
    save_file(kept, file)
    with pytest.raises(SurgeryError) as caught:
        open_adapter(str(tmp_path), "one", tmp_path, NOWHERE)
    found = caught.value.diagnostics[0]
    assert found.code == "S0783" and words in found.message, found.message
