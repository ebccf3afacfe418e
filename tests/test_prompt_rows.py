"""Virtual tokens of encoders: against peft, through cuts, folds and exports."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import surgery as api
from surgery.core.diagnostics import SurgeryError
from surgery.folding import fold_all
from surgery.model.cost import count
from surgery.model.live import Tensors
from surgery.model.program import Origin, Program
from surgery.model.runtime import build_module
from surgery.passes import registry
from tests import fixtures
from tests.caching import capture_cache
from tests.captured_programs import live_model, zoo_program
from tests.workbench import difference, operation, outputs, perturb, run
from tests.zoo import ZOO

peft = pytest.importorskip("peft")

N = 4
PROMPT = f"insert prompt(length = {N}) on embed.tokens\n"


def attached(family: str) -> tuple[Program, list[Tensor]]:
    program, flat = zoo_program(family)
    run(program, operation(program, "insert", "prompt", ["embed.tokens"], length=N))
    perturb(program, 0.5)
    return program, flat


def with_peft(model: nn.Module, rows: Tensor, task: str) -> nn.Module:
    """The model with peft's prompt of these embeddings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = peft.get_peft_model(copy.deepcopy(model), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=len(rows)))
    wrapped.prompt_encoder["default"].embedding.weight.data.copy_(rows)
    found: nn.Module = wrapped.eval()
    return found


def test_an_encoder_computes_what_peft_computes(family: str = "roberta") -> None:
    """Rows of the real tokens and what is pooled from the first position, with and without padding; peft returns the virtual rows, too."""
    program, _ = attached(family)
    tensors = Tensors(registry.function)
    module = build_module(program, tensors.all(program))
    theirs = with_peft(live_model(family), tensors.of(program, "prompt.embeddings"), "FEATURE_EXTRACTION")
    for batch, length in ((2, 9), (1, 5)):
        given = {k: v for k, v in ZOO[family].inputs(batch, length).items() if k in program.signature.parameters}
        given |= {k: torch.zeros_like(v) for k, v in given.items() if k == "token_type_ids"}  # peft takes none here
        with torch.no_grad():
            want, got = theirs(**given), module(**given)
            plain = live_model(family)(**given)
        seen = given["attention_mask"].bool()
        assert got[0].shape == (batch, length, 32) and want[0].shape == (batch, N + length, 32)
        assert difference([got[0][seen], got[1]], [want[0][:, N:][seen], want[1]]) <= 1e-6
        assert difference([got[0][seen], got[1]], [plain[0][seen], plain[1]]) > 1e-3


def test_folding_leaves_rows_as_they_are_and_they_can_be_switched_off() -> None:
    program, flat = attached("bert")
    before = outputs(program, *flat)
    (change,) = fold_all(program, Origin(verb="emit", method="fold"))
    assert "constants as they are" in change.note and change.removed == change.added == 0
    assert difference(outputs(program, *flat), before) == 0
    program.module("prompt").active = False
    assert difference(outputs(program, *flat), outputs(zoo_program("bert")[0], *flat)) == 0


def test_more_tokens_are_more_work() -> None:
    """In products, whose work grows with the tokens alone, and in attention, where it grows with their square."""
    plain, grown = count(zoo_program("bert")[0], 8 + N).total, count(attached("bert")[0], 8)
    assert grown.total == plain and grown.tokens == 8


def test_layers_go_from_behind_them() -> None:
    program, flat = attached("bert")
    run(program, operation(program, "prune", "layers", ["layers[0]", "layers[1]", "layers[2]"], count=1, score="random"))
    assert [tuple(t.shape) for t in outputs(program, *flat)] == [(2, 9, 32), (2, 32)]


def test_what_has_no_place_says_so() -> None:
    for role, length, why in (("embed.positions", N, "token ids"), ("embed.tokens", 64, "leave none")):
        program, _ = zoo_program("bert")
        with pytest.raises(SurgeryError) as caught:
            run(program, operation(program, "insert", "prompt", [role], length=length))
        assert caught.value.diagnostics[0].code == "S0491" and why in caught.value.diagnostics[0].message


# ------------------------------------------------------------------ a classifier, through the driver


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nn.Module]:
    import transformers

    folder = tmp_path_factory.mktemp("classifier")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setenv("SURGERY_CACHE", str(capture_cache(tmp_path_factory)))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=99, max_position_embeddings=64, num_labels=3
    )  # fmt: skip
    model: nn.Module = transformers.BertForSequenceClassification(config).eval()
    fixtures.save(model, folder / "base")
    yield transformers.BertForSequenceClassification.from_pretrained(folder / "base").eval()
    patch.undo()


def compiled(text: str) -> Any:
    return api.compile(f'surg 1\nmodel "base"\n{text}', force=True)


def sentences(batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": ids % 2}


def test_a_classifier_pools_the_first_virtual_token_as_with_peft(classifier: nn.Module) -> None:
    module = compiled(PROMPT).module
    rows = dict(module.named_parameters())["prompt.embeddings"]
    with torch.no_grad():
        rows.add_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(3)))
    given = sentences(3, 11)
    with torch.no_grad():
        want = with_peft(classifier, rows, "SEQ_CLS")(**given).logits
        assert difference([module(**given).logits], [want]) <= 1e-6
        assert difference([classifier(**given).logits], [want]) > 1e-4
    module.train()(**given).logits.square().mean().backward()
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["prompt.embeddings"]
    assert rows.grad is not None and (rows.grad.abs().sum(1) > 0).all()


def test_it_is_cut_along_and_exported(classifier: nn.Module) -> None:
    """A narrower stream takes features off the embeddings; heads go as ever; the served graph has the rows."""
    ort = pytest.importorskip("onnxruntime")
    made = compiled(
        PROMPT + "adapt lora(rank = 2) on layers[0].attn.q\nprune heads(ratio = 50%, score = magnitude) on layers[0].attn\n"
        'prune width(ratio = 50%, score = magnitude)\nemit onnx to "kept.onnx"\n'
    )  # fmt: skip
    assert made.module.prompt.embeddings.shape == (N, 16)
    claims = [c["claim"] for c in made.certificates]
    assert all(c["ok"] for c in made.certificates) and {"removed = masked", "folded = unfolded", "torch = onnx"} <= set(claims)
    session = ort.InferenceSession("kept.onnx", providers=["CPUExecutionProvider"])
    given = sentences(2, 7)
    (got,) = session.run(None, {i.name: given[i.name].numpy() for i in session.get_inputs()})
    with torch.no_grad():
        want = made.module(**given).logits
    assert np.abs(got - want.numpy()).max() <= 1e-5
