"""An encoder and its decoder as two programs, the decoder with a cache.

The model was captured for whole targets. Here its graph is rewritten for the last tokens of a target: the keys and values of earlier
tokens come in and those of all tokens go out, and positions, masks and biases are those of the last rows. The keys and values of the
encoder's output do not change while a target grows, so the encoder's graph makes them, once for each source, and the decoder takes them.

* encoder: its own inputs to ``last_hidden_state`` and, for every layer of the decoder, ``present.LAYER.encoder.key`` and ``.value``
  ``[batch, heads, encoder steps, width]``.
* decoder: ``encoder_attention_mask``, ``decoder_input_ids [batch, new]``, ``decoder_attention_mask [batch, past + new]``, with
  ``past_key_values.LAYER.decoder.key`` and ``.value`` ``[batch, heads, past, width]`` (no steps at first) and what the encoder gave as
  ``past_key_values.LAYER.encoder.key`` and ``.value``, to the model's outputs for the new tokens and ``present.LAYER.decoder.key`` and
  ``.value``, which are the next step's past.

What stands between (prefixes in front of the keys, adapters, layers without one of the attentions) stays where it is.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from surgery.backends.onnx_counts import add_past, is_count
from surgery.backends.onnx_cut import (
    MASK,
    STATES,
    NotCut,
    Tree,
    boundary,
    copy_of,
    inputs_of,
    is_pair,
    is_size,
    settle,
    signature,
)
from surgery.backends.onnx_inline import inlined
from surgery.backends.onnx_rows import POINTWISE, Lengths, base, edited, holds, is_number, shape_of
from surgery.model.capture.leaves import Attention
from surgery.model.program import Program, ValueSpec

aten = torch.ops.aten

IDS = "decoder_input_ids"
PAST = 8
"""Steps of the past that the signature says it was traced with; differs from other sizes, so that none is taken for another."""

_VIEWS = frozenset(
    {"transpose", "permute", "reshape", "view", "_unsafe_view", "expand", "unsqueeze", "contiguous", "clone", "to", "_to_copy", "alias"}
)
"""Operations that only lay out the keys or values which they are given."""


@dataclass(frozen=True)
class Memory:
    """Keys and values of one attention: ``key`` and ``value`` stand where they are first ``[batch, heads, steps, width]``, ``path`` is what
    lies between them and the attention."""

    key: fx.Node
    value: fx.Node
    path: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class Parts:
    """What a graph holds: all attentions of the decoder to itself and to the encoder in order, values that depend on the decoder's tokens
    (``stream``), and values that depend on the encoder's output and on no token of the decoder (``cross``)."""

    ids: fx.Node
    states: fx.Node
    own: tuple[Memory, ...]
    between: tuple[Memory, ...]
    stream: frozenset[fx.Node]
    attentions: frozenset[fx.Node]

    @property
    def steps(self) -> Any:
        return shape_of(self.ids)[1]


def cached_pair(program: Program) -> tuple[Program, Program]:
    """The encoder and the decoder with its cache, see the module. Raises :class:`NotCut` where the graph does something along the target
    that a cache does not carry: attention that is written out, or that reads encoder and target at once."""
    if not is_pair(program):
        raise NotCut("it is not an encoder and a decoder")
    whole = inlined(program)
    return _encoder(whole), _decoder(whole)


# ------------------------------------------------------------------ what is there


def parts_of(program: Program) -> Parts:
    """Reads an inlined graph. Raises NotCut."""
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
        if not _attends(program, node) or node not in token:
            continue
        attentions.add(node)
        key, value = (a for a in node.args[1:3])
        if key in token and value in token:
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


