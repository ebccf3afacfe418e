"""Converted models from spec to file: emitted, exported, loaded, trained, and cut and folded by a second spec."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.core.diagnostics import SurgeryError
from surgery.model.moe import RouterTap
from tests.zoo import Entry, text

BERT = dict(vocab_size=99, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64)
ENTRY = Entry("bert", "BertForMaskedLM", BERT, text)
SPEC = """surg 1

convert moe(experts = 4, top_k = 2, balance = 0.1, z = 0.01) on layers[0].ffn as copies
convert moe(experts = 3, top_k = 2, split = widenet, capacity = 1.2, jitter = 0.1) on layers[1].ffn as wide

emit torch to "out"
emit onnx to "out.onnx"
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The compiled spec: ``result`` and the folder it stands in."""
    folder = tmp_path_factory.mktemp("moe")
    ENTRY.make_model().save_pretrained(folder / "bert")  # type: ignore[operator]
    (folder / "spec.surg").write_text(SPEC, "utf-8")
    result = surgery.compile(folder / "spec.surg", str(folder / "bert"), out=folder, use_cache=False)
    return SimpleNamespace(result=result, folder=folder)


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (4, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def still(model: nn.Module) -> None:
    """No dropout and no noise: two passes give the same."""
    for m in model.modules():
        for name in ("p", "jitter"):
            if isinstance(getattr(m, name, None), float):
                setattr(m, name, 0.0)


def test_claims_are_measured_where_nothing_changes(work: Any) -> None:
    claims = {c["claim"]: c for c in work.result.certificates}
    assert claims["experts = dense at init"]["ok"] and claims["experts = dense at init"]["max_abs_error"] < 1e-5
    assert claims["torch = onnx"]["ok"] and claims["loaded = program"]["max_abs_error"] == 0


def test_routes_in_onnx_as_in_torch(work: Any) -> None:
    """Every token goes to its own experts there, too: on inputs of other sizes and with padding, in one file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(work.folder / "out.onnx"))
    model = surgery.load(work.folder / "out")
    for seed, (rows, length) in enumerate([(1, 1), (3, 30), (5, 9)]):
        given = batch(seed)
        ids = (
            given["input_ids"].reshape(-1)[: rows * length].reshape(rows, -1)
            if rows * length <= 48
            else torch.randint(3, 90, (rows, length))
        )
        mask = torch.ones_like(ids)
        if length > 4:
            mask[-1, -3:] = 0
        named = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        wanted = model(**named).logits.detach().numpy()
        found = session.run(None, {i.name: named[i.name].numpy() for i in session.get_inputs()})[0]
        assert np.abs(found - wanted).max() < 1e-4


def test_trains_with_its_extra_losses(work: Any) -> None:
    from surgery.train import Callback, Controller

    model = surgery.load(work.folder / "out").train()
    given, labels = batch(), batch(1)["input_ids"]
    taps = [m for m in model.modules() if isinstance(m, RouterTap)]
    assert [(t.balance, t.z, t.jitter) for t in taps] == [(0.1, 0.01, 0.0), (0.01, 0.0, 0.1)]
    still(model)
    controller = Controller(model, torch.optim.AdamW(model.parameters(), lr=5e-3))
    plain = model(**given, labels=labels).loss
    extra = controller.extra_loss()
    # two routers, nearly uniform at the start: 0.1 + 0.01 (log 4)^2 and 0.01
    assert extra is not None and float(extra) == pytest.approx(0.1 + 0.01 * np.log(4) ** 2 + 0.01, rel=0.1)
    assert controller.extra_loss() is None
    (plain + extra).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if ".experts." in n or n.endswith("moe.gate.weight")}
    assert len(grads) == 10 and all(g is not None for g in grads.values())
    for name, grad in grads.items():
        assert all(float(part.abs().max()) > 0 for part in grad), name  # type: ignore[union-attr]
    model.zero_grad()
    losses = [float(controller.step(lambda: model(**given, labels=labels).loss)) for _ in range(25)]
    assert losses[-1] < 0.6 * losses[0]
    callback = Callback(model)  # as the Hugging Face Trainer sees the loss
    with_extra = model(**given, labels=labels)["loss"]
    callback._hook.remove()
    without = model(**given, labels=labels)["loss"]
    more = controller.extra_loss()
    assert more is not None and float(with_extra - without) == pytest.approx(float(more), rel=1e-3) and float(more) > 0.1


