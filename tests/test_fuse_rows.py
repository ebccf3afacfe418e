"""Fusion for processors: sums that products make, biases that move into norms, and steps as rows of one matrix."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.backends.fuse import Target
from surgery.backends.fuse.engine import Fused, fuse_flat
from surgery.backends.fuse.flatten import flatten_live
from surgery.backends.fuse.gate import difference, run
from surgery.backends.fuse.ops import translations
from surgery.model.live import Tensors, live_root
from surgery.model.program import Program
from surgery.model.sample import sample_inputs
from surgery.opening import capture
from surgery.passes import registry

ops = torch.ops.surgery
RULES = ("spread_norm", "spread_gelu", "shift_bias", "product_sum", "flat_rows")


class Blocks(nn.Module):
    """Feed-forward blocks with their norm behind them, and what looks like one and is none."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("plain", "kept", "twice", "mean", "short"):
            self.add_module(f"norm_{name}", nn.LayerNorm(16))
            self.add_module(f"up_{name}", nn.Linear(16, 24))
            self.add_module(f"down_{name}", nn.Linear(24, 16))
        self.end, self.gain = nn.LayerNorm(16), nn.Parameter(torch.linspace(0.5, 1.5, 16))

    def block(self, name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = F.rms_norm(x, (16,), self.gain, 1e-6) if name == "mean" else getattr(self, f"norm_{name}")(x)
        product = getattr(self, f"down_{name}")(F.gelu(getattr(self, f"up_{name}")(n)))
        return n, product, self.end(product + n)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = [self.block("plain", x)[2]]
        norm, _, y = self.block("kept", x)
        outputs += [norm, y]  # somebody sees the norm's value
        _, product, y = self.block("twice", x)
        outputs += [product * 2.0, y]
        outputs.append(self.block("mean", x)[2])
        outputs.append(self.end(self.block("short", x)[1]))  # nothing is added
        return tuple(outputs)


def program() -> Program:
    torch.manual_seed(5)
    module = Blocks().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return capture(module, {"x": torch.randn(2, 6, 16)})


def fused(target: Target, made: Program) -> Fused:
    """The fused graph, which on an input of another size computes what the graph computed."""
    root = live_root(made, Tensors(registry.function), dtype=torch.float32).eval()
    result = fuse_flat(made, flatten_live(made, root), target)
    inputs = sample_inputs(made, batch=3, length=19, seed=2)
    assert max(difference(a, b, None) for a, b in zip(run(root, inputs), run(result.graph, inputs), strict=True)) < 1e-5
    return result


def fired(result: Fused) -> dict[str, int]:
    return {e.rule: e.fired for e in result.report if e.rule in RULES}


def misses(result: Fused, rule: str) -> Counter[str]:
    return Counter(m.condition for e in result.report if e.rule == rule for m in e.misses)


def test_blocks_become_products_on_rows(tmp_path: Path) -> None:
    """What fires, what says why not, and the runtime's own optimizer finds nothing in the graph that it would make slower."""
    pytest.importorskip("onnxruntime")
    import onnx
    import onnxruntime

    from surgery.backends.onnx_export import export, input_names

    made = program()
    result = fused(Target(), made)
    assert fired(result) == {"spread_norm": 10, "spread_gelu": 5, "shift_bias": 1, "product_sum": 1, "flat_rows": 5}
    assert misses(result, "shift_bias") == {
        "the norm is read by something that is no product": 1,
        "something else reads the product": 1,
        "the norm has no shift: it is the root of the mean square": 1,
    }
    assert misses(result, "product_sum") == {"the product adds a bias already": 3}
    tensors = dict(result.graph.named_parameters())
    assert tensors["norm_plain.bias_shifted"].shape == (16,) and tensors["up_plain.bias_shifted"].shape == (24,)
    assert "down_plain.bias" not in tensors and "down_kept.bias" in tensors
    model = export(made, result.graph, opset=20, table=translations())
    kinds = Counter(n.op_type for n in model.graph.node)
    assert kinds["Gemm"] == 10 and kinds["MatMul"] == 0 and kinds["Add"] == 1  # that of eps in the RMS norm
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "seen.onnx"), 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    seen = Counter(n.op_type for n in onnx.load(tmp_path / "seen.onnx").graph.node)
    assert seen["LayerNormalization"] == 9 and seen["SimplifiedLayerNormalization"] == 1 and seen["Gelu"] == 5
    assert not any(seen[slower] for slower in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "BiasGelu"))
    inputs = sample_inputs(made, batch=4, length=7, seed=3)
    root = live_root(made, Tensors(registry.function), dtype=torch.float32).eval()
    got = session.run(None, dict(zip(input_names(made), [t.numpy() for t in inputs], strict=True)))
    assert max(difference(a, torch.from_numpy(b), None) for a, b in zip(run(root, inputs), got, strict=True)) < 1e-5


