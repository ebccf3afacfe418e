"""What a graph of an encoder and its decoder holds: the attentions of the decoder, their keys and values, and what depends on what.

Attention is one operation, or written out: a product with the keys, a softmax, and a product with the values. Between the two products stand pointwise operations
(scale, mask, cap), dropout and views.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from surgery.backends.onnx_cut import NotCut, boundary, inputs_of, is_size
from surgery.backends.onnx_rows import POINTWISE, base, edited, is_number, shape_of
from surgery.model.capture.leaves import Attention
from surgery.model.program import Program

IDS = "decoder_input_ids"

VIEWS = frozenset(
    {"transpose", "permute", "reshape", "view", "_unsafe_view", "expand", "unsqueeze", "contiguous", "clone", "to", "_to_copy", "alias"}
)
"""Operations that only lay out the values which they are given."""

_PRODUCTS = frozenset({"matmul", "bmm", "einsum"})
_SOFTMAX = frozenset({"softmax", "_softmax"})


@dataclass(frozen=True)
class Memory:
    """Keys and values of one attention, where they are first ``[batch, heads, steps, width]``."""

    key: fx.Node
    value: fx.Node


@dataclass(frozen=True)
class Parts:
    """All attentions of the decoder to itself and to the encoder in order, values that depend on the decoder's tokens (``stream``), and the
    nodes that are a whole attention."""

    ids: fx.Node
    states: fx.Node
    own: tuple[Memory, ...]
    between: tuple[Memory, ...]
    stream: frozenset[fx.Node]
    attentions: frozenset[fx.Node]

    @property
    def steps(self) -> Any:
        return shape_of(self.ids)[1]


def parts_of(program: Program) -> Parts:
    """Reads an inlined graph. Raises :class:`NotCut` where it does something along the target that a cache does not carry."""
    graph = program.graph.graph
    ids = next((n for n in inputs_of(program.graph) if str(n.target) == IDS), None)
    if ids is None or len(shape_of(ids)) != 2 or not getattr(shape_of(ids)[1], "is_Symbol", False):
        raise NotCut(f"it has no open input `{IDS}`")
    states = graph.output_node().args[0][boundary(program)]  # type: ignore[index]
    token, source = _depend(program, {ids}), _depend(program, {states})
    if states in token:
        raise NotCut("its encoder reads what the decoder is given")
    own: list[Memory] = []
    between: list[Memory] = []
    attentions = set()
    for node in graph.nodes:
        if node not in token:
            continue
        found = _attention(program, node, token, token | source)
        if found is None:
            continue
        if found.whole:
            attentions.add(node)
        key, value = found.key, found.value
        if key in token and value in token:
            again = [_reads(end, held) for end, held in ((key, {m.key for m in own}), (value, {m.value for m in own}))]
            if again[0] != again[1]:
                raise NotCut(f"an attention reads the keys of an earlier one and values of its own ({node.name})")
            if not again[0]:
                own.append(_memory(program, (key, value), shape_of(ids)[1], token, node))
        elif key in source and value in source and key not in token and value not in token:
            between.append(_memory(program, (key, value), shape_of(states)[1], source, node))
        else:
            raise NotCut(f"an attention reads keys and values of two kinds ({node.name})")
    if not own:
        raise NotCut("no attention of the decoder to itself was found")
    return Parts(ids, states, tuple(own), tuple(between), frozenset(token), frozenset(attentions))


def _depend(program: Program, start: set[fx.Node]) -> set[fx.Node]:
    """The values that are computed from some, sizes apart; what stands beside a table is told of keys only to know their length."""
    found = set(start)
    for node in program.graph.graph.nodes:
        at = edited(program.graph, node)
        read = node.all_input_nodes if at is None else [node.args[at]]
        if node.op != "output" and not is_size(node) and any(a in found for a in read):
            found.add(node)
    return found - {n for n in found if is_number(n)}


# ------------------------------------------------------------------ attentions


@dataclass(frozen=True)
class _Read:
    """What one attention reads; ``whole`` where it is one node."""

    key: Any
    value: Any
    whole: bool


def _attention(program: Program, node: fx.Node, token: set[fx.Node], moving: set[fx.Node]) -> _Read | None:
    """The attention that a node is, or whose softmax it is; its keys are among ``moving``."""
    module = program.graph.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, Attention) or base(node) == "scaled_dot_product_attention":
        key, value = node.args[1:3]
        return _Read(key, value, True)
    if base(node) in _SOFTMAX or isinstance(module, nn.Softmax):
        return _written(program, node, token, moving)
    return None


def _written(program: Program, node: fx.Node, token: set[fx.Node], moving: set[fx.Node]) -> _Read | None:
    """The products around a softmax. None for one that weighs something else: experts, or tokens of the vocabulary."""
    keys = [pair[1] for pair in _behind(program, node, token) if pair[1] in moving]
    values = [pair[1] for pair in _ahead(program, node)]
    return _Read(keys[0], values[0], False) if keys and values else None


def _behind(program: Program, node: fx.Node, token: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operands of the products that scores are made of."""
    todo, seen = [node.args[0]], set()
    while todo:
        here = todo.pop(0)
        if not isinstance(here, fx.Node) or here in seen or here not in token:
            continue
        seen.add(here)
        pair = _product(here)
        if pair is not None:
            yield pair
        elif _passes(program, here):
            todo += here.all_input_nodes


