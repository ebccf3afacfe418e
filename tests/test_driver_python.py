"""The Python interface as documented: check, plan, compile, load, save, capture, with references, live modules and texts."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import surgery as api
from tests.driver_support import LORA, ROOT, checkpoint, model, write
from tests.zoo import ZOO


class Mlp(nn.Module):
    """A hand-written model that no table knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 24)
        self.second = nn.Linear(24, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))  # type: ignore[no-any-return]


def test_names_and_signatures() -> None:
    """What the documentation of the language promises; more may be accepted."""
    promised = {
        "check": ["text", "path"], "plan": ["spec", "model", "set"], "compile": ["spec", "model", "out", "set", "locked", "inputs"],
        "load": ["path", "device", "dtype"], "capture": ["module", "inputs", "dynamic"], "save": ["module", "path"],
    }  # fmt: skip
    for name, parameters in promised.items():
        found = inspect.signature(getattr(api, name)).parameters
        assert [p for p in parameters if p not in found] == [], name
        assert name in dir(api)
    assert inspect.isclass(api.Method) and callable(api.param) and issubclass(api.SurgeryError, Exception)
    assert callable(api.train.Controller) and callable(api.train.Callback)
    with pytest.raises(AttributeError, match="nothing_like_this"):
        api.nothing_like_this  # noqa: B018


