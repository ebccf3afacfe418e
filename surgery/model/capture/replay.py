"""Whether the layers that were not traced do what the traced one does: each is run once on meta tensors and its calls compared.

Twins are told apart by what a module holds; a layer may still behave by what it does not hold: an index that it computes with,
a counter, a closure. Run without a tracer and without data, a layer of any size takes milliseconds, and the calls that it makes
of torch, with their arguments and where these come from, decide what a trace of it would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from surgery.model.capture import boards
from surgery.model.capture.errors import Fallback, model_frame

Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]


@dataclass
class Visit:
    """One call of a layer: its forward, the call's leaves with None for tensors, which tensor each of those is, the layouts
    of all tensors (those on boards after the leaves', a cache's keys and values last), and the places of caches and boards among
    the leaves."""

    path: str
    module: nn.Module
    forward: Callable[..., Any]
    tree: Any
    leaves: list[Any]
    places: list[tuple[int, int]]
    layouts: list[Layout]
    caches: list[tuple[int, int]]  # leaf -> number of the cache
    slots: list[int]  # index of the layer that each cache is read at
    boards: list[tuple[list[int], type, boards.Shape]]  # leaves that are this board, its class, what it held


def layout(t: Tensor) -> Layout:
    return tuple(map(_hint, t.size())), tuple(map(_hint, t.stride())), t.dtype


def _hint(n: Any) -> int:
    return int(n.node.hint) if isinstance(n, torch.SymInt) else int(n)


def plain(leaf: Any) -> Any:
    """A leaf that is no tensor, sizes as numbers."""
    return _hint(leaf) if isinstance(leaf, torch.SymInt) else leaf


def compare(visits: list[tuple[Visit, Visit]]) -> None:
    """Checks each (traced, stamped) pair. Raises Fallback that names the first layer that does something else."""
    known: dict[int, tuple[_Recorder, Any, list[Tensor]]] = {}
    with _as_in_export():
        for traced, stamped in visits:
            if id(traced) not in known:
                tensors = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in traced.layouts]
                recorder = _Recorder(traced.module, tensors)
                known[id(traced)] = recorder, _run(traced, tensors, recorder), tensors
            recorder, results, tensors = known[id(traced)]
            echo = _Echo(stamped.module, tensors, recorder)
            try:
                same = _run(stamped, tensors, echo) == results and len(echo.calls) == len(recorder.calls)
                why = "" if same else ": it returns something else"
            except _Differs as error:
                same, why = False, str(error)
            if not same:
                raise Fallback(f"`{stamped.path}` does something else than `{traced.path}`{why}")


def _run(visit: Visit, tensors: list[Tensor], mode: _Recorder) -> Any:
    """Calls the layer with these tensors; what it returns and leaves in its caches, as labels."""
    leaves = list(visit.leaves)
    for i, position in visit.places:
        leaves[i] = tensors[position]
    first = len(tensors) - 2 * len(visit.slots)
    made = [_cache(index, tensors[first + 2 * n], tensors[first + 2 * n + 1]) for n, index in enumerate(visit.slots)]
    for i, n in visit.caches:
        leaves[i] = made[n]
    written = [kind() for _, kind, _ in visit.boards]
    held = iter(tensors[first - sum(count for *_, shape in visit.boards for _, count in shape) : first])
    for board, (at, _, shape) in zip(written, visit.boards, strict=True):
        boards.fill(board, shape, held)
        for i in at:
            leaves[i] = board
    args, kwargs = pytree.tree_unflatten(leaves, visit.tree)
    with _equal_rates(visit.module):
        try:
            with mode:
                out = visit.forward(*args, **kwargs)
        except _Differs:
            raise
        except Exception as error:
            frame = model_frame(error)
            raise Fallback(f"`{visit.path}` cannot be run again" + (f" ({frame.name}, line {frame.lineno})" if frame else "")) from error
    results = [mode.label(leaf) for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]
    kept = [mode.label(t) for cache, index in zip(made, visit.slots, strict=True) for t in _held(cache.layers[index])]
    return results, kept, [(key, [mode.label(t) for t in value]) for board in written for key, value in board.items()]


def _cache(index: int, keys: Tensor, values: Tensor) -> Any:
    """A cache that is filled at ``index``; the layers before it are never read by this call."""
    from surgery.model.capture.flatcall import filled_cache

    cache = filled_cache([keys], [values])
    cache.layers = cache.layers * (index + 1)
    return cache


def _held(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


@contextmanager
def _as_in_export() -> Iterator[None]:
    """Model code asks whether it is being traced, and must answer as it did then."""
    compiler: Any = torch.compiler
    before = compiler._is_compiling_flag, compiler._is_exporting_flag
    compiler._is_compiling_flag = compiler._is_exporting_flag = True
    try:
        yield
    finally:
        compiler._is_compiling_flag, compiler._is_exporting_flag = before


@contextmanager
def _equal_rates(module: nn.Module) -> Iterator[None]:
    """The rates of dropout modules may differ between twins: each layer keeps its own."""
    found = [(m, m.p) for m in module.modules() if isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0]
    for m, _ in found:
        m.p = 0.5
    try:
        yield
    finally:
        for m, p in found:
            m.p = p


class _Differs(Exception):
    """A stamped layer made another call than the traced one; the text says which."""


@dataclass
class _Called:
    """One call of torch: arguments with tensors as where they come from; ``source`` is the tensor argument that ``out`` is."""

    func: Any
    args: Any
    out: Any
    source: int | None

    def name(self) -> str:
        return str(getattr(self.func, "__qualname__", None) or getattr(self.func, "__name__", self.func))


class _Recorder(TorchFunctionMode):
    """Runs every call and keeps it."""

    def __init__(self, module: nn.Module, inputs: list[Tensor]) -> None:
        super().__init__()
        self.calls: list[_Called] = []  # keeps what they returned alive, so that no id is used twice
        self.inputs = inputs
        self.labels: dict[int, Any] = {id(t): ("input", i) for i, t in enumerate(inputs)}
        for kind in (module.named_parameters, module.named_buffers):
            for name, tensor in kind(remove_duplicate=False):
                self.labels.setdefault(id(tensor), ("own", name))

    def label(self, tensor: Tensor) -> Any:
        return self.labels.get(id(tensor), ("outside", id(tensor)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = self.encode((args, kwargs))
        out = func(*args, **kwargs)
        source = next((i for i, t in enumerate(_tensors((args, kwargs))) if t is out), None)
        self.note(_Called(func, given, out, source))
        return out

    def note(self, called: _Called) -> None:
        self.calls.append(called)
        out = called.out
        for j, value in enumerate(out if isinstance(out, (tuple, list)) else (out,)):
            if isinstance(value, Tensor):
                self.labels[id(value)] = ("call", len(self.calls), j)

    def encode(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.label(value)
        if isinstance(value, (tuple, list)):
            return tuple([self.encode(v) for v in value])
        if value is None or isinstance(value, _PLAIN):
            return (type(value), value)
        if isinstance(value, dict):
            return tuple([(k, self.encode(v)) for k, v in value.items()])
        if isinstance(value, slice):
            return ("slice", self.encode((value.start, value.stop, value.step)))
        if value is Ellipsis or isinstance(value, type):
            return value
        if hasattr(value, "same_as"):
            return (type(value), self.encode(value.same_as()))
        return ("object", id(value))


_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format, torch.layout)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in _tensors(v)]
    return [t for v in value.values() for t in _tensors(v)] if isinstance(value, dict) else []


class _Echo(_Recorder):
    """Expects the recorded calls in their order and answers them with what they returned: nothing is computed again.

    Raises _Differs at the first call that is another one, has other arguments or is one too many.
    """

    def __init__(self, module: nn.Module, inputs: list[Tensor], recorded: _Recorder) -> None:
        super().__init__(module, inputs)
        self.recorded = recorded.calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        at = len(self.calls)
        if at >= len(self.recorded):
            raise _Differs(f": it makes more than {at} calls of torch")
        known = self.recorded[at]
        if func is not known.func and func != known.func:
            raise _Differs(f" at its call {at} of torch ({known.name()})")
        if self.encode((args, kwargs)) != known.args:
            raise _Differs(f" in what it gives to {known.name()} (call {at} of torch)")
        if known.source is not None:
            out: Any = _tensors((args, kwargs))[known.source]
        elif known.out is None or isinstance(known.out, (Tensor, torch.Size, *_PLAIN)):
            out = known.out
        elif isinstance(known.out, (tuple, list)) and not any(t is o for t in _tensors((args, kwargs)) for o in known.out):
            out = type(known.out)(known.out) if type(known.out) in (tuple, list) else known.out
        else:
            out = func(*args, **kwargs)
        self.note(_Called(func, known.args, out, known.source))
        return out