def _ahead(program: Program, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """The operands of the products that read weights first."""
    todo, seen = list(node.users), {node}
    while todo:
        here = todo.pop(0)
        if here in seen:
            continue
        seen.add(here)
        pair = _product(here)
        if pair is not None:
            if pair[0] in seen:
                yield pair
        elif _passes(program, here):
            todo += list(here.users)


def _product(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Both operands of a product of two values."""
    name = base(node)
    if name not in _PRODUCTS:
        return None
    args = node.args[1] if name == "einsum" else node.args[:2]
    return tuple(args) if len(args) == 2 and all(isinstance(a, fx.Node) for a in args) else None  # type: ignore[arg-type, return-value]


def _passes(program: Program, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(program.graph.get_submodule(str(node.target)), nn.Dropout)
    return base(node) in POINTWISE or base(node) in VIEWS or base(node) in {"dropout", "nan_to_num"}


# ------------------------------------------------------------------ keys and values


def _reads(node: fx.Node, keys: set[fx.Node]) -> bool:
    """Whether keys, or values, are those of an earlier attention, which are in the cache, or are put together from them and some that are for
    the new tokens alone."""
    todo, seen = [node], set()
    while todo:
        here = todo.pop()
        if here in keys:
            return True
        if here in seen:
            continue
        seen.add(here)
        if base(here) in VIEWS or base(here) in ("cat", "stack"):
            todo += here.all_input_nodes
    return False


def _memory(program: Program, ends: tuple[Any, Any], steps: Any, within: set[fx.Node], node: fx.Node) -> Memory:
    found = [_walk(program, end, steps, within) for end in ends]
    if any(e is None for e in found):
        raise NotCut(f"keys and values of {node.name} were not found as [batch, heads, steps, width]")
    return Memory(found[0], found[1])  # type: ignore[arg-type]


def _walk(program: Program, node: fx.Node, steps: Any, within: set[fx.Node]) -> fx.Node | None:
    """The first ``[batch, heads, steps, width]`` on the way back from an attention."""
    found: fx.Node | None = None
    here: fx.Node | None = node
    while here is not None:
        shape = shape_of(here)
        if len(shape) == 4 and shape[2] == steps:
            found = here
        here = _before(program, here, within)
    return found


def _before(program: Program, node: fx.Node, within: set[fx.Node]) -> fx.Node | None:
    """What keys or values were before a view, or before something was put in front of them."""
    name = base(node)
    if name == "cat":
        moving = [a for a in node.args[0] if a in within]  # type: ignore[union-attr]
        return moving[0] if len(moving) == 1 else None  # type: ignore[return-value]
    at = 0 if name in VIEWS else edited(program.graph, node)
    source = None if at is None else node.args[at]
    return source if isinstance(source, fx.Node) and source in within else None
