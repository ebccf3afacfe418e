"""Running a program part by part: a part's weights are there only while the part runs.

A *part* is one call in the root graph: a repeated layer, an ``nn`` leaf outside the layers, or a parameter that the root reads. The
graphs are interpreted node by node, so that any value inside can be looked at; a value is dropped after its last use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from surgery.core.diagnostics import fail
from surgery.core.site import NodeRef
from surgery.core.source import Span
from surgery.model.data import Batch
from surgery.model.lazygraph import copy_tree
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.model.retarget import retarget, retarget_graph
from surgery.model.threads import alone

MODEL_DTYPE = torch.bfloat16
"""What captured graphs write for the model's own dtype."""

T = TypeVar("T")

Hook = Callable[[Tensor, Tensor | None], None]
"""``hook(value, keep)``: a value of one batch, and which of its rows are real tokens (None: all)."""

CallHook = Callable[[tuple[Any, ...], Any, Callable[[int], Tensor | None]], None]
"""``hook(arguments, result, keep)``: a whole call of one batch; ``keep(i)`` says which rows of argument ``i`` are real tokens."""


class Watch:
    """What is looked at: hooks by node, on the first argument, on the result, or on the whole call."""

    def __init__(
        self,
        inputs: Mapping[NodeRef, Hook] | None = None,
        outputs: Mapping[NodeRef, Hook] | None = None,
        calls: Mapping[NodeRef, CallHook] | None = None,
    ) -> None:
        self.inputs, self.outputs, self.calls = dict(inputs or {}), dict(outputs or {}), dict(calls or {})
        self.refs = (*self.inputs, *self.outputs, *self.calls)

    def inside(self, path: str) -> bool:
        """Whether something is looked at in the graph at ``path`` or below it."""
        return any(r.graph == path or r.graph.startswith(path + ".") for r in self.refs)


NOTHING = Watch()


class Part:
    """One module of the root graph with its weights, or the pseudo part of a parameter."""

    def __init__(
        self, program: Program, tensors: Tensors, path: str, dtype: torch.dtype, trained: Iterable[str] = (), *, finite: bool = True
    ) -> None:
        """``trained``: names of parameters that are to require gradients. With ``finite`` raises S0752 for weights that are not."""
        self.module: nn.Module = copy_tree(program.graph.get_submodule(path))
        self.parameters: dict[str, nn.Parameter] = {}
        retarget(self.module, dtype=dtype, device=torch.device("cpu"))
        memo: dict[str, Any] = {}
        wanted = set(trained)
        for inner, holder in self.module.named_modules():
            prefix = f"{path}.{inner}." if inner else f"{path}."
            for leaf, parameter in holder._parameters.items():
                if parameter is None:
                    continue
                name = program.aliases.get(prefix + leaf, prefix + leaf)
                if name not in self.parameters:
                    value = fit(tensors.fresh(program, name, memo), parameter.dtype, dtype)
                    if finite:
                        check_finite(name, value)
                    self.parameters[name] = nn.Parameter(value, requires_grad=name in wanted and value.is_floating_point())
                holder._parameters[leaf] = self.parameters[name]
            for leaf, buffer in holder._buffers.items():
                if buffer is not None:
                    name = program.aliases.get(prefix + leaf, prefix + leaf)
                    holder._buffers[leaf] = fit(tensors.fresh(program, name, memo), buffer.dtype, dtype)
        self.module.eval()

    @property
    def writes(self) -> bool:
        """Whether something in it changes a tensor in place, perhaps one that the part is given."""
        graphs = (m.graph for m in self.module.modules() if isinstance(m, fx.GraphModule))
        return any(writes(node) for graph in graphs for node in graph.nodes)

    def release(self) -> None:
        """Lets the weights go now: graph modules refer to each other in circles, which would keep them for a while."""
        self.parameters.clear()
        for holder in self.module.modules():
            holder._parameters.clear()
            holder._buffers.clear()


def fit(value: Tensor, recorded: torch.dtype, dtype: torch.dtype) -> Tensor:
    """A stored tensor in the dtype that it is computed in: ``dtype`` where the capture recorded the model's own."""
    return value.to(dtype if recorded == MODEL_DTYPE else recorded)


