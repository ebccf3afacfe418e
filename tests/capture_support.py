"""Running captured graphs beside the live models they came from."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.model import pytree
from surgery.model.capture import Captured, capture_config
from surgery.model.program import ValueSpec
from surgery.model.retarget import graphs_of
from tests.zoo import ZOO


@cache
def captured(family: str) -> Captured:
    entry = ZOO[family]
    return capture_config(entry.make_config(), entry.architecture)


def flat_inputs(capture: Captured, inputs: dict[str, Any]) -> list[Tensor]:
    """The flat tensors of a call; values that the capture fixed must be what it fixed them to."""
    own = copy.deepcopy(inputs)
    left = set(own) - set(capture.signature.parameters)
    assert {k: own[k] for k in left} == {k: capture.signature.constants[k] for k in left}
    return pytree.flatten({k: own[k] for k in capture.signature.parameters}, capture.signature.in_spec)


def flat_outputs(capture: Captured, value: Any) -> list[Tensor]:
    return pytree.flatten(value, capture.signature.out_spec)


def assert_bitwise(got: Any, want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype, f"output {i}: {a.shape} {a.dtype} against {b.shape} {b.dtype}"
        assert torch.equal(a, b), f"output {i}: differs by {(a.double() - b.double()).abs().max().item():.2e}"


def run_with_values(graph: fx.GraphModule, inputs: list[Tensor]) -> dict[tuple[str, str], Any]:
    """The value of every node of every graph of the tree, by (path, node); of the last call where a graph is called often."""
    values: dict[tuple[str, str], Any] = {}
    handles = []

    class Recorder(fx.Interpreter):
        def __init__(self, module: fx.GraphModule, path: str) -> None:
            super().__init__(module)
            self.path = path

        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            values[self.path, node.name] = value
            return value

    def watch(path: str, module: fx.GraphModule) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            Recorder(module, path).run(*args)

        handles.append(module.register_forward_pre_hook(hook))

    for path, module in graphs_of(graph):
        if path:
            watch(path, module)
    with torch.no_grad():
        Recorder(graph, "").run(*inputs)
    for handle in handles:
        handle.remove()
    return values


def spec_fits(spec: Any, value: Any, sizes: dict[str, int]) -> bool:
    """Whether a value has the type that a spec says, at these sizes."""
    if isinstance(spec, tuple):
        return isinstance(value, (tuple, list)) and all(spec_fits(s, v, sizes) for s, v in zip(spec, value, strict=True))
    assert isinstance(spec, ValueSpec)

    def at(n: Any) -> Any:
        return n.subs({s: sizes[str(s)] for s in n.free_symbols}) if hasattr(n, "free_symbols") else n

    if spec.kind == "tensor":
        shape = tuple(int(at(n)) for n in spec.shape)
        return isinstance(value, Tensor) and tuple(value.shape) == shape and str(value.dtype) == f"torch.{spec.dtype}"
    return spec.kind == "other" or (spec.kind in ("int", "float") and at(spec.shape[0]) == value) or spec.kind == "bool"
