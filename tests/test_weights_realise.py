"""Expressions: values against plain torch, digests, descriptions, sharing, bytes read."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgery.core.diagnostics import SurgeryError
from surgery.model import stored as stored_module
from surgery.model.checkpoint_headers import read_header
from surgery.model.realise import Realiser, held, realise
from surgery.model.weights import (
    Add,
    Apply,
    Cast,
    Concat,
    Expr,
    Init,
    Load,
    MatMul,
    Reshape,
    Scale,
    Select,
    Stack,
    Update,
    cast,
    describe,
    loads,
    nodes,
    select,
)  # fmt: skip


def stored(path: Path, **tensors: torch.Tensor) -> dict[str, Load]:
    save_file(tensors, path / "w.safetensors")
    return {k: t.load() for k, t in read_header(path / "w.safetensors").tensors.items()}


def test_every_node_computes_what_torch_computes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b, h = torch.randn(4, 6), torch.randn(6, 3), torch.randn(4, 6).bfloat16()
    w = stored(tmp_path, a=a, b=b, h=h)
    cases: list[tuple[Expr, torch.Tensor]] = [
        (w["a"], a),
        (Select((3, 6), "float32", w["a"], 0, ((0, 1), (2, 4))), a[[0, 2, 3]]),
        (Select((4, 3), "float32", w["a"], 1, ((4, 6), (0, 1))), a[:, [4, 5, 0]]),
        (Select((4, 0), "float32", w["a"], 1, ()), a[:, :0]),
        (Concat((8, 6), "float32", (w["a"], w["a"]), 0), torch.cat([a, a])),
        (Stack((4, 2, 6), "float32", (w["a"], w["a"]), 1), torch.stack([a, a], 1)),
        (Reshape((6, 4), "float32", w["a"], (1, 0)), a.T),
        (Reshape((2, 12), "float32", w["a"]), a.reshape(2, 12)),
        (Cast((4, 6), "float16", w["a"]), a.half()),
        (Scale((4, 6), "float32", w["a"], 0.3), a * 0.3),
        (Scale((4, 6), "bfloat16", w["h"], 0.3), (h.float() * 0.3).bfloat16()),
        (Add((4, 6), "float32", (w["a"], w["a"], w["h"])), a + a + h.float()),
        (Add((4, 6), "bfloat16", (w["h"], w["h"], w["h"])), (h.float() * 3).bfloat16()),
        (MatMul((4, 3), "float32", w["a"], w["b"]), a @ b),
        (Update((4, 6), "float32", w["a"], Select((2, 6), "float32", w["a"], 0, ((0, 2),)), 0, ((3, 4), (0, 1))), a[[1, 1, 2, 0]]),
        (held(a), a),
        (Init((2, 5), "int64", "arange"), torch.arange(5).expand(2, 5)),
        (Init((3,), "float32", "constant", (2.5,)), torch.full((3,), 2.5)),
    ]
    for expr, value in cases:
        made = realise(expr)
        assert made.is_contiguous() and made.dtype == value.dtype and tuple(made.shape) == expr.shape
        assert torch.equal(made, value), describe(expr)
        assert expr.nbytes == value.numel() * value.element_size()


def test_row_ranges_read_only_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = stored(tmp_path, a=torch.arange(1000.0).reshape(100, 10))
    spans: list[tuple[int, int]] = []
    inner = stored_module._read_into

    def spy(expr: Load, offset: int, view: memoryview) -> None:
        spans.append((offset - expr.span[0], len(view)))
        inner(expr, offset, view)

    monkeypatch.setattr(stored_module, "_read_into", spy)
    realise(Select((5, 10), "float32", w["a"], 0, ((10, 12), (50, 53))))
    assert spans == [(400, 80), (2000, 120)]


def test_results_are_fresh_and_never_alias() -> None:
    tensor = torch.ones(3)
    expr = held(tensor)
    first = realise(expr)
    first.zero_()
    assert torch.equal(realise(expr), torch.ones(3))
    tensor.zero_()
    assert torch.equal(realise(expr), torch.ones(3))
    whole = held(torch.arange(6.0).reshape(2, 3))
    assert realise(select(whole, 0, ((1, 2),))).untyped_storage().nbytes() == 12


def test_a_file_that_changed_is_a_diagnostic(tmp_path: Path) -> None:
    w = stored(tmp_path, a=torch.ones(100), b=torch.ones(10, 10))
    (tmp_path / "w.safetensors").write_bytes(b"short")
    for expr in (w["a"], select(w["b"], 0, ((9, 10),)), select(w["b"], 1, ((9, 10),))):
        with pytest.raises(SurgeryError) as caught:
            realise(expr)
        assert (caught.value.diagnostics[0].code, caught.value.exit_code) == ("S0721", 2)
    (tmp_path / "w.safetensors").unlink()
    with pytest.raises(SurgeryError):
        realise(w["a"])


# ---------------------------------------------------------------- functions


class Functions:
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, name: str) -> Any:
        assert name == "adapt/pissa:svd"

        def svd(w: torch.Tensor, *, rank: int) -> tuple[torch.Tensor, ...]:
            self.calls += 1
            u, s, v = torch.linalg.svd(w)
            return u[:, :rank], s[:rank], v[:rank]

        return svd


def svd_outputs(w: Expr, rank: int = 2) -> dict[str, Expr]:
    rows, columns = w.shape
    shapes = [(rows, rank), (rank,), (rank, columns)]
    return {f"o{i}": Apply(s, "float32", "adapt/pissa:svd", (w,), (("rank", rank),), i) for i, s in enumerate(shapes)}


def test_outputs_of_one_function_share_one_call() -> None:
    value = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    functions = Functions()
    weights = svd_outputs(held(value)) | {"again": svd_outputs(held(value))["o1"]}
    realiser = Realiser(weights, functions)
    made = {name: realiser[name] for name in realiser}
    assert functions.calls == 1
    assert realiser._cache == {} and realiser._cached_bytes == 0
    u, s, v = torch.linalg.svd(value)
    assert torch.equal(made["o0"], u[:, :2]) and torch.equal(made["o1"], s[:2]) and torch.equal(made["o2"], v[:2])
    memo: dict[str, Any] = {}
    for expr in weights.values():
        realise(expr, memo, functions=functions)
    assert functions.calls == 2


def test_a_small_bound_costs_time_and_not_values() -> None:
    weights: dict[str, Expr] = {}
    for i in range(4):
        weights |= {f"{k}.{i}": e for k, e in svd_outputs(held(torch.randn(8, 6, generator=torch.Generator().manual_seed(i)))).items()}
    order = sorted(weights)
    roomy, tight = Functions(), Functions()
    first, second = Realiser(weights, roomy), Realiser(weights, tight, max_bytes=200)
    for name in order:
        assert torch.equal(first[name], second[name])
        assert second._cached_bytes <= 200
    assert roomy.calls == 4 < tight.calls


def test_equal_headers_do_not_mix_two_checkpoints(tmp_path: Path) -> None:
    """Two files of one shape have equal digests; their products must not be taken for each other."""
    for name, value in (("x", 1.0), ("y", 2.0)):
        (tmp_path / name).mkdir()
        save_file({"a": torch.full((2, 2), value)}, tmp_path / name / "w.safetensors")
    x, y = (read_header(tmp_path / n / "w.safetensors").tensors["a"].load() for n in "xy")
    assert x.digest == y.digest and x.identity != y.identity
    eye = held(torch.eye(2))
    total = Add((2, 2), "float32", (MatMul((2, 2), "float32", x, eye), MatMul((2, 2), "float32", y, eye)))
    assert torch.equal(realise(total, {}), torch.full((2, 2), 3.0))


def test_faults_of_functions_are_diagnostics() -> None:
    with pytest.raises(SurgeryError) as caught:
        realise(svd_outputs(held(torch.ones(3, 3)))["o0"])
    assert caught.value.diagnostics[0].code == "S0728"
    wrong = Apply((9,), "float32", "adapt/pissa:svd", (held(torch.ones(3, 3)),), (("rank", 2),), 0)
    with pytest.raises(SurgeryError) as caught:
        realise(wrong, functions=Functions())
    assert caught.value.diagnostics[0].message == "adapt/pissa:svd gave a tensor of [3, 2] where [9] was planned"


def test_products_do_not_depend_on_threads() -> None:
    left, right = (held(torch.randn(257, 257, generator=torch.Generator().manual_seed(i))) for i in range(2))
    before = torch.get_num_threads()
    try:
        values = []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            values.append(realise(MatMul((257, 257), "float32", left, right)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(values[0], values[1]) and torch.equal(values[0], values[2])


# ---------------------------------------------------------------- identity and text


def test_digests_follow_content_and_not_place(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
    x = Scale((2,), "float32", stored(tmp_path / "x", a=torch.ones(2))["a"], 0.5)
    y = Scale((2,), "float32", stored(tmp_path / "y", a=torch.ones(2))["a"], 0.5)
    assert x.digest == y.digest == Scale((2,), "float32", x.source, 0.5).digest
    different = [
        x, Scale((2,), "float32", x.source, 0.25), cast(x, "float16"), x.source, Add((2,), "float32", (x, x)), Add((2,), "float32", (x,)),
        Init((2,), "float32", "normal", (0.0, 1.0), 1), Init((2,), "float32", "normal", (0.0, 1.0), 2), held(torch.ones(2)), held(torch.zeros(2)),
        Apply((2,), "float32", "a/b:c", (x,), (("r", 1),)), Apply((2,), "float32", "a/b:c", (x,), (("r", 2),)),
        Apply((2,), "float32", "a/b:c", (x,), (("r", 1),), 0),
    ]  # fmt: skip
    assert len({e.digest for e in different}) == len(different)
    assert len({e.identity for e in different}) == len(different)


def test_digest_is_stable_between_versions() -> None:
    """Lock files hold these: a change here is a change of the lock's format."""
    expr = Add(
        (2,), "float32", (Init((2,), "float32", "normal", (0.0, 0.02), 7), Scale((2,), "float32", Init((2,), "float32", "ones"), 0.5))
    )
    assert expr.digest == "fff64211bb1ae3614b1595289d983e23dfe410fe7869e7e4dcb7715a282b05ba"