@pytest.mark.parametrize(
    ("target", "counts", "said"),
    [
        (Target(device="cuda"), (0, 0, 0, 0, 0), ""),
        (Target(precision="int8"), (10, 0, 0, 0, 0), "products of integers add nothing to their result"),
        (Target(live=frozenset({"up_plain.weight"})), (10, 5, 0, 0, 5), "a weight stays apart under its own name because it is live"),
    ],
)
def test_other_targets(target: Target, counts: tuple[int, ...], said: str) -> None:
    result = fused(target, program())
    assert fired(result) == dict(zip(RULES, counts, strict=True))
    assert not said or misses(result, "shift_bias")[said] == (4 if target.precision == "int8" else 1)
    assert target.precision != "int8" or (misses(result, "flat_rows")[said] and misses(result, "spread_gelu")[said] == 5)


def test_rows_gain_nothing_where_few_products_add_something() -> None:
    torch.manual_seed(1)
    layers = (nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 24, bias=False), nn.ReLU(), nn.Linear(24, 16, bias=False))
    result = fused(Target(), capture(nn.Sequential(*layers).eval(), {"input": torch.randn(2, 6, 16)}))
    assert fired(result)["flat_rows"] == 0 and misses(result, "flat_rows") == {"most products beside it add nothing": 1}


class Every(nn.Module):
    def forward(self, x: Tensor, w: Tensor, y: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        rows, added = x.reshape(-1, 16), y.reshape(-1, 24)
        return ops.product_sum(x, w, y), ops.product_sum(rows, w, added), ops.sequences(added, ids), ops.total(y, y[:1])


def test_bodies_are_what_the_runtime_computes() -> None:
    """Products with a sum on sequences and on rows, rows as sequences again, and a sum over a batch of one, in a graph with open axes."""
    pytest.importorskip("onnxruntime")
    from surgery.backends.onnx_run import session

    def given(batch: int, steps: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(batch)
        x, w, y = (torch.randn(s, generator=draw) for s in ((batch, steps, 16), (24, 16), (batch, steps, 24)))
        return {"x": x, "w": w, "y": y, "ids": torch.zeros(batch, steps, dtype=torch.long)}

    table, auto = translations(), torch.export.Dim.AUTO
    open_ = {0: auto, 1: auto}
    shapes = {"x": open_, "w": None, "y": open_, "ids": open_}
    exported = torch.export.export(Every(), (), given(2, 5), dynamic_shapes=shapes)
    made = torch.onnx.export(exported, (), dynamo=True, opset_version=20, custom_translation_table=table, verbose=False, optimize=False)
    runner = session(made.model_proto.SerializeToString())
    for inputs in (given(2, 5), given(3, 1)):
        got = runner.run(None, {n: t.numpy() for n, t in inputs.items()})
        for want, theirs in zip(Every()(**inputs), got, strict=True):
            assert difference(want, torch.from_numpy(theirs), None) < 1e-6
