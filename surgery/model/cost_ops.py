"""Operations of one node of a flat graph, from the shapes that reach it at one length.

A multiply-add counts as two; which nodes count at all is said in :mod:`surgery.model.cost`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from surgery.model.anatomy import ops
from surgery.model.cut_sizes import SAME, NewSizes
from surgery.model.program import Program, ValueSpec


class Sizes:
    """Values of the size expressions of a graph for batch 1 and one length."""

    def __init__(self, program: Program, graph: fx.Graph, length: int, cut: NewSizes | None = None) -> None:
        self.cut = cut
        self.values: dict[Any, int] = {}
        self.sequence = False
        self._cache: dict[Any, int] = {}
        self.known: dict[str, int] = {}  # operations of modules by what decides them, see `_same_work`
        length += sum(int(getattr(module, "more_rows", 0)) for module in program.graph.children())  # virtual tokens
        traced: Mapping[str, tuple[str, int, int]] = program.signature.symbols
        for node in graph.find_nodes(op="placeholder"):
            spec = node.meta.get("spec")
            if not isinstance(spec, ValueSpec):
                continue
            for axis, size in enumerate(spec.shape):
                if isinstance(size, int) or not getattr(size, "is_Symbol", False) or size in self.values:
                    continue
                name = size.name  # printing takes long
                source = traced[name][0] if name in traced else node.name
                self.values[size] = self._value(axis, spec, source, traced.get(name), length)

    def _value(self, axis: int, spec: ValueSpec, source: str, traced: tuple[str, int, int] | None, length: int) -> int:
        if axis == 0:
            return 1
        if source.startswith("past_key_values"):
            return 0
        if spec.dtype.startswith(("int", "bool")):
            self.sequence = True
            return length
        if traced is None and len(spec.shape) == 3:
            self.sequence = True
            return length
        return traced[2] if traced is not None else length

    def of(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        known = self._cache.get(size)
        if known is None:
            known = self.values.get(size)
            known = self._cache[size] = max(0, int(size.subs(self.values) if known is None else known))
        return known

    def shape(self, node: Any) -> tuple[int, ...] | None:
        found = ops.shape_of(node) if isinstance(node, fx.Node) else None
        if found is None or self.cut is None:
            return None if found is None else tuple([self.of(s) for s in found])
        factors = self.cut.factors(node)
        return tuple([self.of(s) if f is SAME else self.of(s) * f.numerator // f.denominator for s, f in zip(found, factors, strict=True)])


# ---------------------------------------------------------------- operations of one node


COUNTED = frozenset(("linear", "addmm", "einsum", "scaled_dot_product_attention")) | ops.MATMUL | ops.CONV


def flops_of(node: fx.Node, sizes: Sizes) -> int:
    """Operations of one node for batch 1; 0 for what is not counted."""
    if node.op == "call_module":
        return _module_flops(node, sizes)
    if node.op != "call_function":
        return 0
    name = ops.name_of(node)
    if name not in COUNTED:
        return 0
    if name == "linear":
        return _product(sizes.shape(node.args[0]), sizes.shape(node.args[1]), transposed=True)
    if name == "addmm":
        return _product(sizes.shape(node.args[1]), sizes.shape(node.args[2]))
    if name == "baddbmm":
        return _product(sizes.shape(node.args[1]), sizes.shape(node.args[2]))
    if name == "einsum":
        return _einsum(node, sizes)
    if name in ops.MATMUL:
        return _product(sizes.shape(node.args[0]), sizes.shape(node.args[1]), grouped="grouped" in name)
    if name == "scaled_dot_product_attention":
        q, k, v = (sizes.shape(a) for a in node.args[:3])
        if q is None or k is None or v is None:
            return 0
        return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    return _convolution(node, name, sizes)


def _product(x: tuple[int, ...] | None, weight: tuple[int, ...] | None, *, transposed: bool = False, grouped: bool = False) -> int:
    """``x`` (..., inner) times ``weight`` (..., inner, outer), or (outer, inner) when ``transposed``; batches broadcast.

    A grouped product takes each row of ``x`` (rows, inner) through one of the matrices of ``weight`` (groups, inner, outer).
    """
    if not x or not weight:
        return 0
    if len(weight) == 1:
        return 2 * math.prod(x)
    outer = weight[-2] if transposed else weight[-1]
    inner = weight[-1] if transposed else weight[-2]
    if x[-1] == 0 or inner == 0:
        return 0
    if grouped or len(weight) == 2:
        return 2 * (math.prod(x) // x[-1]) * inner * outer
    rows = x[-2] if len(x) > 1 else 1
    return 2 * math.prod(_broadcast(x[:-2], weight[:-2])) * rows * inner * outer


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    size = max(len(a), len(b))
    left, right = (1,) * (size - len(a)) + a, (1,) * (size - len(b)) + b
    return tuple(y if x == 1 else x for x, y in zip(left, right, strict=True))


def _einsum(node: fx.Node, sizes: Sizes) -> int:
    """All letters of a product of two operands."""
    equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
    if not isinstance(operands, (list, tuple)) or len(operands) != 2 or "." in equation:
        return 0
    letters: dict[str, int] = {}
    for term, operand in zip(equation.split("->")[0].split(","), operands, strict=True):
        letters |= dict(zip(term, sizes.shape(operand) or (), strict=False))
    return 2 * math.prod(letters.values())


def _convolution(node: fx.Node, name: str, sizes: Sizes) -> int:
    x, weight, out = sizes.shape(node.args[0]), sizes.shape(node.args[1]), sizes.shape(node)
    if x is None or weight is None or out is None:
        return 0
    transposed = "transpose" in name or (name == "convolution" and bool(node.args[6]))
    rank = len(weight) - 2
    batch = x[0] if len(x) == rank + 2 else 1
    places = math.prod(x[-rank:] if transposed else out[-rank:])
    return 2 * batch * places * math.prod(weight)


class _Counter(TorchDispatchMode):
    """Adds up torch's own counts of operations. (``FlopCounterMode`` does as well, but imports torch's compiler, which takes a plan a second.)"""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:
                split = func.decompose(*args, **kwargs)
            if split is not NotImplemented:
                return split
        if func is torch.ops.aten.addmm.default:  # its form for shapes imports the compiler, too
            out = args[1].new_empty(args[1].shape[0], args[2].shape[1])
        else:
            out = func(*args, **kwargs)
        self.total += int(count(*args, **kwargs, out_val=out)) if count is not None else 0
        return out


def _module_flops(node: fx.Node, sizes: Sizes) -> int:
    """Operations of a module without a flat form, counted while it runs on meta tensors; by its matrices if it cannot."""
    module = node.meta.get("module")
    if module is None:
        return 0

    def stand_in(value: fx.Node) -> Any:
        spec = value.meta.get("spec")
        if not isinstance(spec, ValueSpec) or spec.kind != "tensor":
            return sizes.of(spec.shape[0]) if isinstance(spec, ValueSpec) and spec.shape else None
        own = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
        dtype = getattr(torch, spec.dtype)
        return torch.empty(
            [sizes.of(s) for s in spec.shape], dtype=own if own is not None and dtype.is_floating_point else dtype, device="meta"
        )

    args, kwargs = fx.node.map_arg(node.args, stand_in), fx.node.map_arg(node.kwargs, stand_in)
    key = _same_work(module, args, kwargs)
    if key in sizes.known:
        return sizes.known[key]
    training = module.training
    counter = _Counter()
    try:
        with torch.no_grad(), counter:
            module.eval()(*args, **kwargs)
        sizes.known[key] = counter.total
        return counter.total
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        first = next((sizes.shape(a) for a in node.all_input_nodes if sizes.shape(a)), None)
        tokens = math.prod(first[:-1]) if first else 0
        return 2 * tokens * sum(p.numel() for p in module.parameters() if p.ndim == 2)
    finally:
        module.train(training)


def _same_work(module: Any, args: Any, kwargs: Any) -> str:
    """What decides how much a module computes: its class, its configuration and the sizes that reach it."""
    config = module.module_config() if hasattr(module, "module_config") else id(module)
    shapes = fx.node.map_aggregate((args, kwargs), lambda v: tuple(v.shape) if isinstance(v, torch.Tensor) else v)
    return f"{type(module).__qualname__} {config} {shapes}"


def weight_of(node: fx.Node) -> str:
    """Name of the parameter that a product or convolution multiplies with."""
    name = ops.name_of(node)
    if node.op != "call_function":
        return ""
    candidates = {"linear": (1,), "addmm": (2, 1), "baddbmm": (2, 1)}.get(name, (1, 0))
    for at in candidates:
        value = node.args[at] if len(node.args) > at else None
        if isinstance(value, (list, tuple)):
            value = next((v for v in value if isinstance(v, fx.Node) and v.op == "get_attr"), None)
        while isinstance(value, fx.Node) and value.op != "get_attr":
            inputs = ops.tensors(value)
            value = inputs[0] if len(inputs) == 1 and (ops.name_of(value) in ops.SHAPE or ops.name_of(value) in ops.PARTS) else None
        if isinstance(value, fx.Node):
            return str(value.target)
    return ""
