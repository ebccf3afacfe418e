"""What makes inductor quicker: a graph is typed again when it changed, and two compilers run at a time."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import fx

from surgery.backends.aoti_quick import side_by_side, when_changed


def test_a_graph_is_typed_again_only_after_a_change() -> None:
    calls: list[int] = []

    def propagate(gm: fx.GraphModule, *inputs: Any) -> None:
        calls.append(len(gm.graph.nodes))
        for node in gm.graph.nodes:
            node.meta["val"] = object()

    again = when_changed(propagate)
    gm, other = (fx.symbolic_trace(lambda x: torch.relu(x) + 1) for _ in range(2))
    inputs = [torch.zeros(2)]
    again(gm, inputs)
    again(gm, inputs, True)
    assert len(calls) == 1
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    node.meta["val"] = object()  # somebody replaced a value
    again(gm, inputs)
    node.target = torch.sigmoid
    again(gm, inputs)
    again(gm, inputs)
    again(gm, [torch.zeros(2)])
    again(other, inputs)
    assert len(calls) == 5


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
