"""Inductor with less to wait for: what it does twice is done once, what it does one after the other is done at a time. The package has the same bytes.

* While it folds constants, inductor computes the types of all values again, whether or not the graph has changed.
* It waits for the compiler of the wrapper before it starts that of the kernels.

Both are inductor's own functions, which are replaced while a package is made and only where they are there; a torch without them takes longer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import fx


@contextmanager
def quick() -> Iterator[None]:
    """Inductor in the block is quicker; for one compilation at a time, as inductor's own settings are."""
    from torch._inductor import codecache
    from torch._inductor.fx_passes import freezing_patterns

    patches = []
    if callable(again := getattr(freezing_patterns, "fake_tensor_prop", None)):
        patches.append(mock.patch.object(freezing_patterns, "fake_tensor_prop", when_changed(again)))
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


def when_changed(propagate: Callable[..., Any]) -> Callable[..., Any]:
    """``propagate(graph module, inputs, ...)`` for graphs that are not as they were in the last call; its result is not looked at."""
    last: list[tuple[Any, ...]] = []

    def call(gm: fx.GraphModule, inputs: Any, *rest: Any, **more: Any) -> Any:
        seen = (
            id(gm), tuple(id(i) for i in inputs),
            tuple((n.op, n.name, n.target, repr(n.args), repr(n.kwargs), id(n.meta.get("val"))) for n in gm.graph.nodes),
        )  # fmt: skip
        if last and last[0] == seen:
            return None
        found = propagate(gm, inputs, *rest, **more)
        # values are new objects after every call
        last[:] = [(*seen[:2], tuple((*old[:5], id(n.meta.get("val"))) for old, n in zip(seen[2], gm.graph.nodes, strict=True)))]
        return found

    return call


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
