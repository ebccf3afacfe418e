"""What passes may learn from weights and calibration data while ``compile`` walks a spec.

The model runs part by part (a layer, or a module outside the layers): all samples go through a part before the next part's
weights are read. So the memory is that of one part's weights and of the values between the parts, whatever the model's size.
Each batch runs on one thread (several batches side by side where there are more), and sums are made in the order of the batches, so that
the same data gives the same bits on any machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from surgery.core.diagnostics import fail
from surgery.core.site import NodeRef
from surgery.model.data import Batch, Samples
from surgery.model.live import Tensors
from surgery.model.program import Program
from surgery.model.realise import one_thread
from surgery.model.study_grad import Backward, names_in
from surgery.model.study_loss import Objective
from surgery.model.study_run import (
    NOTHING,
    CallHook,
    Hook,
    Later,
    Part,
    Rows,
    Runner,
    Watch,
    check_finite,
    fit,
    in_order,
    lanes,
    needed,
    root_graph,
    serve,
    spared,
)

Settle = Callable[[tuple[str, ...]], bool]
"""``settle(names)``: every use of these parameters was seen; True when their expressions were replaced."""


@dataclass
class Study:
    """Reads weights of the program as the lines above left it. ``progress(text, done, total)`` reports long work."""

    tensors: Tensors
    progress: Callable[..., None] = lambda *what: None

    def tensor(self, program: Program, name: str) -> Tensor:
        """One realised tensor by its name or a tied name, in its stored dtype. Do not change it in place."""
        return self.tensors.of(program, name)

    def observe(
        self,
        program: Program,
        samples: Samples,
        inputs: Mapping[NodeRef, Hook] | None = None,
        outputs: Mapping[NodeRef, Hook] | None = None,
        *,
        calls: Mapping[NodeRef, CallHook] | None = None,
        settle: Settle | None = None,
        dtype: torch.dtype = torch.float32,
        text: str = "reading calibration data",
    ) -> None:
        """One forward pass of all samples in evaluation mode, streamed part by part.

        ``inputs`` and ``outputs`` map a node to ``hook(value, keep)``: the node's first argument, or its result (of several the
        first), once per batch in the order of the samples; ``keep`` is a bool tensor of the value's shape without its last
        axis, True for real tokens, or None where the value has no axis of tokens (then every entry counts). ``calls`` map a node
        to ``hook(arguments, result, keep)`` with ``keep(i)`` for argument ``i``. Do not change values in place. What nothing depends on is not run.

        ``settle`` makes the pass sequential: after a part saw all samples it is called with the names of the parameters
        whose last use this was (at the end for parameters that the root graph reads itself). It may replace their expressions in ``program.weights`` (True says that it did); the part then
        runs again with the new weights, and the parts behind see what it gives now. Hooks see each batch once.

        Raises S0752 and S0753 for weights and values that are not finite.
        """
        work = Pass(self, program, list(samples.batches(program, dtype=dtype)), Watch(inputs, outputs, calls), dtype, text)
        with one_thread(), torch.no_grad():
            work.run(settle)

    def outputs(self, program: Program, samples: Samples, *, dtype: torch.dtype = torch.float32) -> list[tuple[Any, ...]]:
        """The flat outputs of every batch of a streamed forward pass."""
        with one_thread(), torch.no_grad():
            return Pass(self, program, list(samples.batches(program, dtype=dtype)), Watch(), dtype, "running the model").run(
                None, results=True
            )

    def flat_outputs(
        self, program: Program, inputs: Iterable[Sequence[Tensor]], *, dtype: torch.dtype = torch.float32
    ) -> list[tuple[Any, ...]]:
        """The flat outputs for flat inputs, bit for bit those of :func:`~surgery.model.live.live_root`, without all weights in memory.
        Values that are not finite are given as they are."""
        batches = [Batch(list(flat)) for flat in inputs]
        work = Pass(self, program, batches, Watch(), dtype, "running the model", finite=False)
        with one_thread(), torch.no_grad():
            return work.run(None, results=True)

    def gradients(
        self, program: Program, samples: Samples, names: Iterable[str], consume: Callable[[str, Tensor, int], None], *,
        per_sample: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        """Calls ``consume(name, gradient, sample)`` for everything that :meth:`each_gradient` gives."""
        for name, gradient, sample in self.each_gradient(program, samples, names, per_sample=per_sample, seed=seed, dtype=dtype):
            consume(name, gradient, sample)

    def each_gradient(
        self, program: Program, samples: Samples, names: Iterable[str], *,
        per_sample: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32, max_bytes: int = 1 << 30,
    ) -> Iterator[tuple[str, Tensor, int]]:  # fmt: skip
        """Gradients of the loss of each sample (see :class:`~surgery.model.study_loss.Objective`) with respect to parameters.

        With ``per_sample`` it gives (first name, gradient, number of the sample) for each sample, all of a parameter in the order of the
        samples; else once (first name, sum over the samples in float64, -1). The last parts of the model come first. Tied and shared
        parameters have the sum over their uses. A parameter that the loss does not depend on has zeros.

        Layers run twice; beside the values between the parts, one part's weights and activations are in memory. With ``per_sample``,
        gradients of parameters that several parts use are held for as many samples as fit into ``max_bytes``, and the whole pass is
        repeated for the next ones.

        Raises S0752 for weights that are not finite, S0753 for gradients that are not.
        """
        wanted = list(dict.fromkeys(program.aliases.get(n, n) for n in names))
        batches = list(samples.batches(program, batch=1 if per_sample else None, dtype=dtype))
        size = len(batches)
        if per_sample:
            shared = sum(4 * program.weights[n].nbytes for n in shared_names(program, wanted))
            size = max(1, min(size, max_bytes // shared)) if shared else size
        for start in range(0, len(batches), size):
            yield from self._gradients(program, batches[start : start + size], wanted, dtype, Objective(program, seed), per_sample)

    def _gradients(
        self, program: Program, batches: list[Batch], names: list[str], dtype: torch.dtype, objective: Objective, per_sample: bool
    ) -> Iterator[tuple[str, Tensor, int]]:
        work = Backward(program, self.tensors, batches, names, dtype, objective)
        parts = sum(n.op == "call_module" for n in work.order)
        parts += sum(n.op == "call_module" and n in work.active for n in work.order)
        done = iter(range(1, parts + 1))

        def progress() -> None:
            self.progress("finding gradients", next(done), parts)

        with one_thread(), torch.no_grad():
            work.forward(progress)
        found = work.backward(progress, 1.0, per_sample=per_sample)
        while True:
            with one_thread():
                item = next(found, None)
            if item is None:
                break
            check_gradient(*item)
            yield item
        for name in (n for n in names if n not in work.first_use):
            for batch in batches if per_sample else batches[:1]:
                yield name, torch.zeros(program.weights[name].shape, dtype=torch.float64), batch.first if per_sample else -1


class Pass:
    """One streamed forward pass."""

    def __init__(
        self, study: Study, program: Program, batches: list[Batch], watch: Watch, dtype: torch.dtype, text: str, finite: bool = True
    ) -> None:
        self.study, self.program, self.watch, self.dtype, self.text = study, program, watch, dtype, text
        self.batches, self.finite = batches, finite
        self.lanes = lanes()
        self.graph, table = root_graph(program, dtype)
        self.original = {copy: node for node, copy in table.items()}
        self.memo: dict[str, Any] = {}
        self.read_by_root: list[str] = []

    def run(self, settle: Settle | None, *, results: bool = False) -> list[tuple[Any, ...]]:
        output = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        wanted = [output] if results else [n for n in self.graph.nodes if self._looked_at(n)]
        live = needed(self.graph, wanted)
        order = [n for n in self.graph.nodes if n in live]
        dead = self._dead(order)
        last = self._last_uses_of_parameters(order) if settle else {}
        values: list[dict[fx.Node, Any]] = [{} for _ in self.batches]
        parts = sum(n.op == "call_module" for n in order)
        done = 0
        for node in order:
            if node.op == "output":
                found = [fx.node.map_arg(node.args[0], v.__getitem__) for v in values]
                return [tuple(f) if isinstance(f, list | tuple) else (f,) for f in found]
            self._step(node, values, settle, last.get(node, ()))
            for row in values:
                for gone in dead[node]:
                    row.pop(gone, None)
            if node.op == "call_module":
                done += 1
                self.study.progress(self.text, done, parts)
        if settle and self.read_by_root:
            settle(tuple(self.read_by_root))
        return []

    def _looked_at(self, node: fx.Node) -> bool:
        name = self.original[node].name
        own = any(r == NodeRef("", name) for r in self.watch.refs)
        return own or (node.op == "call_module" and self.watch.inside(str(node.target)))

    def _dead(self, order: list[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
        """Like ``last_uses`` for the nodes that run."""
        seen: set[fx.Node] = set()
        out: dict[fx.Node, list[fx.Node]] = {}
        for node in reversed(order):
            gone = [n for n in dict.fromkeys(node.all_input_nodes) if n not in seen]
            seen.update(gone)
            out[node] = gone if node in seen else [*gone, node]
        return out

    def _step(self, node: fx.Node, values: list[dict[fx.Node, Any]], settle: Settle | None, names: tuple[str, ...]) -> None:
        """One root node over all batches."""
        if node.op == "placeholder":
            index = [n for n in self.graph.nodes if n.op == "placeholder"].index(node)
            for row, batch in zip(values, self.batches, strict=True):
                row[node] = batch.inputs[index]
        elif node.op == "get_attr":
            tensor = self._attribute(str(node.target))
            for row in values:
                row[node] = tensor
        else:
            again = bool(settle and names)
            self._over(node, values, watch=True, again=again)
            if settle and names and settle(names):
                self.memo.clear()
                if node.op == "call_module":
                    self._over(node, values, watch=False)
            return
        for row, batch in zip(values, self.batches, strict=True):
            self._serve(node, (), row[node], batch)

    def _over(self, node: fx.Node, values: list[dict[fx.Node, Any]], *, watch: bool, again: bool = False) -> None:
        """One call over all batches; ``again``: it may run on the same values once more."""
        path = str(node.target) if node.op == "call_module" else ""
        part = Part(self.program, self.study.tensors, path, self.dtype, finite=self.finite) if path else None
        watched = self.watch if watch and path and self.watch.inside(path) else NOTHING
        spare = again and part is not None and part.writes
        # hooks that wait see what a later operation made of a value: then they do not wait
        many = self.lanes if part is not None and not (watched is not NOTHING and part.writes) else 1

        def work(i: int) -> tuple[Any, Any, Later]:
            args = fx.node.map_arg(node.args, values[i].__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, values[i].__getitem__)
            later: Later = []
            if part is None:
                return args, node.target(*args, **kwargs), later  # type: ignore[operator,misc]
            if spare:
                args, kwargs = spared(args), spared(kwargs)
            with torch.no_grad():
                result = Runner(watched, later if many > 1 else None).part(part.module, path, args, kwargs, self.batches[i])  # type: ignore[arg-type]
            if self.finite:
                self._check(node, result, self.batches[i])
            return args, result, later

        for i, (args, result, later) in enumerate(in_order(work, len(self.batches), many)):
            for hook in later:
                hook()
            values[i][node] = result
            if watch:
                self._serve(node, args, result, self.batches[i])
        if part is not None:
            part.release()

    def _serve(self, node: fx.Node, args: Any, value: Any, batch: Batch) -> None:
        ref = NodeRef("", self.original[node].name)
        if ref in self.watch.inputs or ref in self.watch.outputs or ref in self.watch.calls:
            serve(self.watch, ref, node, args, value, Rows(batch))

    def _check(self, node: fx.Node, result: Any, batch: Batch) -> None:
        first = result[0] if isinstance(result, tuple | list) else result
        spec = node.meta.get("spec")
        check_values(str(node.target), first, batch, spec[0] if isinstance(spec, tuple) else spec)

    def _attribute(self, target: str) -> Tensor:
        name = self.program.aliases.get(target, target)
        holder, _, leaf = target.rpartition(".")
        owner = self.program.graph.get_submodule(holder)
        recorded = getattr(owner, leaf)
        value = fit(self.study.tensors.fresh(self.program, name, self.memo), recorded.dtype, self.dtype)
        if self.finite and leaf in owner._parameters:
            check_finite(name, value)
        return value

    def _last_uses_of_parameters(self, order: list[fx.Node]) -> dict[fx.Node, tuple[str, ...]]:
        found: dict[str, fx.Node] = {}
        for node in order:
            for name in names_in(self.program, node):
                found[name] = node
        # what the root reads itself is used somewhere behind: the end of the pass is behind every use
        self.read_by_root = [name for name, node in found.items() if node.op == "get_attr"]
        out: dict[fx.Node, list[str]] = {}
        for name, node in found.items():
            out.setdefault(node, []).append(name)
        return {node: tuple(names) for node, names in out.items()}


def check_values(where: str, value: Any, batch: Batch, spec: Any) -> None:
    """Raises S0753 when a value of real tokens is not finite."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all()):
        return
    keep = batch.mask_for(spec, value)
    real = value if keep is None else value[keep]
    if bool(torch.isfinite(real).all()):
        return
    last = batch.first + batch.rows - 1
    raise fail(
        "S0753", f"the values that leave `{where}` are not finite", exit_code=1,
        notes=(f"seen for samples {batch.first}..{last} of the data",),
        help="look at these samples and at the weights of this part; computing in another dtype does not help, this is float32",
    )  # fmt: skip


def check_gradient(name: str, gradient: Tensor, sample: int) -> None:
    if not bool(torch.isfinite(gradient).all()):
        raise fail(
            "S0753", f"the gradient of `{name}` is not finite", exit_code=1,
            notes=(f"seen for sample {sample} of the data",) if sample >= 0 else (),
            help="look at the samples and at the weights of this part; computing in another dtype does not help, this is float32",
        )  # fmt: skip


def shared_names(program: Program, names: Iterable[str]) -> list[str]:
    """Those parameters that several nodes of the root graph read."""
    count: dict[str, int] = {}
    for node in program.graph.graph.nodes:
        for name in names_in(program, node):
            count[name] = count.get(name, 0) + 1
    return [n for n in names if count.get(n, 0) > 1]
