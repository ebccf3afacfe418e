"""What a program costs: parameters, bytes, floating-point operations. Everything from shapes; no weight is read.

A multiply-add counts as two operations. Counted are products (linear layers, matrix products, expert products by the tokens
that are routed), convolutions and attention (scores and values, without regard to masks); elementwise work, norms, softmax and
look-ups are not, as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from surgery.core.site import NodeRef, Site
from surgery.model.anatomy import ops
from surgery.model.cut_sizes import NewSizes
from surgery.model.flat import flatten
from surgery.model.program import Program, ValueSpec

# ---------------------------------------------------------------- parameters and bytes


def parameter_names(program: Program) -> tuple[str, ...]:
    """Every parameter by its first name, tied ones once, in model order."""
    found = (program.aliases.get(n, n) for n, _ in program.graph.named_parameters(remove_duplicate=False))
    return tuple(n for n in dict.fromkeys(found) if n in program.weights)


def parameters(program: Program) -> int:
    """Number of parameters, tied ones once."""
    return sum(math.prod(program.weights[n].shape) for n in parameter_names(program))


def bytes_of(program: Program) -> int:
    """Bytes of all parameters in their own dtypes, tied ones once."""
    return sum(math.prod(e.shape) * getattr(torch, e.dtype).itemsize for e in (program.weights[n] for n in parameter_names(program)))


def idle_shares(program: Program) -> dict[str, float]:
    """For each parameter of routed experts the share that one token does not use: ``1 - top_k / experts``."""
    idle: dict[str, float] = {}
    for site in program.anatomy.sites:
        experts, top_k = site.facts.get("experts"), site.facts.get("top_k")
        if site.is_region and site.role.endswith(".experts") and isinstance(experts, int) and isinstance(top_k, int):
            idle |= dict.fromkeys(site.parameters, 1 - top_k / experts)
    return idle


def active_parameters(program: Program) -> int:
    """Parameters that one token uses: of routed experts only ``top_k`` of each block's count."""
    idle = idle_shares(program)
    return sum(round(math.prod(program.weights[n].shape) * (1 - idle.get(n, 0.0))) for n in parameter_names(program))


# ---------------------------------------------------------------- operations


@dataclass(frozen=True)
class NodeCost:
    """Operations of one node of the flat graph for one forward pass of batch 1: ``weight`` the parameter of the product, if any."""

    origin: NodeRef
    kind: str
    flops: int
    weight: str = ""


@dataclass
class Cost:
    """The operations of one forward pass of batch 1 at ``length``; per token is their sum divided by ``tokens``.

    ``tokens`` is ``length`` where some integer input has an open length (of several such inputs each has this length), else 1:
    vision and speech models are counted per sample.
    """

    length: int
    tokens: int
    nodes: list[NodeCost] = field(default_factory=list)
    sample: str = "sample"

    @property
    def total(self) -> int:
        return sum(n.flops for n in self.nodes)

    @property
    def unit(self) -> str:
        """What the operations are divided by, in words: ``token``, or ``sample`` (``image`` where the inputs are pixels)."""
        return "token" if self.tokens > 1 else self.sample

    @property
    def at(self) -> str:
        """``" at length 128"`` where the length matters, else nothing."""
        return f" at length {self.length}" if self.tokens > 1 else ""

    @property
    def per_token(self) -> int:
        return round(self.total / self.tokens)


def count(program: Program, length: int = 128, cut: NewSizes | None = None) -> Cost:
    """Operations of every node for one forward pass of batch 1, sequences of ``length``, an empty cache; with ``cut`` those of the
    program as a cut of its dimension classes would leave it (of a program with nothing attached).

    Open axes of floating inputs other than the batch (audio) keep the size of the trace. Modules without a
    flat form (what a method attached) are counted on meta tensors of the sizes that reach them.
    """
    # while nothing stands on top of the model the analysis of classes has the same flat graph already
    bare = not any(hasattr(module, "edits") for module in program.graph.modules())
    graph = program.dims.graph if bare else flatten(program.graph, program.aliases)
    sizes = Sizes(program, graph, length, cut)
    pixels = any("pixel" in str(n.target) for n in program.graph.graph.find_nodes(op="placeholder"))
    cost = Cost(length, length if sizes.sequence else 1, sample="image" if pixels else "sample")
    for node in graph.nodes:
        found = _flops(node, sizes)
        if found:
            weight = _weight(node)
            cost.nodes.append(NodeCost(node.meta["origin"], ops.name_of(node), found, weight))
    return cost


def flops_per_token(program: Program, length: int = 128) -> int:
    """Operations of one forward pass of batch 1 divided by its tokens (see :class:`Cost`), rounded to an integer."""
    return count(program, length).per_token


