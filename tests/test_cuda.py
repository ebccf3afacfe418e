"""On a CUDA device, where there is one: modules run and train there as on the processor, and what is compiled for the device computes the same.

``pytest tests/test_cuda.py`` on a machine with a device; elsewhere each test says that it was skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import surgery
from surgery.backends import aoti
from surgery.model import grouped
from surgery.model.live import Tensors, live_root
from surgery.passes import registry
from surgery.train import Controller
from tests import test_contract as contract
from tests.programs import LM, live, padded, program_for
from tests.workbench import difference
from tests.workbench import live as module_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = dict(vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, max_position_embeddings=64)
HALF = {"fp32": 2e-4, "fp16": 2e-2, "bf16": 1.5e-1}
BERT = "surg 1\nprune heads(ratio = 50%) on layers[*].attn\nadapt lora(rank = 8, dropout = 0%) on layers[*].attn.{q, v}\n"


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Products in float32 with all of their bits."""
    usual = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = usual


def folder(model: Any, place: Path) -> str:
    model.save_pretrained(place / "model")
    return str(place / "model")


def there(values: Any) -> Any:
    return {k: v.cuda() for k, v in values.items()}


@pytest.mark.parametrize("key", contract.ATTACHING, ids="/".join)
def test_a_method_computes_and_trains_as_on_the_processor(key: tuple[str, str]) -> None:
    """Outputs and, in training, the gradient of every parameter; nothing that a method makes while it runs lies elsewhere."""
    cls = contract.METHODS[key]
    program = contract.attached(key)
    contract.perturb(program)
    here, other = module_of(program), live_root(program, Tensors(registry.function), device="cuda")
    inputs = contract.inputs(cls)
    moved = [t.cuda() for t in inputs]
    with torch.no_grad():
        want, got = list(here(*inputs)), list(other(*moved))
    assert all(t.is_cuda for t in got) and difference([t.cpu() for t in got], want) < 1e-4
    for module, given in ((here, inputs), (other, moved)):
        sum(o.square().mean() for o in module(*given)).backward()
    for (name, p), q in zip(here.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            assert q.grad is not None and float((q.grad.cpu() - p.grad).norm()) <= 1e-3 * (1e-2 + float(p.grad.norm())), name
    if len(list(other.named_modules())) > 1:
        steps = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-3)
        controller = Controller(other.train(), steps)
        for _ in range(3):
            controller.step(lambda: sum(o.square().mean() for o in other(*moved)))
    assert all(torch.isfinite(p).all() for p in other.parameters())
    half = live_root(program, Tensors(registry.function), dtype=torch.bfloat16, device="cuda").eval()
    with torch.no_grad():
        rounded = [t.float().cpu() for t in half(*[t.bfloat16() if t.is_floating_point() else t for t in moved])]
    assert difference(rounded, want) < 0.1


def test_an_artifact_moves_and_trains(tmp_path: Path) -> None:
    reference = folder(live(BertModel, BertConfig(**SMALL), scale=2.0), tmp_path)
    surgery.compile(BERT + 'emit torch to "out"\n', reference, out=tmp_path)
    here, other = surgery.load(tmp_path / "out").eval(), surgery.load(tmp_path / "out").eval().cuda()
    tokens, mask = padded(3, 20)
    given = {"input_ids": tokens, "attention_mask": mask}
    with torch.no_grad():
        want, got = here(**given).last_hidden_state, other(**there(given)).last_hidden_state
    assert float((got.cpu() - want).abs().max()) < 1e-4
    target = torch.randn(want.shape, generator=torch.Generator().manual_seed(1)).cuda()
    other.train()
    steps = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = (other(**there(given)).last_hidden_state - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        steps.step()
        steps.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decoder_generates_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    model = live(LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2, **LM), scale=4.0)
    surgery.compile('surg 1\nprune kv_groups(keep = 1) on layers[0].attn\nemit torch to "out"\n', folder(model, tmp_path), out=tmp_path)
    tokens = padded(2, 9, left=True)
    given = {"input_ids": tokens[0], "attention_mask": tokens[1]}
    here, other = surgery.load(tmp_path / "out").eval(), surgery.load(tmp_path / "out").eval().cuda().to(dtype)
    more = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    want, got = here.generate(**given, **more), other.generate(**there(given), **more)
    if dtype is torch.float32:
        assert torch.equal(got.cpu(), want)
    without = other.generate(**there(given), **more, use_cache=False)
    same = float((got == without).float().mean())
    assert got.shape == without.shape and same > (0.99 if dtype is torch.float32 else 0.6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [[5, 0, 17, 2], [0, 0, 0, 64], [1, 1, 1, 1]], ids=str)
