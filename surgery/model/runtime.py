"""The module that runs a program: the captured graphs on their own modules at the original paths, trainable as any other.

Each captured region is a :class:`GraphBlock`. Equal regions share one compiled graph. Graphs are recorded with
``torch.bfloat16`` and a fixed device standing for the model's own; when a module is moved or cast, its graphs are written anew
from the recorded ones for the new dtype and device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _forward_from_src
from torch.utils.checkpoint import checkpoint

from surgery.core.diagnostics import fail
from surgery.model import graphjson, masked
from surgery.model.peephole import tune
from surgery.model.program import Program
from surgery.model.runtime_call import Call

MODEL_DTYPE = torch.bfloat16
"""What the recorded graphs write for the model's own dtype."""


class GraphCode:
    """One recorded graph and the functions made of it, one for each dtype and device. Never changed, so copies share it."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._made: dict[tuple[torch.dtype, torch.device], Callable[..., Any]] = {}

    def function(self, dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
        """``function(module, *inputs)`` for a model of this dtype on this device."""
        made = self._made.get((dtype, device))
        if made is None:
            from surgery.model.retarget import retarget_graph

            graph = fx.Graph()
            table: dict[fx.Node, fx.Node] = {}
            graph.output(graph.graph_copy(self.graph, table))
            retarget_graph(graph, dtype=dtype, device=device)
            tune(graph)
            code = graph.python_code("self")
            made = self._made[dtype, device] = _forward_from_src(code.src, dict(code.globals))
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphCode:
        return self


class GraphBlock(nn.Module):
    """A region of the model that runs a graph over its sub-modules; repeated layers are blocks.

    ``gradient_checkpointing`` makes it forget its activations in training and compute them again in the backward pass.
    """

    gradient_checkpointing: bool

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] | None = None

    def set_code(self, code: GraphCode) -> None:
        self._surgery_code = code

    def aim(self, dtype: torch.dtype, device: torch.device) -> None:
        self._surgery_run = self._surgery_code.function(dtype, device)

    def forward(self, *args: Any) -> Any:
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if self._gradient_checkpointing_func is not None:
                return self._gradient_checkpointing_func(self._run, *args)
            return checkpoint(self._run, *args, use_reentrant=False)
        return self._surgery_run(self, *args)

    def _run(self, *args: Any) -> Any:
        return self._surgery_run(self, *args)


class _BlockReader(graphjson.GraphReader):
    """Reads a stored tree into blocks; a graph that stands in many places is checked and compiled once."""

    def __init__(self, data: Any, resolver: Any) -> None:
        super().__init__(data, resolver)
        self.codes: dict[int, GraphCode] = {}

    def holder(self) -> nn.Module:
        return GraphBlock()

    def fill(self, holder: nn.Module, index: int, nodes: list[Any]) -> None:
        assert isinstance(holder, GraphBlock)
        if index not in self.codes:
            self.codes[index] = GraphCode(self.graph(nodes, holder))
        holder.set_code(self.codes[index])


class GraphRoot(nn.Module):
    """What the root module adds to its base class: the graph, the call and the retargeting."""

    _surgery_code: GraphCode
    _surgery_call: Call
    _surgery_record: dict[str, Any]
    _surgery_anchor: tuple[str, ...]
    _surgery_target: tuple[torch.dtype, torch.device]

    def adopt(self, block: GraphBlock, call: Call, anchor: tuple[str, ...], record: dict[str, Any]) -> None:
        """Take the place of the tree's root block: its tensors, its children and its graph."""
        self._modules = block._modules
        self._parameters = block._parameters
        self._buffers = block._buffers
        self._non_persistent_buffers_set = block._non_persistent_buffers_set
        self._surgery_code = block._surgery_code
        self._surgery_call, self._surgery_anchor, self._surgery_record = call, anchor, record
        self.retarget()

    def retarget(self) -> None:
        """Make the graphs fit the dtype and device that the model's tensors have now."""
        target = self._target()
        if target == self.__dict__.get("_surgery_target"):
            return
        for block in self.modules():
            if isinstance(block, GraphBlock):
                block.aim(*target)
        self._surgery_run = self._surgery_code.function(*target)
        self._surgery_target = target

    def _target(self) -> tuple[torch.dtype, torch.device]:
        for name in self._surgery_anchor:
            tensor = self.get_parameter(name)
            return tensor.dtype, tensor.device
        first = next(iter([*self.parameters(), *self.buffers()]), None)
        return MODEL_DTYPE if first is None else torch.float32, torch.device("cpu") if first is None else first.device

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        masked.bind(self)  # a copy's parameters have no hooks yet

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.retarget()
        return self

    def run_flat(self, flat: list[Tensor]) -> tuple[Any, ...]:
        return self._surgery_run(self, *flat)


