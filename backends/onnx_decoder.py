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
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from surgery.backends.onnx_cut import (
    BOUNDARY,
    MASK,
    STATES,
    NotCut,
    Tree,
    boundary,
    copy_of,
    inputs_of,
    is_pair,
    settle,
    signature,
)
from surgery.backends.onnx_inline import base_of, inlined
from surgery.backends.onnx_lengths import TwoLengths
from surgery.backends.onnx_parts import IDS, Parts, parts_of
from surgery.backends.onnx_rows import Lengths, shape_of
from surgery.model.program import Program, ValueSpec

aten = torch.ops.aten

PAST = 8
"""Steps of the past that the signature says it was traced with; differs from other sizes, so that none is taken for another."""


def cached_pair(program: Program) -> tuple[Program, Program]:
    """The encoder and the decoder with its cache, see the module. Raises :class:`NotCut` where the graph does something along the target
    that a cache does not carry: it mixes tokens other than by attention, or attention reads encoder and target at once."""
    if not is_pair(program):
        raise NotCut("it is not an encoder and a decoder")
    whole = inlined(program)
    return _encoder(whole), _decoder(whole)


def _bury(graph: fx.Graph) -> None:
    """Takes out what nobody reads, attention as well, which torch keeps because it may draw random numbers. What is written into a value
    that somebody reads stays."""
    written: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if getattr(getattr(node.target, "_schema", None), "is_mutable", False) and isinstance(node.args[0], fx.Node):
            written.setdefault(base_of(node.args[0]), []).append(node)
    todo: list[fx.Node] = [graph.output_node()]
    live: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in live:
            live.add(node)
            todo += [*node.all_input_nodes, *written.get(base_of(node), ())]
    for node in reversed(list(graph.nodes)):
        if node not in live and node.op != "placeholder":
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
    present = _join(graph, parts, held)
    TwoLengths(out, parts, lengths, past).settle(set(present))
    end = graph.output_node()
    kept = [i for i in range(len(end.args[0])) if i != at]  # type: ignore[arg-type]
    values, specs = end.args[0], end.meta["spec"]
    end.args = (tuple([values[i] for i in kept] + present),)  # type: ignore[index]
    end.meta["spec"] = tuple([specs[i] for i in kept] + [n.meta["spec"] for n in present])
    tree = whole.signature.out_spec
    given_out = [(key, item) for key, item in zip(tree["keys"], tree["items"], strict=True) if key != BOUNDARY]
    names = [f"present.{i}.decoder.{what}" for i in range(len(parts.own)) for what in ("key", "value")]
    out_spec = {
        "type": "dict",
        "keys": [key for key, _ in given_out] + names,
        "items": [item for _, item in given_out] + [{"type": "tensor"} for _ in names],
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


def _join(graph: fx.Graph, parts: Parts, held: list[fx.Node]) -> list[fx.Node]:
    """Puts the past in front of the keys and values, and gives what is then there; sizes are left to those who count them."""
    present = []
    for node, source in zip(held, [n for m in parts.own for n in (m.key, m.value)], strict=True):
        with graph.inserting_after(source):
            made = graph.call_function(aten.cat.default, ([node, source], 2))
        made.meta["spec"] = source.meta["spec"]
        source.replace_all_uses_with(made, delete_user_cb=lambda user, own=made: user is not own)  # type: ignore[misc]
        present.append(made)
    return present


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
