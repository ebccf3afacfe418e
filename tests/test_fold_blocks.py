"""Folding by blocks of rows: the same bits as the whole at once, and no more fresh memory than a copy needs."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from surgery.model.checkpoint_headers import read_header
from surgery.model.realise import Realiser, realise
from surgery.model.weights import Apply, Expr, Init, Load
from surgery.passes import registry
from surgery.passes.kinds import blocks, delta
from surgery.passes.kinds.geometry import Geometry
from tests.driver_support import ROOT


def stored(folder: Path, **tensors: torch.Tensor) -> dict[str, Load]:
    save_file(tensors, folder / "m.safetensors")
    return {name: header.load() for name, header in read_header(folder / "m.safetensors").tensors.items()}


def fold_of(weight: Expr, method: str = "adapt/lora", rank: int = 8) -> Apply:
    out, inp = weight.shape
    a = Init((rank, inp), "float32", "normal", (0.0, 0.1), 1)
    b = Init((out, rank), "float32", "normal", (0.0, 0.1), 2)
    site = Geometry("linear", out, inp, out)
    return Apply(weight.shape, weight.dtype, f"{method}:fold", (weight, a, b), (("rank", rank), ("alpha", 16.0), ("site", site.pairs())))


@pytest.mark.parametrize("method", ["adapt/lora", "adapt/rslora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (100, 33), (257, 129), (1000, 64)])
def test_blocks_and_the_whole_have_the_same_bits(
    tmp_path: Path, shape: tuple[int, int], dtype: torch.dtype, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expr = fold_of(stored(tmp_path, w=torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype))["w"], method)
    monkeypatch.setattr(blocks, "BLOCK", 1 << 40)
    whole = realise(expr, functions=registry.function)
    for size in (16, 1024, 5000):
        monkeypatch.setattr(blocks, "BLOCK", size)
        assert torch.equal(realise(expr, functions=registry.function), whole)
    weight, a, b = (realise(x).double() for x in expr.args)
    scale = 16 / 8 if method == "adapt/lora" else 16 / 8**0.5
    exact = weight + scale * b @ a
    assert torch.allclose(whole.double(), exact, rtol=2 * torch.finfo(dtype).eps + 1e-6, atol=1e-5 if dtype != torch.bfloat16 else 1e-2)


LAYOUTS = {
    "turned": (Geometry("linear", 257, 129, 257, transposed=True), (129, 257)),
    "slice": (Geometry("linear", 64, 48, 192, rows=((64, 128),)), (64, 48)),
    "conv": (Geometry("conv", 70, 6, 70, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)), (70, 6, 3, 3)),
    "experts": (Geometry("experts", 50, 31, 50, experts=3), (3, 50, 31)),
    "turned experts": (Geometry("experts", 50, 31, 50, experts=3, transposed=True), (3, 31, 50)),
}


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_layouts_and_norms_of_rows_have_the_same_bits(layout: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    site, shape = LAYOUTS[layout]
    cls = registry.get("adapt", method)
    g = torch.Generator().manual_seed(1)
    made = [torch.randn(s.shape, generator=g) * 0.1 + (s.name == "magnitude") for s in cls(rank=4).tensors(site)]  # type: ignore[attr-defined]
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(shape, generator=g).to(dtype)

        def folded(weight: torch.Tensor = weight) -> torch.Tensor:
            return registry.function(f"adapt/{method}:fold")(weight, *made, rank=4, alpha=8.0, site=site.pairs())

        with monkeypatch.context() as whole:
            whole.setattr(delta, "fold_by_rows", lambda *given: None)
            expected = folded().to(dtype)
        for size in (16, 2000, 1 << 16):
            monkeypatch.setattr(blocks, "BLOCK", size)
            assert torch.equal(folded(), expected) and not torch.equal(expected, weight)


def test_what_is_not_row_by_row_is_folded_at_once() -> None:
    """Groups of a convolution read different inputs, rows of an embedding are as long as the vocabulary, a core mixes rows."""
    t = {"A": torch.zeros(8, 4), "B": torch.zeros(6, 8)}
    plain, lora, splopa = Geometry("linear", 6, 4, 6), registry.get("adapt", "lora")(), registry.get("adapt", "splopa")()
    grouped = Geometry("conv", 6, 4, 6, kernel=(1,), stride=(1,), padding=(0,), dilation=(1,), groups=2)
    words = Geometry("embedding", 6, 4, 6, transposed=True)
    assert blocks.fold_by_rows(lora, plain, t, torch.ones(6, 4), torch.float32) is not None  # type: ignore[arg-type]
    assert blocks.fold_by_rows(lora, grouped, t, torch.ones(6, 2, 1), torch.float32) is None  # type: ignore[arg-type]
    assert blocks.fold_by_rows(lora, words, t, torch.ones(4, 6), torch.float32) is None  # type: ignore[arg-type]
    assert blocks.fold_by_rows(splopa, plain, t, torch.ones(6, 4), torch.float32) is None  # type: ignore[arg-type]


def test_a_result_is_the_callers_own(tmp_path: Path) -> None:
    """No copy is made of a fresh result, and one that is kept or held is never handed out."""
    w = stored(tmp_path, w=torch.ones(64, 32))["w"]
    made = Realiser({"a": fold_of(w), "b": fold_of(w)}, registry.function)
    first = made["a"].clone()
    made["a"].zero_()
    assert torch.equal(made["b"], first)


FAULTS = """
import resource, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.test_fold_blocks import fold_of
from surgery.model.checkpoint_headers import read_header
from surgery.model.realise import Realiser
from surgery.model.shards import write_safetensors
from surgery.passes import registry
folder = Path({folder!r})
loads = {{n: h.load() for n, h in read_header(folder / "m.safetensors").tensors.items()}}
weights = {{n: fold_of(w) if sys.argv[1] == "fold" else w for n, w in loads.items()}}
small = Realiser({{"w": fold_of(loads["small"])}}, registry.function)["w"]
weights.pop("small")
made = Realiser(weights, registry.function)
before = resource.getrusage(resource.RUSAGE_SELF)
write_safetensors(folder / (sys.argv[1] + ".safetensors"), {{n: (lambda n=n: made[n]) for n in weights}}, {{n: e.shape for n, e in weights.items()}},
                  {{n: e.dtype for n, e in weights.items()}})
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_minflt - before.ru_minflt, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_pages_of_a_fold(tmp_path: Path, dtype: torch.dtype) -> None:
    """Counted, not timed: the weight that is read and the one that is written are fresh, everything between is used again."""
    big = {f"w{i}": torch.full((4096, 2560), 0.5).to(dtype) for i in range(3)}
    stored(tmp_path, small=torch.ones(64, 64).to(dtype), **big)
    pages = sum(t.nbytes for t in big.values()) / resource.getpagesize()
    script = FAULTS.format(root=str(ROOT), folder=str(tmp_path))
    runs = [subprocess.run([sys.executable, "-c", script, what], capture_output=True, text=True) for what in ("copy", "fold")]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr + runs[1].stderr
    copied, folded = (int(run.stdout.split()[0]) for run in runs)
    assert copied <= 1.1 * pages + 3000
    assert folded <= 2.1 * pages + 3000
    found = load_file(tmp_path / "fold.safetensors")
    assert all(found[n].shape == t.shape and not torch.equal(found[n], t) for n, t in big.items())