class CapturedModule(GraphRoot):
    """A plain module with its original signature."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given, _ = self._surgery_call.arguments(args, kwargs, type(self).__name__)
        dtype, device = self._surgery_target
        return self._surgery_call.result(self.run_flat(self._surgery_call.flat(given, dtype, device)))

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Let every layer forget its activations in training and compute them again in the backward pass."""
        options = gradient_checkpointing_kwargs or {"use_reentrant": False}
        for block in self.modules():
            if isinstance(block, GraphBlock):
                block.gradient_checkpointing = True
                block._gradient_checkpointing_func = lambda run, *args: checkpoint(run, *args, **options)

    def gradient_checkpointing_disable(self) -> None:
        for block in self.modules():
            if isinstance(block, GraphBlock):
                block.gradient_checkpointing = False


def build_module(
    program: Program | Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    resolver: Any = None,
) -> nn.Module:
    """The trainable module of a program, or of the record that an artifact stores.

    ``tensors`` holds every parameter and buffer by its first name. Tensors whose recorded dtype is the model's own get ``dtype`` (default: the one
    recorded for the model). On the CPU with fitting dtypes the given tensors themselves become the parameters.
    Raises S0833 when a tensor is missing or has another shape, and the errors of :func:`surgery.model.graphjson.load`.
    """
    if isinstance(program, Program):
        from surgery.model.record import record_of

        program = record_of(program)
    record = dict(program)
    block = graphjson.read_with(_BlockReader, record["graph"], resolver)
    assert isinstance(block, GraphBlock)
    wanted = dtype or graphjson.dtype_of(record["dtype"])
    anchor = tuple(n for n, p in block.named_parameters() if p.dtype == MODEL_DTYPE)[:1]
    _fill(block, tensors, record, torch.device(device), wanted)
    from surgery.model.record import signature_of

    call = Call(signature_of(record), block._surgery_code.graph)
    if record["info"].get("family"):
        from surgery.model.runtime_hf import make_root

        root: Any = make_root(record, call)
    else:
        root = type(record["info"].get("architecture") or "Captured", (CapturedModule,), {"__module__": __name__})()
    root.adopt(block, call, anchor, record)
    root.train(False)
    masked.bind(root)
    return root


def _fill(block: GraphBlock, tensors: Mapping[str, Tensor], record: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> None:
    """Put real tensors in the place of the meta ones; names of one meta tensor keep sharing one."""
    frozen = set(record["frozen"])
    aliases: dict[str, str] = record["aliases"]
    done: dict[int, Tensor] = {}
    by_name: dict[str, Tensor] = {}
    seen: list[Tensor] = []  # keeps the meta tensors alive, so that their ids stay theirs
    for prefix, holder in block.named_modules():
        for store, trains in ((holder._parameters, True), (holder._buffers, False)):
            for leaf, meta in list(store.items()):
                if meta is None:
                    continue
                name = f"{prefix}.{leaf}" if prefix else leaf
                first = aliases.get(name, name)
                if id(meta) in done or first in by_name:
                    store[leaf] = done[id(meta)] if id(meta) in done else by_name[first]  # type: ignore[assignment]
                    continue
                given = tensors.get(first, tensors.get(name))
                if given is None:
                    raise fail(
                        "S0833",
                        f"there is no tensor for {name}",
                        help="emit the artifact again, or give every parameter and buffer of the program",
                    )
                if tuple(given.shape) != tuple(meta.shape):
                    raise fail(
                        "S0833",
                        f"the tensor for {name} has the shape {list(given.shape)}, the graph needs {list(meta.shape)}",
                        help="emit the artifact again from its spec",
                    )
                value = given.detach().to(device=device, dtype=dtype if meta.dtype == MODEL_DTYPE else meta.dtype)
                if trains:
                    grad = value.is_floating_point() and name not in frozen and first not in frozen
                    value = nn.Parameter(value, requires_grad=grad)
                seen.append(meta)
                store[leaf] = done[id(meta)] = by_name[first] = value  # type: ignore[assignment]
