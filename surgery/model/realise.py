"""Expressions to tensors: one output at a time, reading only the bytes that are needed.

All work is on the CPU. Results do not depend on the number of threads: products and methods' own functions run on one
thread, everything else is elementwise.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from surgery.core.diagnostics import fail
from surgery.model.flows import Parts, has_parts, parts_of
from surgery.model.pieces import arguments, takes_pieces
from surgery.model.room import copied, room, widened
from surgery.model.stored import MANY, initial_value, read, read_part, take, torch_dtype
from surgery.model.threads import one_thread
from surgery.model.weights import (
    Add,
    Apply,
    Cast,
    Concat,
    Expr,
    Held,
    Init,
    Load,
    Masked,
    MatMul,
    Reshape,
    Scale,
    Select,
    Stack,
    Update,
    Weights,
    nodes,
)

Resolver = Callable[[str], Callable[..., Any]]
"""Finds a method's function by its name ``verb/name:function``. It is called with the argument tensors and the params as keywords."""


def held(tensor: torch.Tensor) -> Held:
    """An expression for a tensor in memory. The tensor is copied, so later changes of the module do not reach it."""
    copy = tensor.detach().to("cpu").clone().contiguous()
    digest = hashlib.sha256(f"{copy.dtype}{tuple(copy.shape)}".encode())
    if copy.numel():
        digest.update(memoryview(copy.reshape(-1).view(torch.uint8).numpy()))
    return Held(tuple(copy.shape), str(copy.dtype).removeprefix("torch."), digest.hexdigest(), copy)


def no_functions(name: str) -> Callable[..., Any]:
    raise fail(
        "S0728",
        f"there is no function {name!r} to compute a weight with",
        exit_code=2,
        help="install the version of surgery that made this program",
    )


def realise(expr: Expr, memo: MutableMapping[str, Any] | None = None, *, functions: Resolver = no_functions) -> torch.Tensor:
    """The value of one expression, a fresh contiguous CPU tensor of its shape and dtype.

    ``memo`` (by ``Expr.identity``) is used and filled with results of functions, so that calls with one memo share them.
    Raises S0721 when a file cannot be read any more, S0728 for an unknown function or one that gives another shape.
    """
    return Realiser({"": expr}, functions, memo=memo)[""]


