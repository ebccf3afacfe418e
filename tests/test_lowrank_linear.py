"""A frozen projection and its adapter as one step: the numbers of the two steps, their gradients, and less kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.model.attend import attend
from surgery.model.live import Tensors as Stored
from surgery.model.peephole import beside
from surgery.model.runtime import build_module
from surgery.passes import registry
from surgery.passes.adapt.lora import Lora
from surgery.passes.adapt.rslora import Rslora
from surgery.passes.kinds import lowrank_linear
from surgery.passes.kinds.delta import DeltaModule
from surgery.passes.kinds.geometry import Geometry
from tests.captured_programs import zoo_program
from tests.zoo import ZOO


def pair(dropout: float = 0.0, cls: type[Lora] | type[Rslora] = Lora, dtype: torch.dtype = torch.float64) -> tuple[nn.Linear, DeltaModule]:
    torch.manual_seed(0)
    base = nn.Linear(12, 10, dtype=dtype).requires_grad_(False)
    site = Geometry("linear", 10, 12, 10)
    added = DeltaModule(cls(rank=3, alpha=6.0, dropout=dropout), site).to(dtype)
    for p in added.parameters():
        nn.init.normal_(p)
    return base, added


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_()


def steps(base: nn.Linear, added: DeltaModule, x: Tensor, together: bool) -> list[Tensor]:
    torch.manual_seed(3)
    out = beside(base, added, x) if together else added(x, base(x))
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = [out.detach(), x.grad, *(p.grad for p in added.parameters())]
    x.grad = None
    added.zero_grad()
    assert base.weight.grad is None
    return [t for t in found if t is not None]


@pytest.mark.parametrize("cls", [Lora, Rslora])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [(5, 12), (2, 5, 12), (2, 3, 5, 12)])
def test_same_numbers_and_gradients(cls: Any, dropout: float, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[bool] = []
    fits = lowrank_linear.fits
    monkeypatch.setattr(lowrank_linear, "fits", lambda *a: used.append(fits(*a)) or used[-1])
    base, added = pair(dropout, cls)
    x = leaf(*shape)
    together, apart = steps(base, added, x, True), steps(base, added, x, False)
    assert used == [True] and len(together) == len(apart) == 4
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    added.eval()
    assert torch.equal(beside(base, added, x), added(x, base(x)))


def kept(run: Any) -> int:
    """Bytes of distinct storages that autograd keeps."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        held = run()
    assert held is not None
    return sum(found.values())


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives_with_a_fixed_dropout(p: float) -> None:
    base, added = pair()

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(4)
        out: Tensor = lowrank_linear.LowRankLinear.apply(x, base.weight, base.bias, a, b, 2.0, p)
        return out

    assert torch.autograd.gradcheck(run, (leaf(2, 3, 12), added.A, added.B))
    assert torch.autograd.gradgradcheck(run, (leaf(2, 3, 12), added.A, added.B))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_keeps_less_than_two_steps(dropout: float) -> None:
    base, added = pair(dropout)
    x = leaf(64, 12)
    mine, theirs = kept(lambda: beside(base, added, x)), kept(lambda: added(x, base(x)))
    assert mine <= theirs if not dropout else mine < 0.7 * theirs


@pytest.mark.parametrize("why", ["hook", "hook on the base", "trainable base", "autocast", "other dtype", "inactive", "vmap", "A frozen"])
def test_goes_step_by_step_where_it_must(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Tensor:
        raise AssertionError("the one step was used")

    monkeypatch.setattr(lowrank_linear.LowRankLinear, "apply", never)
    base, added = pair(dtype=torch.float32)
    x = leaf(4, 12, dtype=torch.float32)
    seen = []
    if why == "hook":
        added.register_forward_hook(lambda *a: seen.append(1))
    elif why == "hook on the base":
        base.register_forward_hook(lambda *a: seen.append(1))
    elif why == "trainable base":
        base.requires_grad_(True)
    elif why == "other dtype":
        base.to(torch.bfloat16)
        x = leaf(4, 12, dtype=torch.bfloat16)
    elif why == "inactive":
        added.active = False
    elif why == "A frozen":
        added.A.requires_grad_(False)
    if why == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            out = beside(base, added, x)
        assert out.dtype == torch.bfloat16
    elif why == "vmap":
        out = torch.func.vmap(lambda row: beside(base, added, row))(x.detach().unsqueeze(1))
    else:
        out = beside(base, added, x)
    assert torch.isfinite(out.float()).all() and bool(seen) == ("hook" in why)
    monkeypatch.undo()
    assert torch.isfinite(beside(*pair(dtype=torch.float32), leaf(4, 12, dtype=torch.float32))).all()


def heads(length: int, past: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    q = torch.randn(2, 3, length, 8, generator=g)
    k, v = (torch.randn(2, 3, length + past, 8, generator=g) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("kind", ["open", "causal", "padded", "causal and padded", "cache"])
def test_attention_with_a_mask_that_says_little(kind: str) -> None:
    """What a live model gives: no mask where nothing is masked, ``is_causal`` where that is all."""
    q, k, v = heads(7, 4 if kind == "cache" else 0)
    mask = torch.ones(2, 1, 7, k.shape[-2], dtype=torch.bool)
    if kind in ("causal", "causal and padded", "cache"):
        mask = mask.tril(k.shape[-2] - 7)
    if "padded" in kind:
        mask[1, :, :, 5:] = False
    expected = {
        "open": lambda: F.scaled_dot_product_attention(q, k, v),
        "causal": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }.get(kind, lambda: F.scaled_dot_product_attention(q, k, v, mask))()
    assert torch.equal(attend(q, k, v, mask), expected)
    assert torch.equal(attend(q, k, v, mask), expected)  # what was seen stands on the mask now
    mask[0, :, :, 1:] = False  # and is forgotten when it changes
    assert torch.equal(attend(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))
    with torch.inference_mode():
        assert torch.equal(attend(q, k, v, mask.clone()), F.scaled_dot_product_attention(q, k, v, mask))


def test_masks_are_not_read_in_a_trace() -> None:
    class Attending(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return attend(q, k, v, mask)

    q, k, v = heads(7)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    exported = torch.export.export(Attending(), (q, k, v, mask)).module()
    mask[1, :, :, 5:] = False
    torch.testing.assert_close(exported(q, k, v, mask), F.scaled_dot_product_attention(q, k, v, mask))
    masks = mask.unsqueeze(0).expand(3, -1, -1, -1, -1)
    out = torch.func.vmap(attend, in_dims=(None, None, None, 0))(q, k, v, masks)
    torch.testing.assert_close(out[0], F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.parametrize("family", ["llama", "bert", "whisper"])
def test_without_padding_a_module_keeps_what_the_live_model_keeps(family: str) -> None:
    """The mask that a graph always states costs neither memory nor a bit of the result."""
    entry = ZOO[family]
    live = entry.make_model().requires_grad_(True)
    program, _ = zoo_program(family)
    module = build_module(program, Stored(registry.function).all(program))
    module.load_state_dict(live.state_dict())
    for p in module.parameters():
        p.requires_grad_(True)
    inputs = {k: v for k, v in entry.inputs(3, 17).items() if isinstance(v, Tensor) and k != "position_ids"}
    inputs |= {k: torch.ones(3, inputs[k.replace("attention_mask", "input_ids")].shape[1]).long() for k in inputs if "mask" in k}
    inputs |= {"use_cache": False} if family != "bert" else {}
    assert torch.equal(module(**inputs)[0], live(**inputs)[0])
    assert 0 < kept(lambda: module(**inputs)) <= kept(lambda: live(**inputs))