def test_checkpointed_layers_give_the_same_loss_and_gradients(work: Any) -> None:
    from surgery.train import Controller

    found = []
    for checkpointed in (False, True):
        model = surgery.load(work.folder / "out").train()
        still(model)
        if checkpointed:
            model.gradient_checkpointing_enable()
        controller = Controller(model)
        for _ in range(2):  # what a recomputation notes must not reach the next step
            model.zero_grad()
            loss = model(**batch(), labels=batch(1)["input_ids"]).loss + controller.extra_loss()
            loss.backward()
        found.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()
    for name, grad in found[0][1].items():
        torch.testing.assert_close(grad, found[1][1][name], atol=1e-6, rtol=1e-5)


def test_runs_in_half_precision_and_under_autocast(work: Any) -> None:
    model = surgery.load(work.folder / "out")
    exact = model(**batch()).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.train()(**batch(), labels=batch(1)["input_ids"]).loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    half = model.eval().bfloat16()(**batch()).logits
    assert half.dtype == torch.bfloat16 and float((half.float() - exact).abs().max()) < 0.1


def test_a_second_spec_cuts_adapts_and_folds(work: Any) -> None:
    spec = """surg 1
prune experts(keep = 3) on layers[0].ffn
adapt lora(rank = 2) on layers[*].ffn.experts.{up, down}, layers[1].ffn.router as extra
fold all on @extra
emit torch to "second"
"""
    (work.folder / "second.surg").write_text(spec, "utf-8")
    result = surgery.compile(work.folder / "second.surg", str(work.folder / "out"), out=work.folder, use_cache=False)
    assert {"removed = masked", "loaded = program"} <= {c["claim"] for c in result.certificates if c["ok"]}
    model = surgery.load(work.folder / "second")
    assert model.get_parameter("bert.encoder.layer.0.moe.experts.up_proj").shape == (3, 24, 16)
    assert not any("lora" in n for n, _ in model.named_parameters())
    with pytest.raises(SurgeryError) as caught:
        surgery.compile("surg 1\nadapt lora(rank = 2) on layers[*].ffn.up\n", str(work.folder / "second"), out=work.folder)
    (problem,) = caught.value.diagnostics
    assert problem.code == "S0402" and problem.labels[0].text == "selects `up` of 2 layers; all are gone"
    assert {la.text for la in problem.labels[1:]} == {
        "layers[0].ffn was replaced by experts here",
        "layers[1].ffn was replaced by experts here",
    }
    assert problem.labels[1].span.text.startswith("convert moe(experts = 4")
    assert problem.help == ("name what is there now: `layers[0].ffn.experts.up, layers[1].ffn.experts.up`",)


# ------------------------------------------------------------------ routers from data


