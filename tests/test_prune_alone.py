"""Heads of one layer behind a shared table of position biases: ``prune heads(alone = true)``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import surgery
from surgery.core.diagnostics import SurgeryError
from tests.zoo import ZOO

ALONE = "prune heads(keep = 3, alone = true) on encoder.layers[1].attn\n"


def masked(model: torch.nn.Module, inputs: dict[str, torch.Tensor], block: int, heads: list[int]) -> torch.Tensor:
    """The live model's output with some heads' inputs of an output projection set to zero."""
    o = model.get_submodule(f"encoder.block.{block}.layer.0.SelfAttention.o")

    def zero(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        x = args[0].clone().unflatten(-1, (4, 8))
        x[..., heads, :] = 0
        return (x.flatten(-2),)

    handle = o.register_forward_pre_hook(zero)
    try:
        with torch.no_grad():
            return model(**inputs).last_hidden_state  # type: ignore[no-any-return]
    finally:
        handle.remove()


def test_one_layer_loses_heads_and_the_others_keep_theirs(here: Path) -> None:
    entry = ZOO["t5"]
    torch.manual_seed(0)
    model = entry.make_model().eval()
    model.save_pretrained("t5")
    inputs = {k: v for k, v in entry.inputs(2, 9).items() if isinstance(v, torch.Tensor)}
    result = surgery.compile(f'surg 1\n\n{ALONE}\nemit torch to "cut"\nemit onnx to "cut.onnx"\n', "t5")
    claims = {c["claim"]: c for c in result.certificates}
    assert claims["independent = shared"]["max_abs_error"] == 0.0 and claims["removed = masked"]["ok"]
    step = result.plan.steps[0]
    gone = [int(f.split("removed: ")[1].split(" of ")[0]) for f in step.facts if f.startswith("removed: ")]
    assert len(gone) == 1 and sum(s.removed for s in step.sites) == 4 * 8 * 32
    want = masked(model, inputs, 1, gone)
    with torch.no_grad():
        assert (result.module.eval()(**inputs).last_hidden_state - want).abs().max() <= 1e-5
    feeds = {n: t.numpy() for n, t in inputs.items()}
    for part in ("encoder", "decoder"):
        session = onnxruntime.InferenceSession(f"cut.{part}.onnx")
        for own in (i for i in session.get_inputs() if ".decoder." in i.name):  # nothing was decoded yet
            feeds[own.name] = np.zeros([2, own.shape[1], 0, own.shape[3]], np.float32)
        names = [o.name for o in session.get_outputs()]
        out = dict(zip(names, session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()}), strict=True))
        last = out["last_hidden_state"]
        feeds |= {"encoder_hidden_states": last, "encoder_attention_mask": feeds["attention_mask"]}
        feeds |= {n.replace("present", "past_key_values"): v for n, v in out.items() if n.startswith("present.")}
    assert np.abs(last - want.numpy()).max() <= 1e-4

    again = surgery.compile("surg 1\n\n" + ALONE.replace("3, alone", "2, alone").replace("layers[1]", "layers[0..1]"), "cut")
    sizes = {s.role: (s.shape_before, s.shape_after) for s in again.plan.steps[0].sites}
    assert sizes == {"encoder.layers[0].attn": ((4,), (2,)), "encoder.layers[1].attn": ((3,), (2,))}
    assert all(c["ok"] for c in again.certificates)


def test_without_the_parameter_the_help_names_it(here: Path) -> None:
    Path("t5.json").write_text(json.dumps({"architectures": ["T5Model"], **ZOO["t5"].plain_config}), "utf-8")
    with pytest.raises(SurgeryError) as caught:
        surgery.compile("surg 1\n\n" + ALONE.replace(", alone = true", ""), "config:t5.json")
    found = caught.value.diagnostics[0]
    assert found.code == "S0445" and any("alone = true" in line for line in found.help)
    share = "surg 1\n\nshare layers(groups = pairs) on encoder.layers[0..1]\n"
    with pytest.raises(SurgeryError) as caught:
        surgery.compile(share + "prune heads(keep = 3) on encoder.layers[0].attn\n", "config:t5.json")
    assert not any("alone" in line for d in caught.value.diagnostics for line in d.help)
