"""Dimension classes of graphs made by hand: what freezes an axis, positions as values, slices, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from surgery.core.diagnostics import SurgeryError
from surgery.model.dims import analyse
from surgery.model.program import ValueSpec

aten = torch.ops.aten


def graph_of(build: Any, **inputs: tuple[int, ...]) -> fx.Graph:
    """A hand-made flat graph; ``build`` gets a tracer of (target, args, shape) and the placeholders."""
    graph = fx.Graph()

    def tensor(node: fx.Node, *shapes: tuple[int, ...]) -> fx.Node:
        specs = tuple(ValueSpec("tensor", "float32", s) for s in shapes)
        node.meta["spec"] = specs[0] if len(specs) == 1 else specs
        return node

    def weight(name: str, *shape: int) -> fx.Node:
        return tensor(graph.create_node("get_attr", name), shape)

    def call(target: Any, args: tuple[Any, ...], *shapes: tuple[int, ...]) -> fx.Node:
        return tensor(graph.call_function(target, args), *shapes)

    given = [tensor(graph.placeholder(n), s) for n, s in inputs.items()]
    graph.output(build(weight, call, *given))
    return graph


def test_an_operator_without_a_rule_freezes_what_it_touches_and_names_itself():
    def build(weight, call, x):
        h = call(aten.linear.default, (x, weight("up", 8, 4)), (2, 8))
        h = call(aten.linalg_svdvals.default, (call(aten.mm.default, (h, weight("mid", 8, 6)), (2, 6)),), (2,))
        return h

    dims = analyse(graph_of(build, x=(2, 4)), strict=True)
    assert [op for _, op in dims.unknown] == ["aten.linalg_svdvals.default"]
    inner, frozen = dims.leaves(dims.parameter("mid")[0])[0], dims.leaves(dims.parameter("mid")[1])[0]
    assert inner.free
    assert "aten.linalg_svdvals.default has no dimension rule" in frozen.reason and frozen.node.name == "linalg_svdvals_default"
    assert "linalg_svdvals" in dims.coupled("mid", 1, [0]).refusal


def test_a_conflict_freezes_the_axis_and_says_which_sizes_disagree():
    def build(weight, call, x):
        h = call(aten.linear.default, (x, weight("up", 36, 4)), (2, 36))
        a = call(aten.view.default, (h, [2, 4, 9]), (2, 4, 9))
        b = call(aten.view.default, (h, [2, 6, 6]), (2, 6, 6))
        down = call(aten.linear.default, (x, weight("side", 5, 4)), (2, 5))
        return [a, b, down]

    dims = analyse(graph_of(build, x=(2, 4)), strict=True)
    assert all(not leaf.free for leaf in dims.leaves(dims.parameter("up")[0]))
    assert "two uses split it differently" in dims.leaves(dims.parameter("up")[0])[0].reason
    assert dims.leaves(dims.parameter("side")[0])[0].free


def test_positions_used_as_numbers_freeze_the_axis_they_index():
    def build(weight, call, x):
        scores = call(aten.linear.default, (x, weight("router", 6, 4)), (2, 6))
        best = call(aten.argmax.default, (scores, -1), (2,))
        moved = call(aten.unsqueeze.default, (best, 0), (1, 2))
        return call(aten.add.Tensor, (moved, 1), (1, 2))

    leaf = (dims := analyse(graph_of(build, x=(2, 4)), strict=True)).leaves(dims.parameter("router")[0])[0]
    assert not leaf.free and "used as numbers" in leaf.reason


def test_a_table_indexed_by_a_domain_is_one_class_with_it():
    def build(weight, call, x):
        scores = call(aten.linear.default, (x, weight("router", 6, 4)), (2, 6))
        best = call(aten.argmax.default, (scores, -1), (2,))
        return call(aten.embedding.default, (weight("table", 6, 5), best), (2, 5))

    dims = analyse(graph_of(build, x=(2, 4)), strict=True)
    group = dims.coupled("table", 0, [1])
    assert not group.refusal and [m.parameter for m in group.members] == ["router", "table"]


def test_a_rule_that_contradicts_the_trace_is_an_internal_error_or_freezes():
    def build(weight, call, x):
        return call(aten.t.default, (call(aten.mm.default, (x, weight("w", 4, 3)), (2, 3)),), (2, 3))

    graph = graph_of(build, x=(2, 4))
    with pytest.raises(SurgeryError) as caught:
        analyse(graph, strict=True)
    assert caught.value.diagnostics[0].code == "S0950" and "aten.t.default" in str(caught.value)
    dims = analyse(graph)
    assert "traced were (2, 3)" in dims.leaves(dims.parameter("w")[1])[0].reason


def test_positions_that_an_unprepared_operation_receives_freeze_the_axis():
    """stack has a rule for axes but none for numbers of units: the domain must not be lost silently."""

    def build(weight, call, x):
        scores = call(aten.linear.default, (x, weight("router", 6, 4)), (2, 6))
        best = call(aten.argmax.default, (scores, -1), (2,))
        twice = call(aten.stack.default, ([best, best],), (2, 2))
        return call(aten.embedding.default, (weight("table", 6, 5), twice), (2, 2, 5))

    dims = analyse(graph_of(build, x=(2, 4)), strict=True)
    assert "aten.stack" in dims.leaves(dims.parameter("router")[0])[0].reason
    assert not dims.leaves(dims.parameter("table")[0])[0].free


def test_positions_side_by_side_are_positions():
    """Choices that are made one after the other (Phi-MoE) and put side by side still number the axis that they were made on."""

    def build(weight, call, x):
        scores = call(aten.linear.default, (x, weight("router", 6, 4)), (2, 6))
        best = call(aten.argmax.default, (scores, -1), (2,))
        twice = call(aten.cat.default, ([best, best],), (4,))
        return call(aten.embedding.default, (weight("table", 6, 5), twice), (4, 5))

    dims = analyse(graph_of(build, x=(2, 4)), strict=True)
    (leaf,) = dims.leaves(dims.parameter("router")[0])
    assert leaf.free and leaf in dims.leaves(dims.parameter("table")[0])


def test_slices_of_slices_of_a_concatenation_are_traced_to_its_rows():
    def build(weight, call, x):
        joined = call(aten.cat.default, ([weight("a", 3, 4), weight("b", 5, 4), weight("c", 4, 4)],), (12, 4))
        h = call(aten.linear.default, (x, joined), (2, 12))
        rest = call(aten.slice.Tensor, (h, 1, 3), (2, 9))
        last = call(aten.slice.Tensor, (rest, 1, 6, 8), (2, 2))
        return [last, joined]

    graph = graph_of(build, x=(2, 4))
    dims = analyse(graph, strict=True)
    nodes = {n.name: n for n in graph.nodes}
    cuts = [dims.cut_of(nodes[name]) for name in ("slice_tensor_1", "slice_tensor")]
    whole = dims.axes(nodes["cat_default"])[0]
    assert dims.rows(whole, cuts) == ((9, 11),)
    with pytest.raises(LookupError):
        dims.rows(dims.parameter("a")[0], cuts)


def test_a_cache_does_not_freeze_the_heads():
    def build(weight, call, x, past):
        k = call(aten.view.default, (call(aten.linear.default, (x, weight("k", 6, 4)), (2, 6)), [2, 3, 1, 2]), (2, 3, 1, 2))
        return [call(aten.cat.default, ([past, k], 2), (2, 3, 8, 2))]

    dims = analyse(graph_of(build, x=(2, 4), past=(2, 3, 7, 2)), strict=True)
    heads, width = dims.leaves(dims.parameter("k")[0])
    assert heads.free and width.free and heads.flags == {"state"}
    assert not dims.leaves(dims.parameter("k")[1])[0].free  # the ordinary input's width


def test_dots_of_an_einsum_stand_for_axes():
    from surgery.model.dims.rules_linear import spelled_out

    assert spelled_out("...qhd, ...khd -> ...hqk", [5, 5]) == "ABqhd,ABkhd->ABhqk"
    assert spelled_out("...ij,jk->...ik", [4, 2]) == "ABij,jk->ABik"
    assert spelled_out("ij,jk", [2, 2]) is None
