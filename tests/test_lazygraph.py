"""Graph trees: copies are equal and independent, code is made when it is first needed."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from surgery.model.lazygraph import LazyGraphModule, _compile_and_run, compile_tree, copy_tree, empty
from surgery.model.samegraph import difference


def tree() -> fx.GraphModule:
    """A layer below a root; one parameter under two names, a temporary buffer, and a tensor that no graph reads."""
    layer = empty()
    layer.lin = nn.Linear(3, 3, bias=False)
    layer.own = nn.Identity()
    layer.own.notes = [1]
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("own", (graph.call_module("lin", (x,)),))
    y.meta["spec"] = ("kept",)
    graph.output((graph.call_function(torch.relu, (y,)),))
    layer.graph = graph
    root = empty()
    root.layer = layer
    root.head = nn.Linear(3, 3, bias=False)
    root.head.weight = layer.lin.weight
    root.register_buffer("shift", torch.ones(3), persistent=False)
    root.unread = nn.Parameter(torch.zeros(2), requires_grad=False)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_module("layer", (x,)), graph.get_attr("shift")))
    root.graph = graph
    return root


def test_a_copy_is_equal_and_independent() -> None:
    root = tree()
    made = copy_tree(root)
    assert difference(root, made) == ""
    assert made.head.weight is made.layer.lin.weight and made.head.weight is not root.head.weight
    assert made._non_persistent_buffers_set == {"shift"} and "unread" in made._parameters
    x = torch.randn(2, 3)
    before = root(x)
    made.layer.own.notes[0] = 2
    assert root.layer.own.notes == [1]
    with torch.no_grad():
        made.head.weight.add_(1)
    made.shift.add_(1)
    for node in list(made.layer.graph.nodes):
        if node.target is torch.relu:
            node.target = torch.neg
    assert all(torch.equal(a, b) for a, b in zip(before[0], root(x)[0], strict=True)) and torch.equal(before[1], root(x)[1])
    assert not torch.equal(made(x)[0][0], before[0][0]) and torch.equal(made(x)[1], before[1] + 1)


def test_a_copy_of_meta_tensors_has_their_shapes_types_and_demands() -> None:
    root = tree().to("meta")
    made = copy_tree(root)
    assert difference(root, made) == ""
    assert made.layer.lin.weight.is_meta and made.layer.lin.weight.requires_grad and not made.unread.requires_grad


def test_the_graph_as_it_is_at_the_first_call_runs_and_changes_need_a_recompile() -> None:
    root = tree()
    relu = next(n for n in root.layer.graph.nodes if n.target is torch.relu)
    assert type(root.layer).forward is _compile_and_run
    relu.target = torch.neg
    x = torch.randn(2, 3)
    first = root(x)[0][0]
    assert torch.equal(first, -(x @ root.head.weight.T))
    relu.target = torch.relu
    assert torch.equal(root(x)[0][0], first)
    root.layer.recompile()
    assert torch.equal(root(x)[0][0], torch.relu(-first))
    assert "relu" in root.layer.code


def test_copies_by_python_and_compiled_ones_run() -> None:
    root = tree()
    x = torch.randn(2, 3)
    want = root(x)[0][0]
    twin = copy.deepcopy(root)
    assert isinstance(twin, LazyGraphModule) and torch.equal(twin(x)[0][0], want)
    other = copy_tree(root)
    compile_tree(other)
    assert type(other.layer).forward is not _compile_and_run and torch.equal(other(x)[0][0], want)


def test_a_graph_that_ends_in_nothing_is_copied() -> None:
    assert difference(empty(), copy_tree(empty())) == ""


def test_a_copy_has_the_names_the_order_and_the_users_of_the_nodes() -> None:
    root = tree()
    made = copy_tree(root)
    for ours, theirs in ((root.graph, made.graph), (root.layer.graph, made.layer.graph)):
        theirs.lint()
        assert [(n.name, n.op, n.target, n.type, n.meta) for n in ours.nodes] == [
            (n.name, n.op, n.target, n.type, n.meta) for n in theirs.nodes
        ]
        assert [[u.name for u in n.users] for n in ours.nodes] == [[u.name for u in n.users] for n in theirs.nodes]
        assert all(n.graph is theirs for n in theirs.nodes) and len(ours.nodes) == len(theirs.nodes)
    own = made.layer.graph
    (found,) = own.find_nodes(op="call_function", target=torch.relu)
    with own.inserting_after(found):
        assert own.call_function(torch.relu, (found,)).name == "relu_1"  # and knows which names are taken