class Realiser(Mapping[str, torch.Tensor]):
    """Computes the weights of a program one by one; iterate in order for the smallest memory.

    Results of functions and products that several outputs need are kept until their last use, up to ``max_bytes`` (then the least
    recently used goes first and is computed again, to the same bits, when needed). Several threads may ask for weights at once.
    """

    def __init__(
        self,
        weights: Mapping[str, Expr],
        functions: Resolver = no_functions,
        max_bytes: int = 2 << 30,
        *,
        memo: MutableMapping[str, Any] | None = None,
    ) -> None:
        self.weights = weights
        self.functions = functions
        self.max_bytes = max_bytes
        self._memo = memo
        self._cache: OrderedDict[str, tuple[torch.Tensor, ...]] = OrderedDict()
        self._cached_bytes = 0
        self._uses: dict[str, int] = {}
        self._lock = threading.RLock()
        self._depth = 0
        for expr in weights.values():
            count = 0
            for node in nodes(expr):
                count += 1
                if isinstance(node, Apply | MatMul):
                    slot = _slot(node)
                    self._uses[slot] = self._uses.get(slot, 0) + 1
            self._depth = max(self._depth, count)

    def __len__(self) -> int:
        return len(self.weights)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __getitem__(self, name: str) -> torch.Tensor:
        expr = self.weights[name]
        with _deep(min(4 * self._depth, 200_000) + 2000), torch.no_grad():
            value = self._value(expr)
        assert tuple(value.shape) == expr.shape and value.dtype == torch_dtype(expr.dtype), (
            name,
            expr.shape,
            tuple(value.shape),
            value.dtype,
        )
        if isinstance(expr, Held) or not value.is_contiguous() or value.untyped_storage().nbytes() != value.numel() * value.element_size():
            value = copied(value)
        elif isinstance(expr, Apply | MatMul) and self._is_shared(value, expr):
            value = value.clone()  # what a caller may change must not be what is kept here
        return value

    def parts(self, name: str, files: ExitStack) -> Parts | None:
        """One weight in parts, for one thread that takes them without gradients; None where it has to be computed whole. ``files`` holds what is opened."""
        expr = self.weights[name]
        if not isinstance(expr, Apply) or expr.output is not None or self._memo is not None:
            return None
        function, slot = self.functions(expr.function), _slot(expr)
        if not has_parts(function) or self._uses.get(slot, 1) > 1 or slot in self._cache:
            return None
        with _deep(min(4 * self._depth, 200_000) + 2000), torch.no_grad():
            args = arguments(expr.args, self._value, files) if takes_pieces(function) else [self._value(arg) for arg in expr.args]
        return parts_of(function, args, dict(expr.params))

    def _is_shared(self, value: torch.Tensor, expr: Expr) -> bool:
        """Whether the memory of a result is also that of a kept result or of a tensor that the expression holds."""
        if self._memo is not None:
            return True
        place = value.untyped_storage().data_ptr()
        with self._lock:
            kept = [t for results in self._cache.values() for t in results] + [n.tensor for n in nodes(expr) if isinstance(n, Held)]
        return any(t.untyped_storage().data_ptr() == place for t in kept)

    # ------------------------------------------------------------ evaluation

    def _value(self, expr: Expr) -> torch.Tensor:
        match expr:
            case Load():
                return read(expr)
            case Held():
                tensor: torch.Tensor = expr.tensor
                return tensor
            case Init():
                return initial_value(expr)
            case Select(source=Load() as source):
                return read_part(source, expr.axis, expr.ranges)
            case Select():
                return self._select(expr)
            case Concat() | Stack():
                return self._assemble(expr)
            case Reshape():
                value = self._value(expr.source)
                return (value.permute(expr.permute) if expr.permute else value).reshape(expr.shape)
            case Cast():
                return widened(self._value(expr.source), torch_dtype(expr.dtype))
            case Scale():
                value = _wide(self._value(expr.source))
                fresh = _is_fresh(expr.source) or value.dtype != torch_dtype(expr.source.dtype)
                if fresh and value.is_floating_point():
                    return _rounded(value.mul_(expr.factor), expr)
                plain = value.dtype in (torch.float32, torch.float64)
                return _rounded(torch.mul(value, expr.factor, out=room(value.shape, value.dtype)) if plain else value * expr.factor, expr)
            case Add():
                return self._sum(expr)
            case MatMul() | Apply():
                return self._shared(expr)
            case Update():
                return self._update(expr)
            case Masked():
                value = self._value(expr.source)
                value = value if _is_fresh(expr.source) else copied(value)
                return value.masked_fill_(self._value(expr.keep).logical_not(), 0)
        raise TypeError(f"no rule for {type(expr).__name__}")

    def _select(self, expr: Select) -> torch.Tensor:
        """Selections of several axes on top of each other are one copy where that is of few pieces."""
        chain, pieces = {expr.axis: expr.ranges}, len(expr.ranges)
        source = expr.source
        while isinstance(source, Select) and not isinstance(source.source, Load) and source.axis not in chain:
            pieces *= len(source.ranges)
            if pieces > MANY:
                break
            chain[source.axis] = source.ranges
            source = source.source
        value = self._value(source)
        if len(expr.ranges) > MANY:
            return take(value, expr.axis, expr.ranges)
        out = room(expr.shape, value.dtype)
        _copy_pieces(value, out, list(chain.items()))
        return out

    def _assemble(self, expr: Concat | Stack) -> torch.Tensor:
        """Parts go straight into their place, so that never all of them are in memory beside the result."""
        out = room(expr.shape, torch_dtype(expr.dtype))
        at = 0
        for part in expr.parts:
            if isinstance(expr, Stack):
                out.select(expr.axis, at).copy_(self._value(part))
                at += 1
            else:
                size = part.shape[expr.axis]
                out.narrow(expr.axis, at, size).copy_(self._value(part))
                at += size
        return out

    def _sum(self, expr: Add) -> torch.Tensor:
        """Left to right; half-precision sums are added in float32 and rounded once."""
        dtype = torch_dtype(expr.dtype)
        wide = torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype
        first = expr.parts[0]
        total = widened(self._value(first), wide)
        if not (_is_fresh(first) or total.dtype != torch_dtype(first.dtype)) or tuple(total.shape) != expr.shape:
            total = copied(total.broadcast_to(expr.shape))
        for part in expr.parts[1:]:
            value = self._value(part)
            # A narrower float is widened as it is added, without a copy of it.
            total += value if value.is_floating_point() and value.element_size() <= total.element_size() else value.to(wide)
        return widened(total, dtype)

    def _update(self, expr: Update) -> torch.Tensor:
        out = copied(self._value(expr.source))
        part = self._value(expr.part)
        at = 0
        for start, stop in expr.ranges:
            out.narrow(expr.axis, start, stop - start).copy_(part.narrow(expr.axis, at, stop - start))
            at += stop - start
        return out

    # ------------------------------------------------------------ shared results

    def _shared(self, expr: MatMul | Apply) -> torch.Tensor:
        slot = _slot(expr)
        if self._memo is None and self._uses.get(slot, 1) <= 1 and slot not in self._cache:
            return _pick(expr, self._compute(expr))  # nobody else asks for it: other threads need not wait
        with self._lock:
            return self._kept(expr, slot)

    def _kept(self, expr: MatMul | Apply, slot: str) -> torch.Tensor:
        results = self._memo.get(slot) if self._memo is not None else self._cache.get(slot)
        if results is None:
            results = self._compute(expr)
            if self._memo is not None:
                self._memo[slot] = results
            elif self._uses.get(slot, 1) > 1:
                self._keep(slot, results)
        elif self._memo is None:
            self._cache.move_to_end(slot)
        if self._memo is None:
            self._release(slot)
        return _pick(expr, results)

    def _compute(self, expr: MatMul | Apply) -> tuple[torch.Tensor, ...]:
        if isinstance(expr, MatMul):
            left, right = self._value(expr.left), self._value(expr.right)
            left, right = _wide(left), _wide(right)
            with one_thread():
                plain = left.ndim == right.ndim == 2 and left.dtype == right.dtype in (torch.float32, torch.float64)
                made = torch.mm(left, right, out=room(expr.shape, left.dtype)) if plain else left @ right
                return (_rounded(made, expr),)
        function = self.functions(expr.function)
        with ExitStack() as files:
            args = arguments(expr.args, self._value, files) if takes_pieces(function) else [self._value(arg) for arg in expr.args]
            with one_thread():
                result = function(*args, **dict(expr.params))
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    def _keep(self, slot: str, results: tuple[torch.Tensor, ...]) -> None:
        size = sum(t.numel() * t.element_size() for t in results)
        if size > self.max_bytes:
            return
        self._cache[slot] = results
        self._cached_bytes += size
        while self._cached_bytes > self.max_bytes:
            oldest = next(iter(self._cache))
            self._drop(oldest)

    def _release(self, slot: str) -> None:
        self._uses[slot] = self._uses.get(slot, 1) - 1
        if self._uses[slot] <= 0:
            self._drop(slot)

    def _drop(self, slot: str) -> None:
        results = self._cache.pop(slot, None)
        if results is not None:
            self._cached_bytes -= sum(t.numel() * t.element_size() for t in results)