def check_finite(name: str, value: Tensor, span: Span | None = None) -> None:
    """Raises S0752 for a weight with elements that are NaN or infinite; ``span`` is the statement that needs it."""
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        count = int((~torch.isfinite(value)).sum())
        raise fail(
            "S0752", f"the weight `{name}` is not finite", span, "needs its values" if span else "", exit_code=1,
            notes=(f"{count} of {value.numel():,} elements are NaN or infinite",),
            help="scores and calibration need finite weights: mend or train the checkpoint again",
        )  # fmt: skip


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values that are not needed after it."""
    seen: set[fx.Node] = set()
    out: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        dead = [n for n in dict.fromkeys(node.all_input_nodes) if n not in seen]
        seen.update(dead)
        if node not in seen and node.op != "output":
            dead.append(node)  # nothing reads it
        out[node] = dead
    return out


Later = list[Callable[[], None]]


class Runner:
    """Interprets graphs. ``watch`` is served as values appear; with ``later`` the calls of hooks are put there instead."""

    def __init__(self, watch: Watch = NOTHING, later: Later | None = None) -> None:
        self.watch = watch
        self.later = later
        self._last: dict[int, tuple[fx.Graph, dict[fx.Node, list[fx.Node]]]] = {}

    def part(self, module: nn.Module, path: str, args: Sequence[Any], kwargs: Mapping[str, Any], batch: Batch) -> Any:
        if isinstance(module, fx.GraphModule):
            return self.graph(module, path, args, kwargs, batch)
        return module(*args, **kwargs)

    def graph(self, module: fx.GraphModule, path: str, args: Sequence[Any], kwargs: Mapping[str, Any], batch: Batch) -> Any:
        dead = self._dead(module.graph)
        values: dict[fx.Node, Any] = {}
        rows = Rows(batch) if self.watch.inside(path) else None
        incoming = iter(args)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                missing = node.args[0] if node.args else None
                values[node] = next(incoming, kwargs.get(str(node.target), missing))
                own_args: tuple[Any, ...] = ()
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            else:
                own_args = fx.node.map_arg(node.args, values.__getitem__)  # type: ignore[assignment]
                own_kwargs = fx.node.map_arg(node.kwargs, values.__getitem__)
                values[node] = self._one(module, path, node, own_args, own_kwargs, batch)  # type: ignore[arg-type]
            if rows is not None:
                serve(self.watch, NodeRef(path, node.name), node, own_args, values[node], rows, self.later)
            for gone in dead[node]:
                values.pop(gone, None)
        raise AssertionError("a graph ends with its output")

    def _one(self, owner: fx.GraphModule, path: str, node: fx.Node, args: Any, kwargs: Mapping[str, Any], batch: Batch) -> Any:
        if node.op == "get_attr":
            return attribute(owner, str(node.target))
        if node.op == "call_module":
            inner = owner.get_submodule(str(node.target))
            return self.part(inner, join(path, str(node.target)), args, kwargs, batch)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _dead(self, graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
        known = self._last.get(id(graph))
        if known is None or known[0] is not graph:
            known = self._last[id(graph)] = (graph, last_uses(graph))
        return known[1]


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def attribute(holder: Any, target: str) -> Any:
    for part in target.split("."):
        holder = getattr(holder, part)
    return holder


class Rows:
    """Which rows of each value of one graph are real tokens, followed through what reorders and repeats rows (routing)."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.known: dict[fx.Node, Tensor] = {}

    def of(self, node: Any, value: Any) -> Tensor | None:
        if not isinstance(value, Tensor) or not isinstance(node, fx.Node) or not self.batch.masks:
            return None
        found = self.known.get(node)
        if found is not None and found.shape[0] == value.shape[0]:
            return found.reshape(-1, *[1] * (value.ndim - 2)).expand(value.shape[:-1]) if value.ndim > 1 else found
        return self.batch.mask_for(node.meta.get("spec"), value)

    def follow(self, node: fx.Node, args: tuple[Any, ...], value: Any) -> None:
        """Notes the rows of a value whose own type does not tell: rows that an index picks, then whatever keeps their number."""
        if not isinstance(value, Tensor) or value.ndim == 0 or not self.batch.masks or not node.args:
            return
        source = node.args[0]
        if not isinstance(source, fx.Node) or self.batch.mask_for(node.meta.get("spec"), value) is not None:
            return
        if node.target in _PICKS:
            index = args[1][0] if isinstance(args[1], list | tuple) and len(args[1]) == 1 else None
            rows = self.of(source, args[0])
            if isinstance(index, Tensor) and index.ndim == 1 and index.dtype == torch.int64 and rows is not None:
                flat = rows if rows.ndim == 1 else rows[(slice(None), *[0] * (rows.ndim - 1))]
                self.known[node] = flat[index]
            return
        for each, given in zip(node.args, args, strict=False):
            rows = self.known.get(each) if isinstance(each, fx.Node) else None
            if rows is not None and isinstance(given, Tensor | tuple | list) and value.shape[0] == rows.shape[0]:
                self.known[node] = rows
                return