def _attends(program: Program, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(program.graph.get_submodule(str(node.target)), Attention)
    return base(node) == "scaled_dot_product_attention"


def _memory(program: Program, ends: tuple[Any, Any], steps: Any, within: set[fx.Node], node: fx.Node) -> Memory:
    path: list[fx.Node] = []
    found = [_walk(program, end, steps, within, path) for end in ends]
    if any(e is None for e in found):
        raise NotCut(f"keys and values of {node.name} were not found as [batch, heads, steps, width]")
    return Memory(found[0], found[1], tuple(path))  # type: ignore[arg-type]


def _walk(program: Program, node: fx.Node, steps: Any, within: set[fx.Node], path: list[fx.Node]) -> fx.Node | None:
    """The first ``[batch, heads, steps, width]`` on the way back from an attention; the nodes behind it are put into ``path``."""
    passed: list[fx.Node] = []
    found: tuple[fx.Node, int] | None = None
    here: fx.Node | None = node
    while here is not None:
        shape = shape_of(here)
        if len(shape) == 4 and shape[2] == steps:
            found = here, len(passed)
        passed.append(here)
        here = _before(program, here, within)
    if found is None:
        return None
    path += [n for n in passed[: found[1]] if n not in path]
    return found[0]


def _before(program: Program, node: fx.Node, within: set[fx.Node]) -> fx.Node | None:
    """What keys or values were before a view, or before something was put in front of them."""
    name = base(node)
    if name == "cat":
        moving = [a for a in node.args[0] if a in within]  # type: ignore[union-attr]
        return moving[0] if len(moving) == 1 else None  # type: ignore[return-value]
    at = 0 if name in _VIEWS else edited(program.graph, node)
    source = None if at is None else node.args[at]
    return source if isinstance(source, fx.Node) and source in within else None


def _bury(graph: fx.Graph) -> None:
    """Takes out what nobody reads, attention as well, which torch keeps because it may draw random numbers."""
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


# ------------------------------------------------------------------ the encoder


def _encoder(whole: Program) -> Program:
    out = copy_of(whole)
    parts = parts_of(out)
    end = out.graph.graph.output_node()
    values = [parts.states, *(n for m in parts.between for n in (m.key, m.value))]
    end.args = (tuple(values),)
    end.meta["spec"] = tuple(n.meta["spec"] for n in values)
    _bury(out.graph.graph)
    settle(out)
    names = [str(n.target) for n in inputs_of(out.graph)]
    if any(n.startswith("decoder_") for n in names):
        raise NotCut("its encoder reads what the decoder is given")
    keys = ["last_hidden_state", *(f"present.{i}.encoder.{what}" for i in range(len(parts.between)) for what in ("key", "value"))]
    tree: Tree = {"type": "dict", "keys": keys, "items": [{"type": "tensor"} for _ in keys]}
    out.signature = signature(out, names, tree)
    return out


# ------------------------------------------------------------------ the decoder


def _decoder(whole: Program) -> Program:
    out = copy_of(whole)
    parts = parts_of(out)
    graph = out.graph.graph
    first = inputs_of(out.graph)
    at = boundary(out)
    batch, steps = shape_of(parts.ids)
    past = sympy.Symbol(_unused(out), integer=True, positive=True)
    with graph.inserting_after(first[-1]):
        names = [f"past_key_values_decoder_{what}_{i}" for i in range(len(parts.own)) for what in ("key", "value")]
        held = [_input(graph, n) for n in reversed(names)][::-1]
    for node, source in zip(held, [n for m in parts.own for n in (m.key, m.value)], strict=True):
        shape = shape_of(source)
        node.meta["spec"] = replace(source.meta["spec"], shape=(batch, shape[1], past, shape[3]))
    after = _last_input(graph)
    with graph.inserting_after(after):
        total = graph.call_function(aten.sym_size.int, (held[0], 2))
    with graph.inserting_after(after):
        new = graph.call_function(aten.sym_size.int, (parts.ids, 1))
    earlier = total
    with graph.inserting_after(earlier):
        total = graph.call_function(operator.add, (earlier, new))
    for node, size in ((earlier, past), (new, steps), (total, past + steps)):
        node.meta["spec"] = ValueSpec("int", "", (size,))
    lengths = Lengths(graph, steps, new, earlier, total)
    given = _take_cross(out, parts)
    states = _take_states(out, parts)
    present = _join(graph, parts, held, lengths, past)
    _two_lengths(graph, parts, lengths, set(present))
    end = graph.output_node()
    kept = [i for i in range(len(end.args[0])) if i != at]  # type: ignore[arg-type]
    values, specs = end.args[0], end.meta["spec"]
    end.args = (tuple([values[i] for i in kept] + present),)  # type: ignore[index]
    end.meta["spec"] = tuple([specs[i] for i in kept] + [n.meta["spec"] for n in present])
    tree = dict(whole.signature.out_spec)
    if len(tree["keys"]) != len(tree["items"]) or any(i["type"] != "tensor" for i in tree["items"]):
        raise NotCut("it gives more than tensors")
    names = [f"present.{i}.decoder.{what}" for i in range(len(parts.own)) for what in ("key", "value")]
    out_spec = {
        "type": "dict",
        "keys": [tree["keys"][i] for i in kept] + names,
        "items": [{"type": "tensor"} for _ in range(len(kept) + len(names))],
    }
    _finish(out, given, states, past, out_spec)
    return out


def _input(graph: fx.Graph, name: str) -> fx.Node:
    return graph.placeholder(name)


def _last_input(graph: fx.Graph) -> fx.Node:
    return [n for n in graph.nodes if n.op == "placeholder"][-1]


def _unused(program: Program) -> str:
    taken = set(program.signature.symbols)
    return next(name for i in range(len(taken) + 1) if (name := f"s{i}") not in taken)


def _take_cross(out: Program, parts: Parts) -> list[fx.Node]:
    """Inputs in the place of the encoder's keys and values."""
    graph = out.graph.graph
    made = []
    for i, memory in enumerate(parts.between):
        for what, node in (("key", memory.key), ("value", memory.value)):
            with graph.inserting_after(_last_input(graph)):
                given = _input(graph, f"encoder_{what}_{i}")
            given.meta.update(spec=node.meta["spec"])
            node.replace_all_uses_with(given)
            made.append(given)
    return made


def _take_states(out: Program, parts: Parts) -> fx.Node:
    """An input in the place of the encoder's output, for graphs that read more of it than keys and values; it goes where they do not."""
    graph = out.graph.graph
    with graph.inserting_after(_last_input(graph)):
        given = _input(graph, STATES)
    given.meta.update(spec=parts.states.meta["spec"])
    parts.states.replace_all_uses_with(given)
    return given


def _join(graph: fx.Graph, parts: Parts, held: list[fx.Node], lengths: Lengths, past: Any) -> list[fx.Node]:
    """Puts the past in front of the keys and values, and gives what is then there."""
    present = []
    for node, source in zip(held, [n for m in parts.own for n in (m.key, m.value)], strict=True):
        with graph.inserting_after(source):
            made = graph.call_function(aten.cat.default, ([node, source], 2))
        shape = shape_of(source)
        made.meta["spec"] = replace(source.meta["spec"], shape=(*shape[:2], past + lengths.steps, shape[3]))
        source.replace_all_uses_with(made, delete_user_cb=lambda user, own=made: user is not own)  # type: ignore[misc]
        present.append(made)
    for node in {n: None for m in parts.own for n in m.path}:
        node.args, node.kwargs = lengths.numbers(node.args, True), lengths.numbers(node.kwargs, True)
        spec = node.meta["spec"]
        node.meta["spec"] = replace(
            spec, shape=tuple(n.subs({lengths.steps: past + lengths.steps}) if holds(n, lengths.steps) else n for n in spec.shape)
        )
    return present


_ALONG = ("conv", "cumsum", "cumprod", "roll", "flip", "sort", "max_pool", "avg_pool", "lstm", "gru", "fft", "unfold", "scatter", "gather")


def _two_lengths(graph: fx.Graph, parts: Parts, lengths: Lengths, joined: set[fx.Node]) -> None:
    """Every node gets the length that it is about: tables all steps, values the new ones."""
    path = {n for m in parts.own for n in m.path}
    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr", "output") or is_number(node) or node in path or node in joined:
            continue
        if node not in parts.stream:
            _set(node, lengths.numbers(node.args, True), lengths.numbers(node.kwargs, True))
        elif node in parts.attentions:
            _attention(graph, node, parts, lengths)
        elif is_count(node, parts.ids):
            add_past(graph, node, lengths)
        else:
            _value(node, parts, lengths)


def _set(node: fx.Node, args: Any, kwargs: Any) -> None:
    node.args, node.kwargs = args, kwargs


def _attention(graph: fx.Graph, node: fx.Node, parts: Parts, lengths: Lengths) -> None:
    names = ("q", "k", "v", "mask") if node.op == "call_module" else ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    module: Any = graph.owning_module.get_submodule(str(node.target)) if node.op == "call_module" and graph.owning_module else None
    if given.get("is_causal") or getattr(module, "is_causal", False):
        raise NotCut(f"an attention counts its own causal mask ({node.name})")
    mask = given.get("attn_mask" if module is None else "mask")
    if not isinstance(mask, fx.Node):
        return
    if mask in parts.stream:
        raise NotCut(f"a mask is computed from the tokens ({mask.name})")
    shape = shape_of(mask)
    if len(shape) > 1 and holds(shape[-2], lengths.steps):
        node.replace_input_with(mask, lengths.last(mask, -2))


def _value(node: fx.Node, parts: Parts, lengths: Lengths) -> None:
    """One value of the stream: it has the new steps alone."""
    steps, name = lengths.steps, base(node)
    shapes = [shape_of(n) for n in (node, *(a for a in node.all_input_nodes if a in parts.stream))]
    moving = [sum(holds(n, steps) for n in s) for s in shapes]
    if max(moving) > 1:
        raise NotCut(f"an attention is written out ({node.name})")
    if max(moving) == 1 and ((moving[0] == 0 and shapes[0]) or any(word in name for word in _ALONG) or _along(node)):
        raise NotCut(f"it computes along the target ({node.name})")
    args, kwargs = lengths.numbers(node.args, False), lengths.numbers(node.kwargs, False)
    tables = [a for a in node.all_input_nodes if a not in parts.stream and not is_number(a) and any(holds(n, steps) for n in shape_of(a))]
    if tables:
        if name not in POINTWISE:
            raise NotCut(f"it reads `{tables[0].name}` in {node.name}")
        rank = len(shapes[0])
        for axis in (i for i, n in enumerate(shapes[0]) if n == steps):
            args, kwargs = (
                fx.node.map_arg(part, lambda n, axis=axis: lengths.fit(n, rank, axis) if n in tables else n) for part in (args, kwargs)
            )
    _set(node, args, kwargs)


def _along(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return False
    return "conv" in type(owner.get_submodule(str(node.target))).__name__.lower()


# ------------------------------------------------------------------ the signature


def _finish(out: Program, given: list[fx.Node], states: fx.Node, past: Any, out_spec: Tree) -> None:
    """Names, symbols and the tree of inputs, after dead nodes and unused inputs are gone."""
    steps = next(shape_of(n)[1] for n in inputs_of(out.graph) if str(n.target) == IDS)
    for node in inputs_of(out.graph):
        if str(node.target) == "decoder_attention_mask":
            spec = node.meta["spec"]
            node.meta["spec"] = replace(spec, shape=(spec.shape[0], spec.shape[1].subs({steps: past + steps})))
    holder = next(str(n.target) for n in inputs_of(out.graph) if str(n.target).startswith("past_key_values"))
    out.signature = replace(out.signature, symbols={**out.signature.symbols, str(past): (holder, 2, PAST)})
    _bury(out.graph.graph)
    settle(out, keep=lambda node: str(node.target).startswith("past_key_values"))
    renamed = {}
    for node in inputs_of(out.graph):
        name = str(node.target)
        if name.startswith(("decoder_", "past_key_values")) or node is states or node in given:
            continue
        if name != "attention_mask":
            raise NotCut(f"its decoder reads `{name}` of the encoder")
        renamed[name] = MASK
        node.target = MASK
    symbols = {s: (renamed.get(h, h), a, n) for s, (h, a, n) in out.signature.symbols.items()}
    out.graph.recompile()
    out.signature = replace(signature(out, [str(n.target) for n in inputs_of(out.graph)], out_spec), symbols=symbols)
