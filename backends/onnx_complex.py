"""Complex numbers in graphs, which ONNX does not have: each is its real and imaginary part on one more axis at the end.

Models turn queries and keys as complex numbers (DeepSeek V2, Llama 4): ``view_as_complex(x) * polar(1, angle)``. In the form that ``view_as_real`` gives, a complex value goes from graph to
graph as any other tensor does, and views of it are views of this form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from surgery.backends.onnx_rows import shape_of
from surgery.model.lazygraph import compile_tree

aten = torch.ops.aten

_LATER = {
    aten.unsqueeze.default: (1,), aten.slice.Tensor: (1,), aten.select.int: (1,), aten.squeeze.dim: (1,), aten.transpose.int: (1, 2),
    aten.index_select.default: (1,),
}  # fmt: skip
"""Operations that read axes by number, and where the numbers stand: counted from the end they are one further."""

_SAME = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default,
})  # fmt: skip
"""Operations that do to both parts what they do to a number, where all of their operands are complex."""


def real_numbers(root: fx.GraphModule) -> int:
    """Rewrites a root and the graphs below it; returns how many nodes were complex.

    Values that go in and out of the root stay as they are: a root with complex inputs or outputs is left alone, and so is one with an
    operation on complex numbers that is not known here.
    """
    graphs = [m for m in root.modules() if isinstance(m, fx.GraphModule)]
    complex_ = {n for gm in graphs for n in gm.graph.nodes if _is_complex(n)}
    if not complex_ or any(n.op in ("placeholder", "get_attr") for n in complex_ & set(root.graph.nodes)):
        return 0
    if any(a in complex_ for a in root.graph.output_node().all_input_nodes):
        return 0
    made = {
        n: _form(n, complex_) for gm in graphs for n in gm.graph.nodes if n.op == "call_function" and (n in complex_ or _reads(n, complex_))
    }
    if any(form is None for form in made.values()) or any(n.op == "get_attr" for n in complex_):
        return 0
    for node, form in made.items():
        assert form is not None
        with node.graph.inserting_before(node):
            node.replace_all_uses_with(form(node.graph), propagate_meta=False)
        node.graph.erase_node(node)
    for gm in graphs:
        gm.recompile()
    compile_tree(root)
    return len(complex_)


def _is_complex(node: fx.Node) -> bool:
    return str(getattr(node.meta.get("spec"), "dtype", "")).startswith("complex")


def _reads(node: fx.Node, complex_: set[fx.Node]) -> bool:
    return any(a in complex_ for a in node.all_input_nodes)


def _form(node: fx.Node, complex_: set[fx.Node]) -> Callable[[fx.Graph], fx.Node] | None:
    """What builds the real form of a node, in front of it. None for an operation that is not known."""
    call, args = node.target, node.args
    if call in (aten.view_as_complex.default, aten.view_as_real.default):
        return lambda graph: node.args[0]  # type: ignore[return-value]
    if call is aten.polar.default:
        return lambda graph: _pair(graph, *(_of(graph, "mul", node.args[0], _of(graph, f, node.args[1])) for f in ("cos", "sin")))
    if call is aten.complex.default:
        return lambda graph: _pair(graph, *node.args)
    if call in (aten.real.default, aten.imag.default):
        return lambda graph: _part(graph, node.args[0], int(call is aten.imag.default))
    if call in (aten.conj.default, aten.conj_physical.default, aten._conj.default):
        return lambda graph: _pair(graph, _part(graph, node.args[0], 0), _of(graph, "neg", _part(graph, node.args[0], 1)))
    if call is aten.mul.Tensor and not node.kwargs:
        known = [a in complex_ for a in args]  # now: what is read then is in the other form already
        return lambda graph: _product(graph, list(zip(node.args, known, strict=True)))
    if call in _SAME and not node.kwargs and all(not isinstance(a, (int, float, complex)) and a in complex_ for a in args):
        return lambda graph: graph.call_function(call, node.args)  # type: ignore[arg-type]
    if call in _LATER and not node.kwargs:
        given = list(args)
        for at in _LATER[call]:  # type: ignore[index]
            if not isinstance(given[at], int):
                return None
        later = {at: given[at] - 1 for at in _LATER[call] if given[at] < 0}  # type: ignore[index, operator]
        return lambda graph: graph.call_function(call, tuple(later.get(i, a) for i, a in enumerate(node.args)))  # type: ignore[arg-type]
    return None


def _product(graph: fx.Graph, operands: list[tuple[Any, bool]]) -> fx.Node:
    """A product of which a factor is complex: (a + ib)(c + id) = (ac - bd) + i(ad + bc)."""
    (x, first), (y, second) = operands
    if not (first and second):
        number, factor = (x, y) if first else (y, x)
        if isinstance(factor, fx.Node) and shape_of(factor):
            factor = graph.call_function(aten.unsqueeze.default, (factor, -1))
        return _of(graph, "mul", number, factor)
    a, b, c, d = (_part(graph, z, i) for z in (x, y) for i in (0, 1))
    real = _of(graph, "sub", _of(graph, "mul", a, c), _of(graph, "mul", b, d))
    return _pair(graph, real, _of(graph, "add", _of(graph, "mul", a, d), _of(graph, "mul", b, c)))


_CALLS: dict[str, Any] = {
    "mul": aten.mul.Tensor, "add": aten.add.Tensor, "sub": aten.sub.Tensor, "neg": aten.neg.default, "cos": aten.cos.default, "sin": aten.sin.default,
}  # fmt: skip


def _of(graph: fx.Graph, name: str, *args: Any) -> fx.Node:
    return graph.call_function(_CALLS[name], args)


def _part(graph: fx.Graph, number: Any, index: int) -> fx.Node:
    return graph.call_function(aten.select.int, (number, -1, index))


def _pair(graph: fx.Graph, real: Any, imaginary: Any) -> fx.Node:
    return graph.call_function(aten.stack.default, ([real, imaginary], -1))