_PICKS = (torch.ops.aten.index.Tensor,)


def serve(
    watch: Watch, ref: NodeRef, node: fx.Node, args: tuple[Any, ...], value: Any, rows: Rows, later: Later | None = None
) -> None:  # fmt: skip
    """Calls the hooks of one node."""
    rows.follow(node, args, value)
    if isinstance(value, tuple | list) and node.args and isinstance(node.args[0], fx.Node) and node.args[0] in rows.known:
        rows.known[node] = rows.known[node.args[0]]  # chunks keep the number of rows
    if hook := watch.inputs.get(ref):
        first = args[0] if args else value
        _tell(later, hook, first, rows.of(node.args[0] if node.args else node, first))
    if hook := watch.outputs.get(ref):
        result = value[0] if isinstance(value, tuple | list) else value
        _tell(later, hook, result, _rows_of_result(node, result, value, rows))
    if call := watch.calls.get(ref):
        keeps = [rows.of(source, given) for source, given in zip(node.args, args, strict=True)]
        _tell(later, call, args, value, keeps.__getitem__)


def _tell(later: Later | None, hook: Callable[..., None], *what: Any) -> None:
    if later is None:
        hook(*what)
    else:
        later.append(partial(hook, *what))


def in_order(work: Callable[[int], T], count: int, lanes: int) -> Iterator[T]:
    """``work(0), work(1), ...`` in this order, up to ``lanes`` of them at a time in threads of their own, each with one thread inside:
    the results are those of one lane, bit for bit."""
    if lanes <= 1 or count <= 1:
        yield from (work(i) for i in range(count))
        return
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(min(lanes, count), initializer=alone) as pool:
        try:
            for i in range(count):
                pending.append(pool.submit(work, i))
                if len(pending) >= lanes:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def lanes() -> int:
    """How many batches run at a time: as many as torch may use threads, at most eight, since each holds its own activations."""
    return min(8, torch.get_num_threads())


def _rows_of_result(node: fx.Node, result: Any, value: Any, rows: Rows) -> Tensor | None:
    if result is value:
        return rows.of(node, result)
    spec = node.meta.get("spec")
    return rows.batch.mask_for(spec[0], result) if isinstance(spec, tuple) and isinstance(result, Tensor) else None


def root_graph(program: Program, dtype: torch.dtype) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the root graph for this dtype on the CPU, and the copy of each node."""
    graph = fx.Graph()
    table: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(program.graph.graph, table)
    out = graph.output(result)
    for node in program.graph.graph.nodes:
        if node.op == "output":
            table[node] = out
            out.meta.update(node.meta)
    retarget_graph(graph, dtype=dtype, device=torch.device("cpu"))
    return graph, table


def writes(node: fx.Node) -> bool:
    """Whether an operation changes its first argument."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def spared(value: Any) -> Any:
    """Copies of the tensors of an argument, for a part that may change them and will run on them again."""
    return fx.node.map_aggregate(value, lambda v: v.clone() if isinstance(v, Tensor) else v)


def needed(graph: fx.Graph, wanted: Iterable[fx.Node]) -> set[fx.Node]:
    """The wanted nodes and all that they depend on, through changes in place too."""
    out: set[fx.Node] = set()
    queue = list(wanted)
    changers = [n for n in graph.nodes if writes(n)]
    while queue:
        node = queue.pop()
        if node in out:
            continue
        out.add(node)
        queue.extend(node.all_input_nodes)
        queue.extend(c for c in changers if c not in out and c.args and c.args[0] in out)
    return out
