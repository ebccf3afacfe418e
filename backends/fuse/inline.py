"""A live root as one flat graph without tracing it: its graphs are inlined, and every operation is asked once for each kind of arguments.

``torch.export`` would run each layer's operations through a tracer that proves every equality of sizes anew. Here inputs that share a size
share its symbol from the start, so there is nothing to prove, and layers that are alike cost a look-up.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.fx.node import map_aggregate
from torch.utils._sympy.functions import Max

from surgery.model.capture import leaves
from surgery.model.flat import Flattener
from surgery.model.program import Program
from surgery.model.sample import placeholders, sizes

aten = torch.ops.aten

NUMBERS = frozenset(getattr(operator, name) for name in operator.__all__) | {
    torch.sym_max,
    torch.sym_min,
    torch.sym_not,
    torch.sym_float,
    torch.sym_int,
}
"""Arithmetic of sizes."""


class NotInlined(Exception):
    """The root has something that only the tracer can take apart; the message says what."""


def inlined(program: Program, root: fx.GraphModule) -> fx.GraphModule:
    """The flat module of a root with real tensors, with the properties that :func:`~surgery.backends.fuse.flatten.flatten_live` promises.

    Modules that were attached are traced by themselves. Raises :class:`NotInlined` for one that cannot be, sizes that depend on values, and graphs that only
    run at some sizes.
    """
    made = _Inliner(program, root)
    chatter = logging.getLogger("torch._subclasses.fake_tensor")  # it prints what is raised, and what is raised is told in our words
    level = chatter.level
    chatter.setLevel(logging.CRITICAL)
    try:
        result = made.inline(root, "", None)
    except NotInlined:
        raise
    except Exception as exc:
        raise NotInlined(f"{made.path}: {type(exc).__name__}: {exc}") from exc
    finally:
        chatter.setLevel(level)
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    if not all(isinstance(o, fx.Node) for o in outputs):
        raise NotInlined("an output is no tensor")
    made.graph.output(tuple(outputs))
    if not general(made.env):
        raise NotInlined("it only runs at some sizes")
    flat = fx.GraphModule(root, made.graph)
    flat.eval()
    return flat


def dtype_of(root: nn.Module) -> torch.dtype:
    """The type that a live graph computes in: that of its first floating parameter."""
    return next((p.dtype for p in root.parameters() if p.is_floating_point()), torch.float32)


def general(env: ShapeEnv) -> bool:
    """Whether all that was learned of sizes is a least or a greatest one, as a table of positions has it, or how a value lies in memory."""
    return all(map(_limit, env.guards)) and not env.replacements and not env.deferred_runtime_asserts


def _limit(guard: Any) -> bool:
    expr = guard.expr
    if isinstance(expr, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return sum(map(_length, expr.args)) == 1 and sum(side.is_Integer for side in expr.args) == 1
    if isinstance(expr, sympy.Ne):  # part of a table is no block of memory; all of it would be, which nothing asks for
        return "check_contiguous" in str(guard.sloc) and any(side.is_Integer and side > 1 for side in expr.args)
    if isinstance(expr, sympy.Eq):  # the last n of N rows, counted from row max(0, N - n), are n where n is at most N
        least = [m for m in expr.atoms(Max) if len(m.args) == 2 and 0 in m.args]
        return len(least) == 1 and sympy.expand((expr.lhs - expr.rhs).xreplace({least[0]: sum(least[0].args)})) == 0
    return False


def _length(side: Any) -> bool:
    """Whether an expression is a size of the inputs, or a sum of them: what is new behind what is past."""
    return bool(side.is_Symbol or (side.is_Add and all(part.is_Symbol for part in side.args)))


class _Inliner(Flattener):
    """A flattener whose nodes carry ``meta["val"]`` instead of specs; tensors stand in front of all operations."""

    def __init__(self, program: Program, root: fx.GraphModule) -> None:
        super().__init__(root, program.aliases)
        self.env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self.env, static_shapes=False)
        self.inputs = _inputs(program, self.env, self.mode, dtype_of(root))
        self.known: dict[Any, Any] = {}
        self.of_size: dict[Any, fx.Node] = {}
        self.front: fx.Node | None = None

    # ---------------------------------------------------------------- nodes

    def _placeholder(self, node: fx.Node) -> fx.Node:
        made = self.graph.create_node("placeholder", str(node.target), name=node.name)
        made.meta.update(val=self.inputs[str(node.target)], refs=[])
        self.front = made
        return made

    def attribute(self, name: str, tensor: Any, *, absolute: bool = False) -> fx.Node:
        full = name if absolute or not self.path else f"{self.path}.{name}"
        full = self._first(full)
        node = self._attributes.get(full)
        if node is None:
            assert self.front is not None
            with self.graph.inserting_after(self.front):
                node = self.graph.create_node("get_attr", full)
            self.front = self._attributes[full] = node
            node.meta.update(val=self.mode.from_tensor(tensor, static_shapes=True), refs=[])
        return node

    def _first(self, name: str) -> str:
        """The first name of a tied tensor where this root has it; a part of a model (a decoder) may have a later one alone."""
        first = self.aliases.get(name, name)
        path, _, leaf = first.rpartition(".")
        try:
            owner = self.root.get_submodule(path)
        except AttributeError:
            return name
        return first if hasattr(owner, leaf) else name

    def call(self, target: Callable[..., Any], args: tuple[Any, ...], spec: Any, kwargs: Mapping[str, Any] | None = None) -> fx.Node:
        made: fx.Node = self._made(target, args, dict(kwargs or {}))
        return made

    def _copy(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        if node.op != "call_function" or not (isinstance(node.target, torch._ops.OpOverload) or node.target in NUMBERS):
            raise NotInlined(f"{self.path}: {node.op} of {node.target}")
        args = fx.node.map_arg(node.args, env.__getitem__)
        if node.target is operator.getitem and isinstance(args[0], (tuple, list)):
            return args[0][args[1]]
        return self._made(node.target, args, fx.node.map_arg(node.kwargs, env.__getitem__))

    def _made(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call and its value; of a size that is known the number, or the first node that gives it."""
        value = self._value(target, args, kwargs)
        if isinstance(value, (bool, int, float)):
            return value
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            known = self.of_size.get(value.node.expr)
            if known is not None:
                return known
        packet = getattr(target, "overloadpacket", None)
        wish = f"{packet.__name__}_{target._overloadname}" if packet is aten.sym_size else packet.__name__ if packet else target.__name__
        made = self.graph.create_node("call_function", target, args, kwargs, name=self.graph._target_to_str(wish))
        made.meta.update(val=value, refs=[], nn_module_stack={"": ("", ""), self.path: (self.path, "")})
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            self.of_size[value.node.expr] = made
        return made

    def _leaf(self, module: nn.Module, full: str, args: tuple[Any, ...], kwargs: dict[str, Any], spec: Any) -> Any:
        plain = type(module).__module__.startswith("torch.nn.modules.") or hasattr(type(module), "expand_flat")
        plain = plain or type(module) in (leaves.Attention, leaves.DropPath, leaves.Jitter)
        if not plain:
            return self._taken_apart(module, full, args, kwargs)
        if kwargs.keys() - {"mask"} or getattr(module, "max_norm", None) is not None:
            raise NotInlined(f"{full} is a {type(module).__name__}")
        value = super()._leaf(module, full, args, kwargs, spec)
        if isinstance(value, fx.Node) and value.op == "call_module":
            raise NotInlined(f"{full} is a {type(module).__name__}")
        return value

    def _taken_apart(self, module: nn.Module, full: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a module that was attached computes, traced by itself on values of these sizes."""
        own = {n: self.attribute(n, t) for n, t in (*module.named_parameters(), *module.named_buffers())}
        given: list[Any] = [*own.values(), *(a for a in (*args, *kwargs.values()) if isinstance(a, fx.Node))]

        def run(*values: Any) -> Any:
            left = iter(values[len(own) :])
            at, by = map_aggregate((args, kwargs), lambda a: next(left) if isinstance(a, fx.Node) else a)  # type: ignore[misc]
            return torch.func.functional_call(module, dict(zip(own, values, strict=False)), at, by)

        if any(isinstance(a, (tuple, list, dict, slice)) for a in (*args, *kwargs.values())):
            raise NotInlined(f"{full} is a {type(module).__name__} of nested arguments")
        with self.mode, torch.no_grad():
            apart = [
                n.meta["val"].detach() if isinstance(n.meta["val"], Tensor) else n.meta["val"] for n in given
            ]  # equal ones are one object
            steps = make_fx(run, pre_dispatch=True, tracing_mode="real")(*apart).graph
        self._counted(full)
        values: dict[fx.Node, Any] = dict(zip(steps.find_nodes(op="placeholder"), given, strict=True))
        for node in steps.nodes:
            if node.op == "output":
                return fx.node.map_arg(node.args[0], values.__getitem__)
            if node.op != "placeholder":
                values[node] = self._copy(node, values)
        raise AssertionError("a graph has an output")

    # ---------------------------------------------------------------- values

    def _counted(self, where: str) -> None:
        """Sizes that depend on values have no symbol among those of the inputs."""
        if self.env.pending_fresh_unbacked_symbols or self.env.unbacked_symint_counter > 0:
            raise NotInlined(f"{where}: a size depends on values")

    def _value(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given, named = map_aggregate((args, kwargs), lambda n: n.meta["val"] if isinstance(n, fx.Node) else n)  # type: ignore[misc]
        key = (target, _kind(given), _kind(named))
        if key not in self.known:
            with self.mode, torch.no_grad():
                try:
                    self.known[key] = target(*given, **named)
                except RuntimeError:  # some operations know open sizes only in the form that the tracer would take
                    with enable_python_dispatcher():
                        self.known[key] = target(*given, **named)
            self._counted(self.path)
        return self.known[key]


def _kind(value: Any) -> Any:
    """What an operation sees of an argument before it looks at numbers: equal for arguments that give the same type of result."""
    if isinstance(value, Tensor):
        return ("tensor", value.dtype, value.device, _kind(tuple(value.shape)), _kind(value.stride()))
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return ("size", value.node.expr)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__.removeprefix("immutable_"), *map(_kind, value))
    if isinstance(value, dict):
        return tuple((k, _kind(v)) for k, v in value.items())
    if isinstance(value, slice):
        return ("slice", _kind(value.start), _kind(value.stop), _kind(value.step))
    return (type(value), value)


def _inputs(program: Program, env: ShapeEnv, mode: FakeTensorMode, dtype: torch.dtype) -> dict[str, FakeTensor]:
    """A value without numbers for every input; a size that several inputs have is one symbol."""
    at = sizes(program, 3, 13, 5)
    symbols: dict[str, Any] = {}
    for name in program.signature.symbols:
        symbols[name] = env.create_symbol(at[name], ConstantSource(f"__size_{name}"), DimDynamic.DYNAMIC, None)
    found = {}
    for name, spec in placeholders(program):
        shape = []
        for size in spec.shape:
            free = getattr(size, "free_symbols", None)
            if not free:
                shape.append(int(size))
                continue
            expr = sympy.sympify(size).subs({s: symbols[str(s)] for s in free})
            hint = int(sympy.sympify(size).subs({s: at[str(s)] for s in free}))
            shape.append(env.create_symintnode(expr, hint=hint))
        with mode:
            found[name] = torch.empty(shape, dtype=dtype if spec.dtype == "bfloat16" else getattr(torch, spec.dtype))
    return found  # type: ignore[return-value]
