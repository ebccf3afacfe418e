"""Graphs that turn queries and keys as complex numbers, and attention whose values are narrower than its keys, in ONNX."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery.backends.fuse import Target
from surgery.backends.fuse.engine import fuse_flat
from surgery.backends.fuse.flatten import flatten_live
from surgery.backends.fuse.ops import translations
from surgery.backends.onnx_complex import real_numbers
from surgery.model.live import Tensors, live_root
from surgery.model.program import Program
from surgery.model.sample import sample_inputs
from surgery.opening import capture
from surgery.passes import registry


class Layer(nn.Module):
    """Attention of two heads, four queries' heads, keys of width 8 and values of width 4; the angles come from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 8)
        self.o = nn.Linear(16, 16)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (p(x).reshape(b, n, h, w).transpose(1, 2) for p, h, w in ((self.q, 4, 8), (self.k, 2, 8), (self.v, 2, 4)))
        pairs = (torch.view_as_complex(t.float().reshape(b, h, n, 4, 2)) * turn.unsqueeze(1) for t, h in ((q, 4), (k, 2)))
        q, k = (torch.view_as_real(t).flatten(3).type_as(x) for t in pairs)
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(b, 4, n, -1) for t in (k, v))
        return x + self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 16))


class Turned(nn.Module):
    def __init__(self, squared: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.squared = squared
        self.register_buffer("slow", torch.tensor([1.0, 2.0, 4.0, 8.0]))

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)[None, :, None] / self.slow
        turn = torch.polar(torch.ones_like(angle), angle) * 1.25
        turn = turn.pow(2) if self.squared else turn
        for layer in self.layers:
            x = layer(x, turn)
        return x


def roots(made: Program) -> tuple[fx.GraphModule, fx.GraphModule]:
    first, second = (live_root(made, Tensors(registry.function), dtype=torch.float32).eval() for _ in range(2))
    return first, second


def test_complex_numbers_become_pairs_in_every_graph() -> None:
    """The same numbers, no complex value left, and the exporter takes what it refused: against onnxruntime with other sizes."""
    runtime = pytest.importorskip("onnxruntime")
    from surgery.backends.onnx_export import export, input_names

    torch.manual_seed(0)
    made = capture(Turned().eval(), {"x": torch.randn(2, 6, 16)})
    plain, paired = roots(made)
    assert real_numbers(paired) > 8
    inputs = sample_inputs(made, batch=3, length=7, seed=5)
    want, got = plain(*inputs)[0], paired(*inputs)[0]
    assert torch.allclose(got, want, atol=1e-6) and float(want.std()) > 0.1
    targets = {str(n.target) for m in paired.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes}
    assert not any("complex" in t or "polar" in t for t in targets)
    fused = fuse_flat(made, flatten_live(made, paired), Target())
    said = [m.condition for e in fused.report if e.rule == "attention" for m in e.misses]
    assert said == ["keys and values differ in width, which the runtime's operation takes in rows alone"] * 2
    model = export(made, fused.graph, opset=20, table=translations())
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (out,) = session.run(None, dict(zip(input_names(made), [t.numpy() for t in inputs], strict=True)))
    assert torch.allclose(torch.from_numpy(out), want, atol=1e-5)


def test_a_graph_with_an_operation_that_is_not_known_stays_as_it_is() -> None:
    made = capture(Turned(squared=True).eval(), {"x": torch.randn(2, 6, 16)})
    plain, same = roots(made)
    assert real_numbers(same) == 0
    (x,) = sample_inputs(made, batch=2, length=4, seed=5)
    assert torch.equal(plain(x)[0], same(x)[0])
