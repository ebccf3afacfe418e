"""What a stack must compute: the sources' own layers, called one behind the other in the stated order.

The oracle runs the root graph of the model before and, where its layers stand, calls the layers of the sources as they were captured, each
with the values that its own call had. It shares the layers' graphs with the result and nothing of what rewrote the root.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from surgery.core.source import Span
from surgery.model.claims import Claim, Outputs
from surgery.model.live import Tensors, live_root
from surgery.model.program import Program
from surgery.model.running import outputs_of
from surgery.passes.kinds.drop_graph import given
from surgery.passes.kinds.drop_signature import leaves

if TYPE_CHECKING:
    from surgery.passes.kinds.stack_order import Order


def stacked_claim(after: Program, frame: Program, before: Sequence[Program], order: Order, scaled: frozenset[int], span: Span) -> Claim:
    """``stacked = the layers in this order``, on the outputs that are no cache (an empty cache goes in).

    ``frame`` is the program before with the tensors outside of its layers that the result has, ``before`` are the sources; layers ``scaled``
    of the result are called with their own, scaled tensors.
    """
    run = outputs_of(after)
    kinds = leaves(after.signature.out_spec)

    def expected(tensors: Tensors, flat: Sequence[Tensor]) -> Outputs:
        return _Order(frame, before, order, scaled, after).run(tensors, flat)

    def found(tensors: Tensors, flat: Sequence[Tensor]) -> Outputs:
        outputs = run(tensors, flat)
        return outputs if len(outputs) != len(kinds) else [t for t, k in zip(outputs, kinds, strict=True) if k.kind == "fixed"]

    return Claim("stacked = the layers in this order", after, expected, found, span=span)


class _Order:
    def __init__(self, frame: Program, before: Sequence[Program], order: Order, scaled: frozenset[int], after: Program) -> None:
        self.frame, self.before, self.order, self.scaled, self.after = frame, before, order, scaled, after

    def run(self, tensors: Tensors, flat: Sequence[Tensor]) -> Outputs:
        roots = {id(p): live_root(p, tensors, dtype=torch.float32).eval() for p in self.before}
        frame = live_root(self.frame, tensors, dtype=torch.float32).eval()
        values = dict(zip([str(n.target) for n in self.after.graph.graph.nodes if n.op == "placeholder"], flat, strict=True))
        hidden: Any = None
        result_root = live_root(self.after, tensors, dtype=torch.float32).eval() if self.scaled else None
        container = next(s.path for s in self.after.anatomy.stacks if s.name == self.order.stack)
        for i, taken in enumerate(self.order.layers):
            program = self.before[taken.source]
            call, name = _call(program, self.order.stack, taken.layer)
            if hidden is None:
                hidden = _Until(frame, values, _argument(self.frame, *_call(self.frame, self.order.stack, 0))).value()
            module = roots[id(program)].get_submodule(str(call.target))
            names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
            args = given(call, names)
            asked = {k: v for k, v in args.items() if k != name}
            got = _Until(roots[id(program)], values, list(asked.values())).value()
            own = dict(zip(asked, got, strict=True)) | {name: hidden}
            if result_root is not None and i in self.scaled:
                module = result_root.get_submodule(f"{container}.{i}")
            with torch.no_grad():
                result = module(*(own[n] for n in names))
            index = _result(program, self.order.stack, taken.layer)
            hidden = result if index is None else result[index]
        return _Behind(frame, self.frame, self.order.stack, values).run(hidden)


def _site(program: Program, stack: str, layer: int) -> Any:
    return next(s for s in program.anatomy.sites if s.role == f"{stack}[{layer}]")


def _call(program: Program, stack: str, layer: int) -> tuple[fx.Node, str]:
    """The root's call of a layer, and the name of the argument that is its hidden state."""
    site = _site(program, stack, layer)
    return program.graph.graph.find_nodes(op="call_module", target=site.path)[0], site.input.node


def _argument(program: Program, call: fx.Node, name: str) -> fx.Node:
    names = [n.name for n in program.module(str(call.target)).graph.nodes if n.op == "placeholder"]
    return given(call, names)[name]  # type: ignore[no-any-return]


def _result(program: Program, stack: str, layer: int) -> int | None:
    site = _site(program, stack, layer)
    returned = program.module(site.path).graph.output_node().args[0]
    if not isinstance(returned, tuple | list):
        return None
    return [getattr(n, "name", "") for n in returned].index(site.output.node)


class _Until:
    """Values of a root that do not depend on layers, computed from named inputs."""

    def __init__(self, root: fx.GraphModule, inputs: Mapping[str, Tensor], wanted: Any) -> None:
        self.root, self.inputs, self.wanted = root, inputs, wanted

    def value(self) -> Any:
        one = isinstance(self.wanted, fx.Node)
        names = [self.wanted.name] if one else [n.name for n in self.wanted]
        by_name = {n.name: n for n in self.root.graph.nodes}
        done: dict[str, Any] = {}
        run = fx.Interpreter(self.root, garbage_collect_values=False)
        need = _ancestors([by_name[n] for n in names])
        for node in self.root.graph.nodes:
            if node not in need:
                continue
            if node.op == "placeholder":
                run.env[node] = self._input(str(node.target))
            else:
                with torch.no_grad():
                    run.env[node] = run.run_node(node)
            done[node.name] = run.env[node]
        return done[names[0]] if one else [done[n] for n in names]

    def _input(self, name: str) -> Tensor:
        if name in self.inputs:
            return self.inputs[name]
        stem = name.rstrip("0123456789")  # the cache of a layer that the result does not have: empty like all
        return next(v for k, v in self.inputs.items() if k.rstrip("0123456789") == stem)


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack += node.all_input_nodes
    return seen


class _Behind:
    """What follows the layers, from the last hidden state to the outputs that are no cache."""

    def __init__(self, root: fx.GraphModule, program: Program, stack: str, inputs: Mapping[str, Tensor]) -> None:
        self.root, self.program, self.stack, self.inputs = root, program, stack, inputs

    def run(self, hidden: Any) -> Outputs:
        last = max(s.layer for s in self.program.anatomy.sites if s.stack == self.stack and s.role == f"{self.stack}[{s.layer}]")  # type: ignore[type-var]
        call, _ = _call(self.program, self.stack, int(last or 0))
        index = _result(self.program, self.stack, int(last or 0))
        ends = {call.name} if index is None else {u.name for u in call.users if len(u.args) > 1 and u.args[1] == index}
        kinds = leaves(self.program.signature.out_spec)
        flat = self.root.graph.output_node().args[0]
        values = list(flat) if isinstance(flat, tuple | list) else [flat]
        wanted = [v for v, k in zip(values, kinds, strict=True) if k.kind == "fixed" and isinstance(v, fx.Node)]
        run = fx.Interpreter(self.root, garbage_collect_values=False)
        need: set[fx.Node] = set()
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in need:
                need.add(node)
                if node.name not in ends:
                    stack += node.all_input_nodes
        for node in self.root.graph.nodes:
            if node not in need:
                continue
            if node.name in ends:
                run.env[node] = hidden
            elif node.op == "placeholder":
                run.env[node] = _Until(self.root, self.inputs, node).value()
            else:
                with torch.no_grad():
                    run.env[node] = run.run_node(node)
        return [t for n in wanted if isinstance(t := run.env[n], Tensor) and t.is_floating_point()]
