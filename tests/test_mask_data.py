"""Masks that depend on data: Wanda and SparseGPT layer by layer, against a reference that hooks the live model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from surgery.core.diagnostics import SurgeryError
from surgery.model import masked
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.model.study import Study
from surgery.model.weights import Apply, Held, Masked, nodes
from surgery.passes import registry
from surgery.passes.kinds.geometry import Geometry
from surgery.passes.kinds.mask_data import Statistic, columns_of
from surgery.passes.operation import Resolved
from surgery.passes.prune.mask import Mask
from tests.captured_programs import zoo_program
from tests.data_support import text_model, write_lines, zoo_rows, zoo_samples
from tests.driver_support import surgery, write
from tests.workbench import operation, run
from tests.zoo import ZOO


def prune(program: Program, family: str, roles: list[str], count: int = 5, **params: object) -> Resolved:
    from dataclasses import replace

    op = operation(program, "prune", "mask", roles, **params)
    op = replace(op, study=Study(Tensors(registry.function)), data=zoo_samples(program, family, count=count, batch=2))
    run(program, op)
    return op


@contextmanager
def inputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    hooks = [
        m.register_forward_pre_hook(lambda m, a, name=name: seen[name].append(a[0].detach().reshape(-1, a[0].shape[-1])))
        for name, m in modules.items()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def reference(family: str, program: Program, paths: list[list[str]], method: Mask, rows: list[dict[str, Tensor]]) -> nn.Module:
    """The live model with the linear layers of ``paths`` (one list a layer, in order) masked as the papers' code does it."""
    model = ZOO[family].make_model()
    named = dict(model.named_modules())
    for layer in paths:
        modules = {p: named[p] for p in layer}
        with inputs_of(modules) as seen, torch.no_grad():
            for row in rows:
                model(**{k: v[None] for k, v in row.items()})
        for path, module in modules.items():
            x = torch.cat(seen[path]).double()
            weight: Tensor = module.weight  # type: ignore[assignment]
            site = Geometry("linear", weight.shape[0], weight.shape[1], weight.shape[0])
            if method.score == "wanda":
                drop = method.drop(site, weight.detach(), x.square().sum(0).sqrt().float(), None)
                new = weight.masked_fill(drop, 0)
            else:
                solved = method.solve(site, weight.detach(), x.T @ x, None)
                assert solved is not None
                new = solved[1]
            weight.data.copy_(new)
    return model


