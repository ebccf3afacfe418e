"""Inductor with less to wait for: what it does twice is done once, what it does one after the other is done at a time. The package has the same bytes.

* Export has made the graph free of writes into values. It traces it again as if it were not, and follows every size that this needs.
* While it folds constants, inductor computes the types of all values several times, whether or not they have changed.
* It waits for the compiler of the wrapper before it starts that of the kernels.

All three are inductor's own functions, which are replaced while a package is made and only where they are there; a torch without them takes longer.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx


@contextmanager
def quick() -> Iterator[None]:
    """Inductor in the block is quicker; for one compilation at a time, as inductor's own settings are."""
    from torch._functorch import aot_autograd
    from torch._inductor import codecache, compile_fx
    from torch._inductor.fx_passes import freezing_patterns

    patches = []
    if callable(trace := getattr(compile_fx, "aot_export_module", None)) and hasattr(aot_autograd, "AOTConfig"):
        patches.append(mock.patch.object(compile_fx, "aot_export_module", as_functional(trace, aot_autograd)))
    if callable(again := getattr(freezing_patterns, "fake_tensor_prop", None)):
        patches.append(mock.patch.object(freezing_patterns, "fake_tensor_prop", where_changed(again)))
    builder = getattr(codecache, "CppBuilder", None)
    if callable(build := getattr(builder, "build", None)) and hasattr(builder, "get_target_file_path"):
        patches.append(mock.patch.object(builder, "build", side_by_side(build)))
    for patch in patches:
        patch.start()
    try:
        yield
    finally:
        for patch in reversed(patches):
            patch.stop()


def as_functional(trace: Callable[..., Any], within: Any) -> Callable[..., Any]:
    """``trace(module, inputs, ...)``, which gives a graph and its signature, without the layer that turns writes into new values, for graphs without
    any; where the trace finds one after all, it is made again with that layer. ``within``: the module whose ``AOTConfig`` the trace reads."""

    def call(module: Any, *given: Any, **more: Any) -> Any:
        if isinstance(module, fx.GraphModule) and functional(module):
            plainly = functools.partial(within.AOTConfig, disable_functionalization=True)
            with mock.patch.object(within, "AOTConfig", plainly):
                found = trace(module, *given, **more)
            if functional(found[0]):
                return found
        return trace(module, *given, **more)

    return call


def functional(gm: fx.GraphModule) -> bool:
    """Whether a graph is made of operations alone that write into none of their operands."""
    for node in gm.graph.nodes:
        if node.op in ("call_module", "call_method"):
            return False
        schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
        if schema is not None and schema.is_mutable:
            return False
        if schema is None and isinstance(node.target, torch._ops.HigherOrderOperator):
            return False
    return True


def where_changed(propagate: Callable[..., Any]) -> Callable[..., Any]:
    """``propagate(graph module, inputs, ...)``, which sets ``meta["val"]`` of every node, computed only for nodes without one, that changed since the
    last call, or that read a value of another type than before. Its result is not looked at.

    Nodes come with values from the trace, and who makes a node gives it one; all are computed once more, by another call, before code is written.
    """
    last: tuple[Any, dict[fx.Node, tuple[Any, ...]]] = (None, {})

    def call(gm: fx.GraphModule, inputs: Any, *rest: Any, **more: Any) -> Any:
        nonlocal last
        from torch._dynamo.utils import detect_fake_mode
        from torch.fx.passes.fake_tensor_prop import FakeTensorProp

        mode = detect_fake_mode(inputs)
        if mode is None or any(n.op == "call_module" or isinstance(n.target, torch._ops.HigherOrderOperator) for n in gm.graph.nodes):
            return propagate(gm, inputs, *rest, **more)
        known = last[1] if last[0] is gm else {}
        seen: dict[fx.Node, tuple[Any, ...]] = {}
        changed: set[fx.Node] = set()
        given = iter(inputs)
        with torch._dispatch.python.enable_python_dispatcher(), mock.patch.object(mode, "allow_non_fake_inputs", True), mode:
            typed = FakeTensorProp(gm, mode=mode)
            for node in gm.graph.nodes:
                if node.op == "output":
                    continue
                seen[node] = now = (node.target, node.args, node.kwargs)
                before = node.meta.get("val")
                if node.op == "placeholder":
                    value = next(given)
                    if before is not value and not alike(before, value):
                        node.meta["val"] = value
                        changed.add(node)
                    continue
                old = known.get(node, now)
                same = all(a is b for a, b in zip(old, now, strict=True))
                if before is not None and same and changed.isdisjoint(node.all_input_nodes):
                    continue
                for source in node.all_input_nodes:
                    typed.env[source] = source.meta["val"]
                typed.run_node(node)
                if alike(before, node.meta.get("val")):
                    node.meta["val"] = before
                else:
                    changed.add(node)
        last = (gm, seen)
        return mode

    return call


def alike(one: Any, other: Any) -> bool:
    """Whether two values are tensors that differ in nothing that the type says. Sizes are compared as they are written, for to ask whether two
    are equal would make it so."""
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return False
    return _type(one) == _type(other)


def _type(value: torch.Tensor) -> tuple[Any, ...]:
    dense = value.layout is torch.strided
    sizes = [*value.shape, *((*value.stride(), value.storage_offset()) if dense else ())]
    return type(value), value.dtype, value.device, value.layout, [n.node.expr if isinstance(n, torch.SymInt) else n for n in sizes]


def side_by_side(build: Callable[..., Any]) -> Callable[..., Any]:
    """``build(builder)`` of which that of the wrapper returns at once; the next one, of the kernels, waits for both and raises what either raised."""
    running: list[tuple[threading.Thread, list[BaseException]]] = []

    def call(builder: Any) -> Any:
        if str(builder.get_target_file_path()).endswith(".wrapper.o"):
            failed: list[BaseException] = []

            def work() -> None:
                try:
                    build(builder)
                except BaseException as exc:
                    failed.append(exc)

            running.append((threading.Thread(target=work, name="wrapper"), failed))
            running[-1][0].start()
            return None
        try:
            return build(builder)
        finally:
            wait()

    def wait() -> None:
        while running:
            thread, failed = running.pop()
            thread.join()
            if failed:
                raise failed[0]

    return call
