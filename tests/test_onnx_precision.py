"""ONNX in half precision: numbers against torch in the same precision, and what the file says of itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import fx

from surgery.backends import onnx_faults
from surgery.core.diagnostics import SurgeryError
from tests.driver_support import LORA, model, surgery, write

TOLERANCE = {"fp16": 4e-3, "bf16": 4e-2}
TYPES = {"fp16": (10, torch.float16), "bf16": (16, torch.bfloat16)}


def emitted(family: str, precision: str, more: str = "") -> tuple[dict[str, object], Path]:
    write("a.surg", LORA + f'emit torch to "out"\nemit onnx(precision = {precision}{more}) to "out.onnx"\n')
    ran = surgery("compile", "a.surg", model(family), "--format", "json")
    assert ran.code == 0, ran.out
    return ran.json, Path("out.onnx")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(("family", "output"), [("bert", "last_hidden_state"), ("llama", "logits")])
def test_half_precision(here: Path, family: str, output: str, precision: str) -> None:
    """A tiny encoder and a tiny decoder: the graph computes in the precision what torch computes in it, up to a few roundings."""
    import onnx

    import surgery as api
    from surgery.backends.to_onnx import as_numpy, checked_session

    found, path = emitted(family, precision)
    code, dtype = TYPES[precision]
    graph = onnx.load(path)
    floats = [i for i in graph.graph.initializer if i.data_type in (1, 10, 16) and len(i.dims) == 2]
    assert floats and all(i.data_type == code for i in floats), "weights are stored in the precision"
    claims = [c for c in found["certificates"] if c["claim"] == "torch = onnx"]  # type: ignore[attr-defined]
    assert claims and all(c["ok"] for c in claims) and any(c["max_abs_error"] > 0 for c in claims)
    assert all(("runtime" in c) == (precision == "bf16") for c in claims), "said when onnxruntime has no kernels"
    module = api.load("out", dtype=dtype).eval()
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        want = module(input_ids=ids, attention_mask=mask)[0]
        exact = api.load("out").eval()(input_ids=ids, attention_mask=mask)[0]
    run = checked_session(graph)
    given = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    feeds = {}
    for i in run.get_inputs():
        if i.name in given:
            feeds[i.name] = as_numpy(given[i.name])
        elif i.name == "position_ids":
            feeds[i.name] = np.arange(9)[None].repeat(2, 0)
        else:  # an empty cache
            shape = next(v for v in graph.graph.input if v.name == i.name).type.tensor_type.shape.dim
            feeds[i.name] = as_numpy(torch.zeros(2, shape[1].dim_value, 0, shape[3].dim_value, dtype=dtype))
    names = [o.name for o in run.get_outputs()]
    got = torch.from_numpy(run.run(None, feeds)[names.index(output)].astype(np.float32))
    live = mask.bool()
    error = (want.float() - got)[live].abs().max()
    assert error <= TOLERANCE[precision] * max(1.0, float(want.abs().max()))
    assert (exact - got)[live].abs().max() > 0, "it does compute in the precision"


def test_convolutions_in_bf16_need_a_newer_opset(here: Path) -> None:
    write("a.surg", LORA + 'emit onnx(precision = bf16) to "out.onnx"\n')
    ran = surgery("compile", "a.surg", model("vit"))
    assert (ran.code, ran.codes) == (1, ["S0841"]) and "write `opset = 22`" in ran.err
    assert not Path("out.onnx").exists()


def test_models_that_pick_experts_are_told_apart_when_rounding_fails() -> None:
    """What half precision changed may be a choice, which no other opset mends."""
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.aten.topk.default, (graph.placeholder("scores"), 2)))
    root = fx.GraphModule(torch.nn.Module(), graph)
    (said,) = onnx_faults.half_chooses(root, "bf16")
    assert "experts" in said and onnx_faults.half_chooses(root, "fp32") == []
    failed = {"ok": False, "output": "logits", "case": "random", "max_abs_error": 1.0, "tolerance": 0.1}
    with pytest.raises(SurgeryError) as caught:
        onnx_faults.refuse_other([failed], None, [said])
    assert said in caught.value.diagnostics[0].help and not any("report" in line for line in caught.value.diagnostics[0].help)