def test_deep_expressions_do_not_exhaust_the_stack() -> None:
    expr: Expr = Init((2,), "float32", "ones")
    for _ in range(5000):
        expr = Scale((2,), "float32", expr, 1.0)
    assert sum(1 for _ in nodes(expr)) == 5001
    assert len(expr.digest) == 64
    assert torch.equal(realise(expr), torch.ones(2))
    assert describe(expr).count("\n") == 5000


def test_describe(tmp_path: Path) -> None:
    w = stored(tmp_path, q=torch.ones(4, 8))["q"]
    delta = MatMul((4, 8), "float32", Init((4, 2), "float32", "normal", (0.0, 0.02), 7), Init((2, 8), "float32", "zeros"))
    expr = Add((4, 8), "float32", (w, Scale((4, 8), "float32", delta, 0.5), delta))
    assert describe(expr) == "\n".join(
        [
            "add float32[4x8]",
            "  load float32[4x8] q (w.safetensors)",
            "  scale float32[4x8] by 0.5",
            "    #1 matmul float32[4x8]",
            "      init float32[4x2] normal(0, 0.02) seed 7",
            "      init float32[2x8] zeros",
            "  see #1",
        ]
    )
    assert loads(expr) == [w]
    assert describe(select(w, 0, ((0, 2), (3, 4)))).splitlines()[0] == "select float32[3x8] axis 0 [0..1, 3]"