def test_routers_from_data_know_the_parts(tmp_path: Path) -> None:
    """With one of four parts at work, the router that was fitted on tokens keeps much more of the output than one that guesses."""
    from tests import fixtures

    name = fixtures.model("text-bert", tmp_path)
    words = [f"w{i}" for i in range(5, 60)]
    lines = [" ".join(words[(7 * i + 3 * j) % len(words)] for j in range(12)) for i in range(24)]
    (tmp_path / "calib.txt").write_text("\n".join(lines) + "\n", "utf-8")
    errors = {}
    for init in ("data", "normal"):
        spec = tmp_path / f"{init}.surg"
        using = " using text" if init == "data" else ""
        spec.write_text(
            'surg 1\ndata text = lines("calib.txt")\n'
            f"convert moe(experts = 4, top_k = 1, split = moefication, init = {init}) on layers[*].ffn{using}\n", "utf-8",
        )  # fmt: skip
        module = surgery.compile(spec, str(tmp_path / name), out=tmp_path, use_cache=False).module.eval()
        again = surgery.compile(spec, str(tmp_path / name), out=tmp_path / "again", use_cache=False).module if init == "data" else module
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), again.state_dict().values(), strict=True))
        errors[init] = _agreement(module)
    assert errors["data"] > 0.5 and errors["normal"] < 0.4
    spec.write_text('surg 1\ndata text = lines("calib.txt")\nconvert moe(experts = 4) on layers[*].ffn using text\n', "utf-8")
    copies = surgery.compile(spec, str(tmp_path / name), out=tmp_path, use_cache=False)
    assert all(c["ok"] for c in copies.certificates if c["claim"] == "experts = dense at init")
    load = _load(copies.module.eval())
    assert float(load.min()) > 0.1 and float(load.max()) < 0.4  # like tokens start together, and no expert is idle


def _seen(module: nn.Module) -> tuple[Tensor, nn.Module]:
    """What enters the first block's router for 64 tokens, and the block."""
    kept: list[Tensor] = []
    block = module.get_submodule("encoder.layer.0.moe")
    handle = block.gate.register_forward_pre_hook(lambda m, args: kept.append(args[0].detach()))  # type: ignore[union-attr]
    with torch.no_grad():
        module(input_ids=torch.randint(5, 60, (4, 16), generator=torch.Generator().manual_seed(9)))
    handle.remove()
    return kept[0], block


def _agreement(module: nn.Module) -> float:
    """How often the router chooses the part that adds most to the output."""
    x, block = _seen(module)
    e: Any = block.experts
    inner = torch.nn.functional.gelu(torch.einsum("nd,efd->nef", x, e.up_proj) + e.up_proj_bias).abs()
    best = (inner * e.down_proj.norm(dim=1)).sum(-1).argmax(-1)
    return float((block.gate(x).argmax(-1) == best).float().mean())  # type: ignore[operator]


def _load(module: nn.Module) -> Tensor:
    x, block = _seen(module)
    chosen = block.gate(x).topk(2).indices.reshape(-1)  # type: ignore[operator]
    return torch.bincount(chosen, minlength=4) / len(chosen)


def test_the_plan_says_what_compile_does(work: Any) -> None:
    plan = surgery.plan(work.folder / "spec.surg", str(work.folder / "bert"), use_cache=False)
    strip = [(s.role, s.shape_before, s.shape_after, s.added, s.trainable, s.note) for step in plan.steps for s in step.sites]
    done = [(s.role, s.shape_before, s.shape_after, s.added, s.trainable, s.note) for step in work.result.plan.steps for s in step.sites]
    assert strip == done and strip[0][:4] == ("layers[0].ffn", (24,), (4, 24), 3 * (2 * 16 * 24 + 24 + 16) + 4 * 16)


@pytest.mark.parametrize("top_k", [2, 4])  # with all experts on the claim meets the weight, else the writer does
def test_clusters_of_weights_that_are_not_finite_point_at_the_statement(work: Any, tmp_path: Path, top_k: int) -> None:
    model = ENTRY.make_model()
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight[3, 2] = float("nan")  # type: ignore[index,union-attr]
    model.save_pretrained(tmp_path / "bad")  # type: ignore[operator]
    spec = f'surg 1\nconvert moe(experts = 4, top_k = {top_k}, split = moefication) on layers[1].ffn\nemit torch to "out"\n'
    with pytest.raises(SurgeryError) as caught:
        surgery.compile(spec, str(tmp_path / "bad"), out=tmp_path)
    (found,) = caught.value.diagnostics
    assert (found.code, found.labels[0].span.line) == ("S0752", 2) and not (tmp_path / "out").exists()