LLAMA = [[f"model.layers.{i}.{p}" for p in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")] for i in range(2)]
ROLES = [f"layers[{i}].{p}" for i in range(2) for p in ("attn.q", "attn.o", "ffn.up", "ffn.down")]


@pytest.mark.parametrize("method", [
    Mask(score="wanda"), Mask(score="wanda", pattern="2:4"), Mask(score="sparsegpt"), Mask(score="sparsegpt", pattern="2:4", ),
], ids=lambda m: f"{m.score}-{m.pattern}")  # fmt: skip
def test_layer_by_layer_as_the_reference(method: Mask) -> None:
    program, _ = zoo_program("llama")
    rows = zoo_rows(program, "llama", 5)
    expected = reference("llama", program, LLAMA, method, rows)
    base = Tensors(registry.function).of(program, "model.layers.0.mlp.up_proj.weight").clone()
    prune(program, "llama", ROLES, score=method.score, pattern=method.pattern)
    tensors = Tensors(registry.function)
    for layer in LLAMA:
        for path in layer:
            now, want = tensors.of(program, f"{path}.weight"), expected.get_submodule(path).weight
            assert torch.equal(now == 0, want == 0), path
            torch.testing.assert_close(now, want.detach(), atol=1e-5, rtol=1e-4)
            assert int((now == 0).sum()) * 2 == now.numel()
    changed = not torch.equal(base[(now := tensors.of(program, "model.layers.0.mlp.up_proj.weight")) != 0], now[now != 0])
    assert changed == (method.score == "sparsegpt")
    found = masked.zeros(program, lambda name: tensors.of(program, name))
    assert len(found) == 8 and not any(bad for _, bad in found.values())


def test_wanda_holds_norms_and_stays_lazy() -> None:
    program, _ = zoo_program("llama")
    prune(program, "llama", ["layers[1].ffn.up"], score="wanda")
    expr = program.weights["model.layers.1.mlp.up_proj.weight"]
    assert isinstance(expr, Masked) and isinstance(expr.keep, Apply)
    small = [n for n in nodes(expr.keep) if isinstance(n, Held) and len(n.shape) == 1]
    assert [n.shape for n in small] == [(expr.shape[1],)]


def test_padding_is_not_counted() -> None:
    """Two samples of different lengths in one batch give the norms of each by itself."""
    from dataclasses import replace

    from surgery.model.data import Samples

    rows = [{"input_ids": torch.arange(5, 5 + n)} for n in (9, 4)]
    found = []
    for batch in (1, 2):
        program, _ = zoo_program("bert")
        op = operation(program, "prune", "mask", ["layers[0].attn.q", "layers[1].ffn.down"], score="wanda")
        run(program, replace(op, study=Study(Tensors(registry.function)), data=Samples(rows, batch=batch)))
        found.append(
            [
                n.tensor
                for m in masked.masks(program).values()
                for n in nodes(program.weights[m])
                if isinstance(n, Held) and len(n.shape) == 1
            ]
        )
    assert len(found[0]) == 2
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-4)


def test_fused_and_transposed_weights() -> None:
    program, _ = zoo_program("gpt2")
    prune(program, "gpt2", ["layers[0].attn.k", "layers[0].ffn.down", "layers[1].attn.o"], score="sparsegpt")
    prune(program, "gpt2", ["layers[0].attn.v"], score="wanda")
    tensors = Tensors(registry.function)
    found = masked.zeros(program, lambda n: tensors.of(program, n))
    assert not any(bad for _, bad in found.values())
    by_layer = {n.split("h.", 1)[1]: count for n, (count, _) in found.items()}
    size = next(torch.Size(e.shape).numel() for n, e in program.weights.items() if n.endswith("0.mlp.c_proj.weight"))
    assert by_layer == {"0.attn.c_attn.weight": 32 * 32, "0.mlp.c_proj.weight": size // 2, "1.attn.c_proj.weight": 32 * 32 // 2}


@pytest.mark.parametrize(
    ("kernel", "more"), [((3, 2), {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}), ((3,), {"padding": (1,)})]
)
@pytest.mark.parametrize("groups", [1, 2])
def test_columns_of_convolutions(kernel: tuple[int, ...], more: dict[str, tuple[int, ...]], groups: int) -> None:
    """Flattened kernels times columns are the convolution, and norms are those of the columns of each group."""
    conv = (nn.Conv1d, nn.Conv2d)[len(kernel) - 1](4, 6, kernel, groups=groups, bias=False, **more)
    x = torch.randn(2, 4, *(9,) * len(kernel), generator=torch.Generator().manual_seed(0))
    plain = {"stride": (1,) * len(kernel), "padding": (0,) * len(kernel), "dilation": (1,) * len(kernel)} | more
    site = Geometry("conv", 6, 4, 6, kernel=kernel, groups=groups, **plain)
    columns = columns_of(site, x).reshape(2, -1, groups, site.fan_in)
    weight = conv.weight.detach().reshape(groups, 6 // groups, -1)
    out = torch.einsum("ntgi,goi->ngot", columns, weight).reshape(2, 6, -1)
    torch.testing.assert_close(out, conv(x).detach().flatten(2), atol=1e-5, rtol=1e-5)
    statistic = Statistic("norms", site)
    statistic.add(x[:1], None)
    statistic.add(x[1:], None)
    norms = statistic.value()
    assert norms is not None
    full = columns.square().sum((0, 1)).sqrt()
    expected = full[0] if groups == 1 else full.repeat_interleave(6 // groups, 0)
    torch.testing.assert_close(norms, expected, atol=1e-5, rtol=1e-5)
    assert Mask(score="wanda").drop(site, weight.reshape(6, -1), norms, None).sum() == Mask(score="wanda").dropped(site)


@pytest.mark.parametrize("score", ["wanda", "sparsegpt"])
def test_convolutions_of_a_network(score: str) -> None:
    program, _ = zoo_program("resnet")
    sites = [s for s in program.anatomy.sites if s.op == "conv"][:3]
    prune(program, "resnet", [s.role for s in sites], count=2, score=score)
    tensors = Tensors(registry.function)
    found = masked.zeros(program, lambda n: tensors.of(program, n))
    assert len(found) == 3 and not any(bad for _, bad in found.values())
    for site in sites:
        out, *row = program.weights[site.weight].shape
        size = torch.Size(row).numel()
        assert found[site.weight][0] == (out * (size // 2) if score == "wanda" else out * size // 2)


def test_adapters_in_front_are_seen_and_later_masked() -> None:
    """Adapt, prune by data, fold: the layers behind get what the adapted and masked layers give."""
    from tests.workbench import perturb

    program, _ = zoo_program("llama")
    run(program, operation(program, "adapt", "lora", ["layers[0].attn.q", "head"], rank=2))
    perturb(program)
    other = program.copy()
    plain, _ = zoo_program("llama")
    roles = ["layers[0].attn.q", "layers[1].ffn.up", "head"]
    prune(program, "llama", roles, score="wanda")
    prune(plain, "llama", roles, score="wanda")
    norms = [
        [n.tensor for m in masked.masks(p).values() for n in nodes(p.weights[m]) if isinstance(n, Held) and len(n.shape) == 1]
        for p in (program, plain)
    ]
    assert [len(n) for n in norms] == [3, 3]
    assert [torch.equal(a, b) for a, b in zip(*norms, strict=True)] == [True, False, False]
    assert all(program.module(a.module).masked for a in program.attachments) and not any(
        other.module(a.module).masked for a in other.attachments
    )


def test_experts_are_ranked_by_the_tokens_that_they_get() -> None:
    """Against norms gathered by hooks on the live model's experts; a share of each expert's rows goes."""
    from surgery.model.scores import element_scores

    program, _ = zoo_program("mixtral")
    roles = ["layers[0].ffn.experts.up", "layers[0].ffn.experts.down"]
    weights = list(dict.fromkeys(s.weight for s in program.anatomy.sites if s.role in roles))
    samples = zoo_samples(program, "mixtral", count=5, batch=2)
    scores = {n: v for n, v, _ in element_scores(Study(Tensors(registry.function)), program, samples, "wanda", weights)}
    by_role = {s.role: s for s in program.anatomy.sites}
    prune(program, "mixtral", roles, score="wanda")
    tensors = Tensors(registry.function)
    for role in roles:
        site = by_role[role]
        rows = site.rows or ((0, scores[site.weight].shape[site.out_axis]),)
        pick = lambda t: torch.cat([t.narrow(site.out_axis, a, b - a) for a, b in rows], site.out_axis)  # noqa: B023, E731
        gone = pick(tensors.of(program, masked.mask_name(site.weight))).logical_not()
        score = pick(scores[site.weight])
        if site.out_axis > site.in_axis:
            gone, score = gone.mT, score.mT
        assert set(gone.sum(-1).flatten().tolist()) == {gone.shape[-1] // 2}
        kept = score.masked_fill(gone, float("inf")).amin(-1)
        assert bool((score.masked_fill(~gone, -1).amax(-1) <= kept * (1 + 1e-5)).all())


def test_experts_need_another_score_than_sparsegpt() -> None:
    program, _ = zoo_program("mixtral")
    with pytest.raises(SurgeryError) as found:
        prune(program, "mixtral", ["layers[0].ffn.experts.up"], score="sparsegpt")
    assert found.value.diagnostics[0].code == "S0465"
    run(program, operation(program, "prune", "mask", ["layers[0].ffn.experts.up"], pattern="2:4"))


def test_from_a_spec_with_lines_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = text_model("bert", tmp_path)
    write_lines(tmp_path / "calib.txt", 9)
    write(
        "a.surg",
        'surg 1\n\ndata text = lines("calib.txt", samples = 8, length = 16)\n'
        "prune mask(score = wanda) on layers[*].attn.{q, k, v, o} using text\n"
        'prune mask(score = sparsegpt, pattern = "2:4") on layers[*].ffn.{up, down} using text\n'
        'expect sparsity == 50% on layers[*].attn.{q, k, v, o}, layers[*].ffn.{up, down}\nemit torch to "out"\n',
    )
    planned = surgery("plan", "a.surg", folder)
    assert planned.code == 0, planned.err
    assert "which weights go is decided by compile, from the data" in planned.out
    assert "6,144 weights become zero" in planned.out
    first = surgery("compile", "a.surg", folder)
    assert first.code == 0, first.err + first.out
    weights = Path("out/model.safetensors").read_bytes()
    torch.set_num_threads(2)
    try:
        assert surgery("compile", "a.surg", folder, "--out", "again").code == 0
    finally:
        torch.set_num_threads(1)
    assert Path("again/out/model.safetensors").read_bytes() == weights


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are read where Linux shows them")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_what_was_computed_is_kept_in_a_file_of_its_own(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.model.realise import held, realise
    from surgery.model.spill import spilled

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mapped = lambda: sum(str(tmp_path) in line for line in Path("/proc/self/maps").read_text().splitlines())  # noqa: E731
    value = (torch.randn(1200, 900, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    expr, plain = spilled(value), held(value)
    assert expr == plain and expr.identity == plain.identity and torch.equal(realise(expr), value)
    assert mapped() == 1 and not list(tmp_path.iterdir())  # the file has no name any more
    assert torch.equal(spilled(value[:3]).tensor, value[:3]) and mapped() == 1  # small ones stay in memory
    del expr
    assert mapped() == 0


def test_a_deep_copy_of_a_statistic_is_not_shared() -> None:
    """Statistics of sites that read one value are gathered once; a copy of them is independent."""
    site = Geometry("linear", 3, 4, 3)
    a = Statistic("gram", site)
    a.add(torch.ones(2, 4), torch.tensor([True, False]))
    b = deepcopy(a)
    b.add(torch.ones(1, 4), None)
    assert a.value() is not None and torch.equal(a.value(), torch.ones(4, 4).double()) and not torch.equal(a.value(), b.value())  # type: ignore[arg-type]
