"""Fusion rules that clean a graph up, on random graphs: no bit changes, and nothing that is used goes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from surgery.backends.fuse import Target, engine, fuse, ops_activation, ops_embedding, ops_norm  # noqa: F401  (registers the operations)
from surgery.backends.fuse.engine import FusionEntry
from surgery.backends.fuse.view import FuseView
from tests.gates import Exactly

aten, ops = torch.ops.aten, torch.ops.surgery

CLEANUP = ("dead_code", "drop_identities", "simplify_masks", "fold_constants", "common_subexpressions")


STEPS: tuple[Any, ...] = (
    lambda g, a, b: g.call_function(aten.add.Tensor, (a, 0)),
    lambda g, a, b: g.call_function(aten.mul.Tensor, (a, 1.0)),
    lambda g, a, b: g.call_function(aten.div.Tensor, (a, 1)),
    lambda g, a, b: g.call_function(aten.add.Tensor, (a, 1)),
    lambda g, a, b: g.call_function(aten.dropout.default, (a, 0.5, False)),
    lambda g, a, b: g.call_function(aten.to.dtype, (a, torch.float32)),
    lambda g, a, b: g.call_function(aten.contiguous.default, (a,)),
    lambda g, a, b: g.call_function(aten.clone.default, (a,)),
    lambda g, a, b: g.call_function(aten.neg.default, (a,)),
    lambda g, a, b: g.call_function(aten.transpose.int, (g.call_function(aten.transpose.int, (a, 0, -1)), 2, 0)),
    lambda g, a, b: g.call_function(aten.permute.default, (g.call_function(aten.permute.default, (a, [1, 2, 0])), [2, 0, 1])),
    lambda g, a, b: g.call_function(aten.transpose.int, (g.call_function(aten.permute.default, (a, [0, 2, 1])), 1, 2)),
    lambda g, a, b: g.call_function(aten.reshape.default, (g.call_function(aten.reshape.default, (a, [6, -1])), [2, 3, 4])),
    lambda g, a, b: g.call_function(aten.view.default, (g.call_function(aten.clone.default, (a,)), [2, 3, 4])),
    lambda g, a, b: g.call_function(aten.squeeze.dim, (g.call_function(aten.unsqueeze.default, (a, 1)), 1)),
    lambda g, a, b: g.call_function(aten.slice.Tensor, (a, 1, 0, 2**63 - 1)),
    lambda g, a, b: g.call_function(aten.cat.default, ([a], 1)),
    lambda g, a, b: g.call_function(aten.add.Tensor, (a, b)),
    lambda g, a, b: g.call_function(aten.mul.Tensor, (b, a)),
    lambda g, a, b: g.call_function(aten.tanh.default, (a,)),
    lambda g, a, b: g.call_function(aten.add_.Tensor, (g.call_function(aten.clone.default, (a,)), b)),
    lambda g, a, b: g.call_function(aten.mul_.Tensor, (g.call_function(aten.add.Tensor, (a, 0)), 0.5)),
    lambda g, a, b: g.call_function(aten.add.Tensor, (a, g.call_function(aten.cos.default, (g.get_attr("table"),)))),
    lambda g, a, b: g.call_function(aten.add.Tensor, (a, g.call_function(aten.arange.default, (4,)))),
    lambda g, a, b: g.call_function(aten.mul.Tensor, (a, g.call_function(aten.tanh.default, (g.get_attr("weight"),)))),
)


def random_graph(plan: list[tuple[int, int, int]], outputs: list[int]) -> fx.GraphModule:
    """A graph on ``x`` and ``y`` [2, 3, 4] from steps that are picked by number, with fake values on its nodes."""
    graph = fx.Graph()
    values = [graph.placeholder("x"), graph.placeholder("y")]
    for step, a, b in plan:
        values.append(STEPS[step % len(STEPS)](graph, values[a % len(values)], values[b % len(values)]))
    graph.output(tuple(values[i % len(values)] for i in outputs))
    holder = nn.Module()
    holder.register_buffer("table", torch.linspace(0, 1, 4))
    holder.register_parameter("weight", nn.Parameter(torch.linspace(1, 2, 4)))
    module = fx.GraphModule(holder, graph)
    mode = FakeTensorMode()
    for node in graph.nodes:
        if node.op == "placeholder":
            node.meta["val"] = mode.from_tensor(torch.empty(2, 3, 4))
        elif node.op == "get_attr":
            node.meta["val"] = mode.from_tensor(getattr(module, str(node.target)).detach())
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            with mode:
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
    return module


def cleaned(module: fx.GraphModule) -> dict[str, FusionEntry]:
    draw = torch.Generator().manual_seed(1)
    gate = Exactly(module, [torch.randn(2, 3, 4, generator=draw) for _ in range(2)])
    view = FuseView(module, SimpleNamespace(attachments=[]), Target())  # type: ignore[arg-type]
    chosen = [r for r in engine.rules() if r.name in CLEANUP]
    report = {r.name: engine._run(r, view, gate) for r in chosen}  # type: ignore[arg-type]
    assert gate.error(module) == (0.0, "")
    assert not any(m.condition == engine.GATE for e in report.values() for m in e.misses), "a match was wrong and only the gate saw it"
    return report


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), max_size=14), st.lists(st.integers(0, 99), min_size=1, max_size=3)
)  # fmt: skip
def test_cleanup_changes_no_bit(plan: list[tuple[int, int, int]], outputs: list[int]) -> None:
    """Whatever the graph, writes in place included, outputs stay what they are to the bit; and a second cleanup finds nothing."""
    module = random_graph(plan, outputs)
    cleaned(module)
    left = [str(n.target) for n in module.graph.nodes]
    again = cleaned(module)
    assert all(e.fired == 0 for e in again.values()) and [str(n.target) for n in module.graph.nodes] == left


def test_cleanup_counts() -> None:
    """x + tanh(x) with an identity, a turn and back, the same tanh again, a constant and dead code around it."""
    plan = [(0, 0, 0), (19, 2, 0), (19, 0, 0), (9, 3, 0), (17, 4, 5), (22, 6, 0), (8, 1, 1)]
    module = random_graph(plan, [7])
    report = cleaned(module)
    assert {name: e.fired for name, e in report.items()} == {
        "dead_code": 1, "drop_identities": 2, "simplify_masks": 0, "fold_constants": 1, "common_subexpressions": 1,
    }  # fmt: skip
    assert [str(n.target) for n in module.graph.nodes if n.op == "call_function"] == [
        "aten.tanh.default",
        "aten.add.Tensor",
        "aten.add.Tensor",
    ]
