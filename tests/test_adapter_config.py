"""Configs of adapter folders with one field changed: what is computed is what peft computes with that folder, or the folder is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery.core.diagnostics import SurgeryError
from surgery.core.source import NOWHERE
from surgery.model.adapter import open_adapter
from surgery.model.adapter_targets import left_out
from tests.test_adapter_dense import T, stirred
from tests.test_adapter_kinds import apart
from tests.test_adapter_more import KINDS, X, module_of

peft = pytest.importorskip("peft")

CHANGES: list[tuple[str, str, Any]] = [
    (kind, field, value)
    for kind, field, values in (
        ("waveft", "n_frequency", (19, "x", None)), ("waveft", "scaling", (3.5, "x", True)), ("waveft", "use_idwt", (False, 0)),
        ("waveft", "wavelet_family", ("db2", "sym4", "haar", "other", 3)), ("waveft", "random_loc_seed", (5, "x")),
        ("waveft", "target_modules", (["up"], "up", ["other"], {"up": 1}, "all-linear", 3)), ("waveft", "exclude_modules", (["up"], "down", [3])),
        ("waveft", "layers_to_transform", ([0], 3)), ("waveft", "modules_to_save", (["up"],)), ("waveft", "sideways", (True, 0.5, ["a"], {"a": 1})),
        ("waveft", "some_config", ({},)), ("glora", "config_A_B", ("vector", "none", 3)), ("glora", "config_C", ("vector", "none")),
        ("glora", "config_D_E", ("vector", "none")), ("deft", "alpha", (None, 0, 3, "x")), ("deft", "para", (True,)), ("deft", "r", (2, 30, "x")),
        ("deft", "decomposition_method", ("qr", "other")), ("osf", "effective_rank", (None, 3, 0.5, "x")), ("osf", "rank_pattern", ({}, {"up": 2})),
        ("peanut", "depth", (1, 3, "x")), ("peanut", "act_fn", ("relu", "tanh", "other")), ("peanut", "scaling", (2.0, "x")),
        ("supertuning", "lora_alpha", (8, "x")), ("supertuning", "r", (None, 3)), ("frod", "save_projection", (False,)), ("pvera", "r", (3,)),
        ("tinylora", "u", (9,)), ("unilora", "theta_d_length", (200,)),
    )
    for value in values
]  # fmt: skip
FOLDERS: dict[str, Path] = {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            stirred(KINDS[kind]()).save_pretrained(made[kind])
        return made[kind]

    return of


def theirs(folder: Path, base: nn.Module) -> Tensor | None:
    """What peft computes with a folder; None where it does not load it."""
    try:
        torch.manual_seed(3)
        with torch.no_grad():
            found: Tensor = peft.PeftModel.from_pretrained(base, str(folder)).eval()(X)
    except (Exception, SystemExit):
        return None
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "field", "value"), CHANGES)
def test_a_changed_field_gives_what_peft_has_or_is_refused(
    kind: str, field: str, value: Any, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    from tests.test_adapter_dense import Two

    source = folders(kind)
    config = json.loads((source / "adapter_config.json").read_text("utf-8"))
    (tmp_path / "adapter_model.safetensors").symlink_to(source / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, field: value}), "utf-8")
    try:
        outside = open_adapter(str(tmp_path), "one", tmp_path, NOWHERE).left_out
        if outside[0]:
            assert outside[1] == field
            return
        with torch.no_grad():
            got = module_of(tmp_path, Two())(X)
    except SurgeryError as exc:
        assert exc.diagnostics[0].code in ("S0782", "S0783"), exc.diagnostics[0].message
        return
    want = theirs(tmp_path, Two())
    assert want is None or apart(got, want) <= 4e-6


def test_layers_are_named_as_peft_names_them() -> None:
    """Against peft's own rule, for paths of several families."""
    from peft.tuners.tuners_utils import check_target_module_exists

    paths = [
        "encoder.layer.0.attention.query",
        "model.layers.11.self_attn.q_proj",
        "lm_head",
        "h.3.attn.c_attn",
        "blocks.1.layers.2.q_proj",
    ]
    fields: list[dict[str, Any]] = [
        {"target_modules": ["query", "q_proj"]}, {"target_modules": r".*layers\.1\d?\..*"}, {"target_modules": ["lm_head", "c_attn"], "layers_to_transform": [3]},
        {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": 11, "layers_pattern": "layers"},
        {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [2, 3], "layers_pattern": ["layers", "h"]},
        {"target_modules": ["q_proj", "query"], "exclude_modules": ["self_attn.q_proj"]}, {"target_modules": ["proj"], "layers_to_transform": []},
        {"target_modules": ["query", "q_proj"], "modules_to_save": ["attention"]}, {"target_modules": ["q_proj"], "exclude_modules": r"model\..*"},
    ]  # fmt: skip
    seen = set()
    for given in fields:
        for path in paths:
            want = bool(check_target_module_exists(peft.LoraConfig(**given), path))
            assert (left_out(given, [path], lambda *a: AssertionError(a)) == ("", "")) == want, (given, path)
            seen.add(want)
    assert seen == {True, False}


def test_a_bias_beside_a_module_that_is_saved_whole_is_no_part(tmp_path: Path) -> None:
    """peft saves the bias of the module that it replaced, too, and never reads it."""
    config = peft.LoraConfig(r=2, bias="all", modules_to_save=["norm"], **T)
    stirred(config).save_pretrained(tmp_path)
    assert any(
        "original_module" in k for k in __import__("safetensors").safe_open(str(tmp_path / "adapter_model.safetensors"), "pt").keys()
    )
    found = open_adapter(str(tmp_path), "one", tmp_path, NOWHERE)
    assert set(found.whole) == {"norm.weight", "norm.bias", "up.bias", "down.bias"} and set(found.parts) == {"up", "down"}