_deep_lock = threading.Lock()
_deep_users = [0, 0]
"""How many threads compute now, and the recursion limit before the first of them."""


@contextmanager
def _deep(limit: int) -> Iterator[None]:
    """Expressions may be deeper than Python's recursion limit, which all threads share: the last to leave puts it back."""
    with _deep_lock:
        if _deep_users[0] == 0:
            _deep_users[1] = sys.getrecursionlimit()
        _deep_users[0] += 1
        sys.setrecursionlimit(max(sys.getrecursionlimit(), limit))
    try:
        yield
    finally:
        with _deep_lock:
            _deep_users[0] -= 1
            if _deep_users[0] == 0:
                sys.setrecursionlimit(_deep_users[1])


def _slot(expr: MatMul | Apply) -> str:
    """One slot for all outputs of a function call: its identity without the choice of output."""
    if isinstance(expr, MatMul):
        return expr.identity
    call = [expr.function, [a.identity for a in expr.args], expr.params]
    return hashlib.sha256(repr(call).encode()).hexdigest()


def _pick(expr: MatMul | Apply, results: tuple[torch.Tensor, ...]) -> torch.Tensor:
    index = expr.output if isinstance(expr, Apply) and expr.output is not None else 0
    value = results[index]
    if tuple(value.shape) != expr.shape:
        name = expr.function if isinstance(expr, Apply) else "matmul"
        raise fail(
            "S0728", f"{name} gave a tensor of {list(value.shape)} where {list(expr.shape)} was planned", exit_code=2,
            help="this is a fault of the method: its shapes and its function disagree",
        )  # fmt: skip
    return value.to(torch_dtype(expr.dtype))


def _is_fresh(expr: Expr) -> bool:
    """Whether the value of ``expr`` is memory of its own, that nothing else holds and that may be changed in place."""
    if isinstance(expr, Cast):
        return expr.dtype != expr.source.dtype or _is_fresh(expr.source)
    return isinstance(expr, Load | Init | Select | Concat | Stack | Scale | Add | Update | Masked)


def _wide(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.is_floating_point() and value.element_size() < 4 else value


def _rounded(value: torch.Tensor, expr: Expr) -> torch.Tensor:
    return value.to(torch_dtype(expr.dtype))


def _copy_pieces(value: torch.Tensor, out: torch.Tensor, ranges: list[tuple[int, tuple[tuple[int, int], ...]]]) -> None:
    """Copies the product of the ranges of several axes: (axis, ranges) each."""
    if not ranges:
        out.copy_(value)
        return
    (axis, first), *rest = ranges
    at = 0
    for start, stop in first:
        _copy_pieces(value.narrow(axis, start, stop - start), out.narrow(axis, at, stop - start), rest)
        at += stop - start


def check_twins(weights: Weights) -> None:
    """Names that one parameter stands for must hold the same values where a checkpoint stores both. S0726 otherwise."""
    for name, kept, other in weights.twins:
        if not torch.equal(realise(kept), realise(other)):
            raise fail(
                "S0726", f"`{name}` is tied to another tensor by the config, but the checkpoint stores different values for the two",
                help="set `tie_word_embeddings` to false in config.json if they are meant to differ",
            )  # fmt: skip