def test_grouped_products_are_those_of_a_loop(dtype: torch.dtype, rows: list[int]) -> None:
    """With empty groups and rows that belong to none; both gradients."""
    behind = 6
    x = torch.randn(sum(rows) + behind, 32, generator=torch.Generator().manual_seed(0)).cuda().to(dtype).requires_grad_()
    weight = torch.randn(len(rows), 32, 48, generator=torch.Generator().manual_seed(1)).cuda().to(dtype).requires_grad_()
    offsets = torch.tensor(rows).cumsum(0).to(torch.int32).cuda()
    torch.full((4096, 48), float("nan"), device="cuda", dtype=dtype)  # what fresh memory holds is no zero
    grad = torch.randn(x.shape[0], 48, generator=torch.Generator().manual_seed(2)).cuda().to(dtype)
    out = grouped.grouped_mm(x, weight, offsets)
    out.backward(grad)
    a, b = x.detach().double().cpu().requires_grad_(), weight.detach().double().cpu().requires_grad_()
    parts = [part @ b[e] for e, part in enumerate(a[: sum(rows)].split(rows))]
    want = torch.cat([*parts, torch.zeros(behind, 48, dtype=torch.float64)])
    want.backward(grad.double().cpu())
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    for got, real in ((out, want), (x.grad, a.grad), (weight.grad, b.grad)):
        assert got is not None and real is not None
        assert float((got.detach().double().cpu() - real.detach()).norm()) <= bound * float(real.norm())
    assert torch.equal(out[sum(rows) :], torch.zeros_like(out[sum(rows) :]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_route_the_same(dtype: torch.dtype, tmp_path: Path) -> None:
    config = MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **LM)
    reference = folder(live(MixtralForCausalLM, config, scale=2.0), tmp_path)
    surgery.compile('surg 1\nadapt lora(rank = 8) on layers[*].ffn.experts.{up, down}\nemit torch to "out"\n', reference, out=tmp_path)
    here, other = surgery.load(tmp_path / "out").eval().to(dtype), surgery.load(tmp_path / "out").eval().cuda().to(dtype)
    for module in (here, other):
        draw = torch.Generator().manual_seed(3)
        for p in module.parameters():
            if p.requires_grad:
                p.data.copy_(0.1 * torch.randn(p.shape, generator=draw))
    tokens = padded(2, 16)[0]
    want, got = here(input_ids=tokens, labels=tokens), other(input_ids=tokens.cuda(), labels=tokens.cuda())
    far = float((got.logits.cpu() - want.logits).float().abs().mean() / want.logits.float().abs().mean())
    assert far < (1e-4 if dtype is torch.float32 else 5e-2)
    for out in (want, got):
        out.loss.backward()
    grads = {n: p.grad for n, p in here.named_parameters() if p.grad is not None}
    assert any(float(g.abs().max()) > 0 for g in grads.values())
    for name, p in other.named_parameters():
        if name in grads and dtype is torch.float32:
            assert p.grad is not None and float((p.grad.cpu() - grads[name]).norm()) <= 1e-3 * (1e-3 + float(grads[name].norm())), name


@pytest.mark.parametrize("what", ["dense", "experts"])
def test_a_module_compiles(what: str, tmp_path: Path) -> None:
    if what == "dense":
        model: Any = live(LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2, **LM), scale=2.0)
        spec = "surg 1\nadapt lora(rank = 8) on layers[*].attn.{q, v}\n"
    else:
        model = live(LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2, **LM), scale=2.0)
        spec = "surg 1\nconvert moe(split = upcycle, experts = 4, top_k = 2) on layers[*].ffn\n"
    surgery.compile(spec + 'emit torch to "out"\n', folder(model, tmp_path), out=tmp_path)
    module = surgery.load(tmp_path / "out").cuda().to(torch.bfloat16).train()
    tokens = padded(2, 16)[0].cuda()
    plain = module(input_ids=tokens, labels=tokens).loss
    compiled = torch.compile(module)
    loss = compiled(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert abs(float(loss) - float(plain)) < 2e-2 * abs(float(plain))
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("precision", list(HALF))
def test_a_package_for_the_device(precision: str, tmp_path: Path) -> None:
    """At sizes that it was not compiled with, beside the module on the processor; compiled again it has the same bytes."""
    reference = folder(live(BertModel, BertConfig(**SMALL), scale=2.0), tmp_path)
    spec = BERT + f'emit pt2(target = cuda, precision = {precision}) to "model.pt2"\n'
    surgery.compile(spec, reference, out=tmp_path)
    surgery.compile(BERT + 'fold all\nemit torch to "out"\n', reference, out=tmp_path)
    record = aoti.read_record(tmp_path / "model.pt2")
    assert record is not None and record["target"] == "cuda" and all(c["ok"] for c in record["certificates"])
    package, module = torch._inductor.aoti_load_package(str(tmp_path / "model.pt2")), surgery.load(tmp_path / "out").eval()
    for batch, length in ((1, 1), (2, 16), (5, 61)):
        tokens, mask = padded(batch, length)
        given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.zeros_like(tokens)}
        with torch.no_grad():
            want, got = module(**given).last_hidden_state, package(**there(given))["last_hidden_state"]
        assert got.is_cuda and float((got.cpu().float() - want).abs().max()) < HALF[precision]


