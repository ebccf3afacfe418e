"""What makes inductor quicker: a trace without the layer for writes, values typed where something changed, two compilers at a time."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from surgery.backends.aoti_quick import alike, as_functional, functional, side_by_side, where_changed

aten = torch.ops.aten


def chain(*operations: Any) -> fx.GraphModule:
    """A graph that applies one operation after the other to its input."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for operation in operations:
        node = graph.call_function(operation, (node,))
    graph.output((node,))
    return fx.GraphModule({}, graph)


def open_tensor() -> tuple[FakeTensorMode, torch.Tensor]:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    return mode, mode.from_tensor(torch.zeros(5, 3), symbolic_context=context)


def test_values_are_typed_again_only_where_something_changed() -> None:
    """Beside a propagation over everything: the same types, from the nodes that changed and those behind them whose types follow."""
    calls: list[Any] = []
    again = where_changed(lambda *what, **more: calls.append(what))
    mode, x = open_tensor()
    gm = chain(aten.relu.default, aten.t.default, aten.neg.default)
    with mode:
        FakeTensorProp(gm, mode=mode).propagate_dont_convert_inputs(x)
    nodes = {n.target: n for n in gm.graph.nodes if n.op == "call_function"}
    before = {k: n.meta["val"] for k, n in nodes.items()}
    again(gm, [x], True)
    assert all(n.meta["val"] is before[k] for k, n in nodes.items()), "values of the trace were made again"
    nodes[aten.relu.default].target = aten.tanh.default
    again(gm, [x], True)
    assert all(n.meta["val"] is before[k] for k, n in nodes.items()), "the type is the same, and so is everything behind it"
    with gm.graph.inserting_before(nodes[aten.t.default]):
        made = gm.graph.call_function(aten.to.dtype, (nodes[aten.relu.default], torch.float16))
    nodes[aten.t.default].replace_input_with(nodes[aten.relu.default], made)
    again(gm, [x], True)
    assert [n.meta["val"].dtype for n in (made, nodes[aten.t.default], nodes[aten.neg.default])] == [torch.float16] * 3
    assert nodes[aten.neg.default].meta["val"].shape[0] == 3 and nodes[aten.relu.default].meta["val"] is before[aten.relu.default]
    assert not calls and not mode.shape_env.guards, "to compare two sizes must not fix one"
    again(gm, [torch.zeros(5, 3)], True)
    assert len(calls) == 1, "without types to start from the usual way is taken"


def test_sizes_are_compared_without_being_fixed() -> None:
    mode, x = open_tensor()
    with mode:
        y, turned = x + 1, x.t()
        longer = torch.cat([x, x])
    assert alike(x, y) and not alike(x, turned) and not alike(x, longer) and not alike(x, None) and not alike(x, x.half())
    assert not mode.shape_env.guards


def test_a_graph_with_writes_is_traced_in_the_usual_way() -> None:
    settings: list[bool] = []

    class Config:
        def __init__(self, disable_functionalization: bool = False) -> None:
            self.plain = disable_functionalization

    within = SimpleNamespace(AOTConfig=Config)

    def trace(module: fx.GraphModule) -> tuple[fx.GraphModule, str]:
        settings.append(within.AOTConfig().plain)
        return (writing if module is hidden else module), "signature"

    plain, writing, hidden = chain(aten.relu.default), chain(aten.relu_.default), chain(aten.neg.default)
    assert functional(plain) and not functional(writing)
    run = as_functional(trace, within)
    assert run(plain) == (plain, "signature") and settings == [True]
    assert run(writing)[0] is writing and settings == [True, False]
    assert run(hidden)[0] is writing and settings == [True, False, True, False], "a write that only the trace shows"
    assert within.AOTConfig is Config


class Builder:
    def __init__(self, name: str) -> None:
        self.name = name

    def get_target_file_path(self) -> str:
        return f"/somewhere/{self.name}"


def test_the_kernels_wait_for_the_wrapper_and_raise_what_it_raised() -> None:
    together = threading.Barrier(2, timeout=30)  # broken, and an error, where one build waits for the other
    done: list[str] = []

    def build(builder: Builder) -> None:
        if not builder.name.endswith(".so"):
            together.wait()
        if builder.name == "broken.wrapper.o":
            raise ValueError("no header")
        done.append(builder.name)

    run = side_by_side(build)
    run(Builder("model.wrapper.o"))
    run(Builder("model.kernel.o"))
    assert sorted(done) == ["model.kernel.o", "model.wrapper.o"]
    run(Builder("model.so"))
    assert done[-1] == "model.so"
    run(Builder("broken.wrapper.o"))
    with pytest.raises(ValueError, match="no header"):
        run(Builder("model.kernel.o"))
