"""What a model without some parts must compute: the model before, run as it was, with those parts bypassed as it runs.

Written against values, not graphs: a layer's result is replaced by what went in, a branch's result by zeros. So it shares nothing
with the rewriting that it judges, except where a branch ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.core.site import Site
from surgery.core.source import Span
from surgery.model.claims import Claim, Outputs
from surgery.model.live import Tensors, live_root
from surgery.model.program import Program
from surgery.model.running import outputs_of
from surgery.passes.kinds.drop_graph import branch_end


@dataclass
class Bypassed:
    """A program before the change, and what is bypassed in it: whole layers, and branches beside the residual stream."""

    before: Program
    layers: list[Site] = field(default_factory=list)
    branches: list[Site] = field(default_factory=list)

    def run(self, tensors: Tensors, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """The flat outputs of one forward pass in float32."""
        root = live_root(self.before, tensors, dtype=torch.float32).eval()
        into: dict[str, dict[str, str]] = {}
        for site in self.layers:
            assert site.input is not None and site.output is not None
            into.setdefault(site.output.graph, {})[site.output.node] = site.input.node
        zero: dict[str, set[str]] = {}
        for site in self.branches:
            assert site.output is not None
            zero.setdefault(site.output.graph, set()).add(branch_end(self.before, site).name)
        for path in {*into, *zero} - {""}:
            module = root.get_submodule(path)
            module.register_forward_hook(_hook(into.get(path, {}), zero.get(path, set())), with_kwargs=True)
        with torch.no_grad():
            found = _Walk(root, into.get("", {}), zero.get("", set())).run(*inputs)
        return tuple(found) if isinstance(found, tuple | list) else (found,)


def _hook(into: dict[str, str], zero: set[str]) -> Any:
    """The layer runs once more, value by value, with what is bypassed replaced; that is its result."""

    def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        assert isinstance(module, fx.GraphModule)
        names = [str(n.target) for n in module.graph.nodes if n.op == "placeholder"]
        values = [*args, *(kwargs[n] for n in names[len(args) :])]
        return _Walk(module, into, zero).run(*values)

    return run


class _Walk(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, into: dict[str, str], zero: set[str]) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.into = into
        self.zero = zero
        self.kept: dict[str, Any] = {}
        """What goes into bypassed layers, as it was then: a layer may change values in place, also after its result has a name."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op == "output":
            return fx.node.map_arg(n.args[0], self._result)
        value = super().run_node(n)
        if n.name in self.into:
            value = self.kept[self.into[n.name]].clone()
        elif n.name in self.zero:
            value = torch.zeros_like(value)
        if n.name in self.into.values():
            self.kept[n.name] = value.clone()
        return value

    def _result(self, n: fx.Node) -> Any:
        return self.kept[self.into[n.name]] if n.name in self.into else self.env[n]


def bypass_claim(bypassed: Bypassed, after: Program, inputs: Sequence[int], outputs: Sequence[int], span: Span) -> Claim:
    """``removed = bypassed``: ``inputs`` and ``outputs`` are the places of the flat values that the program lost."""
    lost_in, lost_out = set(inputs), set(outputs)
    run = outputs_of(after)

    def expected(tensors: Tensors, flat: Sequence[Tensor]) -> Outputs:
        found = bypassed.run(tensors, flat)
        return [t for i, t in enumerate(found) if i not in lost_out and isinstance(t, Tensor) and t.is_floating_point()]

    def found(tensors: Tensors, flat: Sequence[Tensor]) -> Outputs:
        return run(tensors, [t for i, t in enumerate(flat) if i not in lost_in])

    return Claim("removed = bypassed", bypassed.before, expected, found, span=span)