def flops_by_site(program: Program, length: int = 128) -> dict[str, int]:
    """Operations per token of every site by role: a slice has its share of the product, a region all that is inside it."""
    cost = count(program, length)
    every = program.anatomy.sites
    table = _Attribution(program, cost)
    return {s.role: round(table.of([s]) / cost.tokens) for s in every}


def flops_of_sites(program: Program, sites: Iterable[Site], length: int = 128) -> int:
    """Operations per token of some sites together, each product once, with what is attached to them."""
    cost = count(program, length)
    return round(_Attribution(program, cost).of(list(sites)) / cost.tokens)


class _Attribution:
    """Which products belong to which site."""

    def __init__(self, program: Program, cost: Cost) -> None:
        self.program = program
        self.by_weight: dict[str, int] = {}
        self.by_origin: dict[NodeRef, int] = {}
        for node in cost.nodes:
            if node.weight:
                self.by_weight[node.weight] = self.by_weight.get(node.weight, 0) + node.flops
            else:
                self.by_origin[node.origin] = self.by_origin.get(node.origin, 0) + node.flops

    def of(self, sites: Sequence[Site]) -> float:
        shares: dict[str, dict[tuple[int, int], float]] = {}
        origins: dict[NodeRef, None] = {}
        for site in sites:
            inside = [s for s in self.program.anatomy.sites if s.role.startswith(f"{site.role}.")] if site.is_region else []
            for part in (site, *inside):
                if part.is_region:
                    origins |= dict.fromkeys(part.calls)
                    shares.setdefault("", {})
                    for name in part.parameters:
                        shares.setdefault(name, {})[0, -1] = 1.0
                elif part.weight:
                    self._share(part, shares)
            attached = [a for a in self.program.attachments if any(a.site.role == p.role for p in (site, *inside))]
            attached += [a for a in self.program.attachments if site.op == "attachment" and a.module == site.path]
            origins |= dict.fromkeys(a.node for a in attached)
        total = sum(self.by_origin.get(o, 0) for o in origins)
        return total + sum(self.by_weight.get(w, 0) * min(1.0, sum(parts.values())) for w, parts in shares.items())

    def _share(self, part: Site, shares: dict[str, dict[tuple[int, int], float]]) -> None:
        stored = self.program.weights[part.weight].shape if part.weight in self.program.weights else ()
        rows = part.rows or ((0, -1),)
        # one expert of many does its share of the rows that are routed, as far as shapes can tell
        expert = part.facts.get("expert") if part.op == "expert" and stored else None
        share, offset = (1.0, 0) if not isinstance(expert, int) else (1 / stored[0], (expert + 1) << 32)
        for start, stop in rows:
            whole = stop < 0 or not stored
            own = 1.0 if whole else (stop - start) / stored[part.out_axis]
            shares.setdefault(part.weight, {})[start + offset, stop + offset] = share * own


# ---------------------------------------------------------------- sizes


class Sizes:
    """Values of the size expressions of a graph for batch 1 and one length."""

    def __init__(self, program: Program, graph: fx.Graph, length: int, cut: NewSizes | None = None) -> None:
        self.cut = cut
        self.values: dict[Any, int] = {}
        self.sequence = False
        self._cache: dict[Any, int] = {}
        self.known: dict[str, int] = {}  # operations of modules by what decides them, see `_same_work`
        traced: Mapping[str, tuple[str, int, int]] = program.signature.symbols
        for node in graph.nodes:
            spec = node.meta.get("spec")
            if node.op != "placeholder" or not isinstance(spec, ValueSpec):
                continue
            for axis, size in enumerate(spec.shape):
                if isinstance(size, int) or not getattr(size, "is_Symbol", False) or size in self.values:
                    continue
                name = str(size)
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
            known = self._cache[size] = max(0, int(size.subs(self.values)))
        return known

    def shape(self, node: Any) -> tuple[int, ...] | None:
        found = ops.shape_of(node) if isinstance(node, fx.Node) else None
        if found is None or self.cut is None:
            return None if found is None else tuple(self.of(s) for s in found)
        factors = self.cut.factors(node)
        return tuple(self.of(s) * f.numerator // f.denominator for s, f in zip(found, factors, strict=True))


# ---------------------------------------------------------------- operations of one node


def _flops(node: fx.Node, sizes: Sizes) -> int:
    if node.op == "call_module":
        return _module_flops(node, sizes)
    if node.op != "call_function":
        return 0
    name = ops.name_of(node)
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
    if name in ops.CONV:
        return _convolution(node, name, sizes)
    return 0


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


def _weight(node: fx.Node) -> str:
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