def test_results_of_functions_are_kept_within_bounds() -> None:
    from surgery.model.live import Results

    kept = Results(100)
    for i in range(5):
        kept[str(i)] = (torch.zeros(10),)
    assert list(kept) == ["3", "4"] and kept.bytes == 80
    kept["large"] = (torch.zeros(1000),)
    assert list(kept) == ["large"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_what_is_changed_in_place_is_nobody_elses(dtype: str) -> None:
    """Sums and factors on top of a cast, of a tensor that is held and of a product that two outputs share, leave both as they were."""
    g = torch.Generator().manual_seed(0)
    one, two = held(torch.randn(200, 300, generator=g)), held(torch.randn(300, 100, generator=g))
    wide = Cast(one.shape, dtype, one)
    kept = one.tensor.clone()
    want = kept.to(getattr(torch, dtype))
    assert torch.equal(realise(Scale(one.shape, dtype, wide, 3.0)), want * 3)
    assert torch.equal(realise(Add(one.shape, "float32", (Cast(one.shape, "float32", wide), one))), want.float() + kept)
    product = MatMul((200, 100), "float32", one, two)
    weights = {
        "scaled": Scale(product.shape, "float32", product, -0.5),
        "sum": Add(product.shape, "float32", (product, product)),
        "itself": product,
    }
    made = Realiser(weights)
    found = {name: made[name] for name in weights}
    assert torch.equal(found["itself"], kept @ two.tensor)
    assert torch.equal(found["scaled"], found["itself"] * -0.5) and torch.equal(found["sum"], found["itself"] * 2)
    assert torch.equal(one.tensor, kept)