def test_check_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys, surgery; found = surgery.check('surg 1\\nadapt lora(rnk = 4) on layers\\n'); print([d.code for d in found], 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("['S0212'] False\n", "")


def test_check(here: Path) -> None:
    assert api.check(LORA) == []
    found = api.check("surg 1\nadapt lora(rank = 0) on layers\n", path="mine.surg")
    assert [(d.code, d.span.source.name, d.span.line) for d in found] == [("S0222", "mine.surg", 2)]


def test_plan_of_text_and_path(here: Path) -> None:
    reference = model("bert")
    plan = api.plan(LORA, reference)
    assert isinstance(plan, api.Plan) and plan.ok and plan.totals is not None and plan.totals.trainable == 1536
    path = write("a.surg", "surg 1\nparam r = 4\nadapt lora(rank = r) on layers[*].attn.{q, v}\n")
    for given in (path, str(path)):
        assert api.plan(given, reference, set={"r": "8"}).totals.trainable == 3072  # type: ignore[union-attr]
    bad = api.plan("surg 1\nadapt lora(rank = 4) on layers[*].attn.qq\n", reference)
    assert not bad.ok and [d.code for d in bad.diagnostics] == ["S0301"] and bad.totals is None


def test_errors_carry_diagnostics(here: Path) -> None:
    for spec, reference, code in (
        ("surg 1\nadapt lora(rnk = 4) on layers\n", None, "S0212"),
        (LORA, None, "S0701"),
        (LORA, "nowhere", "S0701"),
        ("surg 1\nadapt lora(rank = 4) on layers[*].attn.qq\n", model("bert"), "S0301"),
    ):
        with pytest.raises(api.SurgeryError) as caught:
            api.compile(spec, reference)
        assert [d.code for d in caught.value.diagnostics] == [code]
        assert code in str(caught.value) or caught.value.diagnostics[0].message in str(caught.value)


def test_compile_a_reference(here: Path) -> None:
    result = api.compile(LORA + 'emit torch to "made"\n', checkpoint("bert"), out="build")
    assert isinstance(result, api.Result)
    assert result.artifacts[0] == Path("build/made") and result.lock is None
    assert {c["claim"] for c in result.certificates} == {"unchanged at init", "loaded = program"} and all(
        c["ok"] for c in result.certificates
    )
    live = ZOO["bert"].make_model()
    given = ZOO["bert"].inputs(2, 11)
    loaded = api.load("build/made")
    with torch.no_grad():
        want, made, read = (m.eval()(**given) for m in (live, result.module, loaded))
    assert type(read) is type(want)
    assert torch.equal(made.last_hidden_state, read.last_hidden_state) and torch.allclose(
        want.last_hidden_state, read.last_hidden_state, atol=1e-6
    )
    assert api.load("build/made", dtype=torch.bfloat16)(**given).last_hidden_state.dtype == torch.bfloat16


def test_two_texts_do_not_replace_each_other(here: Path) -> None:
    reference = model("bert")
    text = LORA + 'emit torch to "made"\n'
    api.compile(text, reference)
    api.compile(text, reference)
    with pytest.raises(api.SurgeryError) as caught:
        api.compile(text.replace("4", "8"), reference)
    assert [d.code for d in caught.value.diagnostics] == ["S0803"]
    api.compile(text.replace("4", "8"), reference, force=True)


def test_train_save_load(here: Path) -> None:
    api.compile(LORA + 'emit torch to "made"\n', model("bert"))
    module = api.load("made").train()
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    given = ZOO["bert"].inputs(4, 9)
    losses = []
    for _ in range(4):
        loss = module(**given).last_hidden_state[:, 0, :4].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert api.save(module, "kept") == Path("kept")
    again = api.load("kept")
    with torch.no_grad():
        assert torch.equal(module.eval()(**given).last_hidden_state, again.eval()(**given).last_hidden_state)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {n for n, p in module.named_parameters() if p.requires_grad}
    with pytest.raises(api.SurgeryError) as caught:
        api.save(nn.Linear(2, 2), "linear")
    assert [d.code for d in caught.value.diagnostics] == ["S0820"]


def test_compile_a_hand_written_module(here: Path) -> None:
    torch.manual_seed(0)
    mlp, x = Mlp(), torch.randn(3, 12)
    spec = 'surg 1\nadapt lora(rank = 2) on "first", "second"\nexpect trainable == 130\nexpect same_output(at = init) within 1e-6\nemit torch to "mlp"\n'
    result = api.compile(spec, mlp, inputs=(x,))
    loaded = api.load("mlp")
    other = torch.randn(7, 12)
    with torch.no_grad():
        for module in (result.module, loaded):
            assert torch.allclose(module.eval()(other), mlp(other), atol=1e-6)
    assert sorted(n for n, p in loaded.named_parameters() if p.requires_grad) == sorted(
        n for n in dict(loaded.named_parameters()) if ".lora." in n
    )
    assert not {id(p) for p in result.module.parameters()} & {id(p) for p in mlp.parameters()}
    assert all(p.requires_grad for p in mlp.parameters()), "the module that was given is as it was"
    # the artifact is a model like any other
    folded = api.compile('surg 1\nfold all on "first", "second"\nexpect params == 437\nemit torch to "flat"\n', "mlp")
    assert folded.plan.totals is not None and folded.plan.totals.params_after == sum(p.numel() for p in mlp.parameters())
    with torch.no_grad():
        assert torch.allclose(api.load("flat").eval()(other), mlp(other), atol=1e-6)


def test_compile_a_plain_transformer(here: Path) -> None:
    """torch's own encoder has roles like any other model, though no table knows it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(2, 6, 32)
    result = api.compile(
        'surg 1\nadapt lora(rank = 2) on layers[*].attn.{q, v}, layers[*].ffn.up\nexpect layers == 2\nexpect heads == 8\nemit torch to "enc"\n',
        encoder, inputs=(x,),
    )  # fmt: skip
    roles = [s.role for s in result.plan.steps[0].sites]
    assert roles == [f"layers[{i}].attn.{r}" for i in range(2) for r in "qv"] + [f"layers[{i}].ffn.up" for i in range(2)]
    assert result.plan.totals is not None
    assert result.plan.totals.params_before == sum(p.numel() for p in encoder.parameters())
    assert result.plan.totals.trainable == 2 * (2 * 2 * 64 + 2 * 96)
    other = torch.randn(3, 9, 32)
    with torch.no_grad():
        assert torch.allclose(api.load("enc").eval()(other), encoder(other), atol=1e-5)


def test_a_module_without_inputs_says_so() -> None:
    with pytest.raises(api.SurgeryError) as caught:
        api.plan('surg 1\nadapt lora(rank = 2) on "first"\n', Mlp())
    assert [d.code for d in caught.value.diagnostics] in (["S0505"], ["S0506"])


def test_capture() -> None:
    program = api.capture(Mlp(), (torch.randn(3, 12),), dynamic="batch")
    assert [n for n in program.weights] == ["first.weight", "first.bias", "second.weight", "second.bias"]
    assert program.info.architecture == "Mlp" and len(program.info.hash) == 64


class Tied(nn.Module):
    """One module under two names and one weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.inner = nn.Linear(8, 8)
        self.again = self.inner
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.again(torch.relu(self.inner(self.table(x))))))  # type: ignore[no-any-return]


def test_a_hand_written_module_with_shared_tensors(here: Path) -> None:
    torch.manual_seed(0)
    module, ids = Tied(), torch.randint(0, 20, (2, 6))
    spec = 'surg 1\nadapt lora(rank = 2) on "table", "inner"\nexpect same_output(at = init) within 1e-6\nemit torch to "out"\n'
    api.compile(spec, module, inputs={"x": ids})
    loaded = api.load("out")
    torch.testing.assert_close(loaded(ids), module(ids))
    assert loaded.out.weight is loaded.table.weight
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == 2 * (20 + 8) + 2 * (8 + 8)
