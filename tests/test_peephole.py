"""What the running module does differently from the recorded graph changes no result."""

from __future__ import annotations

import torch
from torch import fx

from surgery.model.peephole import append, tune

aten = torch.ops.aten


def recorded(repeat: int = 2) -> fx.Graph:
    """A grouped attention with a growing cache, as captures state it."""
    graph = fx.Graph()
    q, k, v, past_k, past_v = (graph.placeholder(n) for n in ("q", "k", "v", "past_k", "past_v"))
    keys = graph.call_function(aten.cat.default, ([past_k, k], -2))
    values = graph.call_function(aten.cat.default, ([past_v, v], -2))
    wide = []
    for x in (keys, values):
        thin = graph.call_function(aten.unsqueeze.default, (x, 2))
        grown = graph.call_function(aten.expand.default, (thin, [-1, -1, repeat, -1, -1]))
        size = graph.call_function(aten.sym_size.int, (x, 2))
        wide.append(graph.call_function(aten.reshape.default, (grown, [3, -1, size, 8])))
    out = graph.call_function(aten.scaled_dot_product_attention.default, (q, *wide))
    graph.output((out, keys, values))
    return graph


def inputs(past: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 4, 5, 8), *(torch.randn(3, 2, 5, 8) for _ in "kv"), *(torch.randn(3, 2, past, 8) for _ in "kv")]


def test_tuned_graph_equals_the_recorded_one_with_and_without_a_past() -> None:
    plain, tuned = recorded(), recorded()
    tune(tuned)
    targets = [n.target for n in tuned.nodes]
    assert append in targets and aten.expand.default not in targets and aten.cat.default not in targets
    a, b = (fx.GraphModule({}, g) for g in (plain, tuned))
    for past in (0, 3):
        for x, y in zip(a(*inputs(past)), b(*inputs(past)), strict=True):
            assert torch.equal(x, y)


def test_a_cat_that_is_no_cache_stays() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    both = graph.call_function(aten.cat.default, ([x, y], 0))
    graph.output(graph.call_function(aten.neg.default, (both,)))
    tune(graph)
    assert any(n.target is aten.cat.default for n in graph.nodes)


def test_append_keeps_promotion() -> None:
    old, new = torch.zeros(1, 0, 2), torch.ones(1, 2, 2, dtype=torch.bfloat16)
    assert append(old, new, 1).dtype == torch.cat([old, new], 1).dtype == torch.float32
    assert append(old.bfloat16(), new, 1) is new