def test_the_same_spec_gives_the_same_package(tmp_path: Path) -> None:
    reference = folder(live(BertModel, BertConfig(**SMALL)), tmp_path)
    found = []
    for name in ("a", "b"):
        surgery.compile('surg 1\nemit pt2(target = cuda, precision = fp16) to "model.pt2"\n', reference, out=tmp_path / name)
        found.append((tmp_path / name / "model.pt2").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("what", ["dense", "experts"])
def test_a_decoders_package_for_the_device(what: str, tmp_path: Path) -> None:
    more = dict(num_key_value_heads=2, **LM)
    model: Any = live(LlamaForCausalLM, LlamaConfig(**SMALL, **more), scale=2.0)
    if what == "experts":
        model = live(MixtralForCausalLM, MixtralConfig(**SMALL, **more, num_local_experts=4, num_experts_per_tok=2), scale=2.0)
    surgery.compile('surg 1\nemit pt2(target = cuda) to "model.pt2"\n', folder(model, tmp_path), out=tmp_path)
    record = aoti.read_record(tmp_path / "model.pt2")
    assert record is not None and record["certificates"] and all(c["ok"] for c in record["certificates"])


def test_a_graph_for_the_device(tmp_path: Path) -> None:
    """onnxruntime runs what ``target = cuda`` gives on the device, to the rounding of half precision."""
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("onnxruntime has no CUDA provider here")
    reference = folder(live(BertModel, BertConfig(**SMALL), scale=2.0), tmp_path)
    surgery.compile(BERT + 'fold all\nemit torch to "out"\n', reference, out=tmp_path)
    module = surgery.load(tmp_path / "out").eval()
    for precision in ("fp32", "fp16"):
        surgery.compile(BERT + f'emit onnx(target = cuda, precision = {precision}) to "{precision}.onnx"\n', reference, out=tmp_path)
        session = ort.InferenceSession(str(tmp_path / f"{precision}.onnx"), providers=["CUDAExecutionProvider"])
        assert session.get_providers()[0] == "CUDAExecutionProvider"
        tokens, mask = padded(3, 20)
        given = {"input_ids": tokens, "attention_mask": mask, "token_type_ids": torch.zeros_like(tokens)}
        with torch.no_grad():
            want = module(**given).last_hidden_state
        got = torch.from_numpy(session.run(["last_hidden_state"], {i.name: given[i.name].numpy() for i in session.get_inputs()})[0])
        assert float((got.float() - want).abs().max()) < (1e-2 if precision == "fp32" else 5e-2)


def test_a_cast_program_and_a_live_model_agree() -> None:
    """A captured decoder in half precision on the device beside the model that it was captured from."""
    model = live(LlamaForCausalLM, LlamaConfig(**SMALL, num_key_value_heads=2, **LM), scale=2.0)
    from tests.programs import module_for

    module = module_for(model).cuda().to(torch.bfloat16).eval()
    assert program_for(model).info.family == "llama"
    reference = model.cuda().to(torch.bfloat16)
    tokens, mask = padded(2, 16)
    with torch.no_grad():
        want, got = reference(tokens.cuda(), attention_mask=mask.cuda()).logits, module(tokens.cuda(), attention_mask=mask.cuda()).logits
    assert float((want - got).float().abs().max()) <= 1e-2 * float(want.float().abs().max())
