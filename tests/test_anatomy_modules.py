"""Modules that no family knows: torch's own encoder, hand-written models, attached modules; the flat view."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from surgery.core.site import NodeRef, Site
from surgery.model.anatomy import find_anatomy
from surgery.model.anatomy.graphview import GraphView
from surgery.model.anatomy.layers import Layer, find_stacks
from surgery.model.anatomy.sources import Sources
from surgery.model.flat import flatten
from surgery.model.program import Program, ValueSpec
from tests.anatomy_support import module_program, program_of, sites_of, zoo_program


def test_torch_transformer_encoder() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3, enable_nested_tensor=False)
    program = module_program(model, {"src": torch.randn(2, 7, 32)})
    sites = sites_of(program)
    assert [(s.name, s.layers) for s in program.anatomy.stacks] == [("layers", 3)]
    for i in range(3):
        q, k, v = (sites[f"layers[{i}].attn.{r}"] for r in "qkv")
        assert {s.weight for s in (q, k, v)} == {f"layers.{i}.self_attn.in_proj_weight"}
        assert [s.rows for s in (q, k, v)] == [((0, 32),), ((32, 64),), ((64, 96),)]
        assert (sites[f"layers[{i}].attn"].heads, sites[f"layers[{i}].attn"].head_dim) == (4, 8)
        assert sites[f"layers[{i}].ffn.up"].shape == (64, 32) and sites[f"layers[{i}].ffn"].facts["activation"] == "relu"
    assert not program.anatomy.unresolved


class Block(nn.Module):
    """Grouped attention by hand (softmax between two products) with interleaved fused qkv, and a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.before_a, self.before_b = nn.LayerNorm(24), nn.LayerNorm(24)
        self.mix = nn.Linear(24, 3 * 24, bias=False)
        self.out = nn.Linear(24, 24)
        self.wide = nn.Linear(24, 2 * 40)
        self.narrow = nn.Linear(40, 24)

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        q, k, v = self.mix(self.before_a(x)).reshape(b, s, 3, 3, 8).permute(3, 0, 2, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(b, s, c))
        up, gate = self.wide(self.before_b(x)).chunk(2, -1)
        return x + self.narrow(up * F.silu(gate))


class Handmade(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 24)
        self.where = nn.Parameter(torch.randn(1, 16, 24))
        self.trunk = nn.ModuleList(Block() for _ in range(3))
        self.last = nn.LayerNorm(24)
        self.guess = nn.Linear(24, 50, bias=False)
        self.unused = nn.Parameter(torch.zeros(3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.where[:, : ids.shape[1]]
        for block in self.trunk:
            x = block(x)
        return self.guess(self.last(x))


@pytest.fixture(scope="module")
def handmade() -> Program:
    torch.manual_seed(0)
    return module_program(Handmade(), {"ids": torch.randint(0, 50, (2, 7))})


def test_handwritten_module(handmade: Program) -> None:
    sites = sites_of(handmade)
    assert [(s.name, s.layers, s.path) for s in handmade.anatomy.stacks] == [("layers", 3, "trunk")]
    assert {s.role for s in handmade.anatomy.sites if s.layer is None} == {"embed.tokens", "embed.positions", "norm", "head"}
    attn = sites["layers[1].attn"]
    assert (attn.heads, attn.kv_heads, attn.head_dim, attn.facts["causal"]) == (3, 3, 8, False)
    # per head the rows are q, k, v of 8 each
    assert sites["layers[1].attn.q"].rows == ((0, 8), (24, 32), (48, 56))
    assert sites["layers[1].attn.v"].rows == ((16, 24), (40, 48), (64, 72))
    assert sites["layers[1].attn.q"].shape == (24, 24)
    assert sites["layers[2].ffn.up"].rows == ((0, 40),) and sites["layers[2].ffn.gate"].rows == ((40, 80),)
    assert sites["layers[2].ffn"].facts["gated"] is True and sites["layers[2].ffn"].facts["activation"] == "silu"
    assert [(u.path, u.why) for u in handmade.anatomy.unresolved] == [("unused", "no operation of the captured call reads it")]


class Flatland(nn.Module):
    """Blocks as plain attributes: no indexed container at all."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 24)
        self.first, self.second = Block(), Block()
        self.guess = nn.Linear(24, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.guess(self.second(self.first(self.words(ids))))


def test_blocks_without_a_list_are_layers_in_order_of_execution() -> None:
    torch.manual_seed(0)
    program = module_program(Flatland(), {"ids": torch.randint(0, 50, (2, 7))})
    sites = sites_of(program)
    assert [(s.name, s.layers) for s in program.anatomy.stacks] == [("layers", 2)]
    assert sites["layers[0].attn.o"].path == "first.out" and sites["layers[1].ffn.down"].path == "second.narrow"
    assert sites["layers[0]"].path == "first" and set(sites["layers[0].norm[0]"].calls)


def test_a_plain_network_has_no_layers_and_says_what_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    program = module_program(model, {"input": torch.randn(3, 8)})
    assert program.anatomy.stacks == ()
    owned = {s.weight for s in program.anatomy.sites}
    assert owned | {u.path for u in program.anatomy.unresolved} >= {"0.weight", "2.weight"}


class Echo(nn.Module):
    """Stands for what a method attaches: opaque to the analysis."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(32, 4, bias=False, device="meta"), nn.Linear(4, 32, bias=False, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(self.down(x))
        return out


def attach(program: Program, ref: NodeRef, name: str, *, behind: bool) -> None:
    """Adds an opaque module beside a node (its output is added to the node's) or behind it."""
    holder = program.module(ref.graph)
    node = program.node(ref)
    holder.add_submodule(name, Echo())
    graph: fx.Graph = holder.graph
    with graph.inserting_after(node):
        call = graph.call_module(name, (node if behind else node.args[0],))
    call.meta["spec"] = node.meta["spec"]
    last = call
    if not behind:
        with graph.inserting_after(call):
            last = graph.call_function(torch.ops.aten.add.Tensor, (node, call))
        last.meta["spec"] = node.meta["spec"]
    node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in (call, last))
    holder.recompile()


def test_attached_modules_do_not_hide_or_change_roles() -> None:
    from surgery.model.capture import clone_tree

    base = zoo_program("bert")
    before = sites_of(base)
    program = Program(clone_tree(base.graph), base.signature, base.weights, base.info, dict(base.aliases))
    attach(program, before["layers[1].attn.q"].calls[0], "added_q", behind=False)
    attach(program, before["layers[1].attn.o"].calls[0], "added_o", behind=False)
    output = before["layers[2].ffn"].output
    assert output is not None
    attach(program, output, "added_f", behind=True)
    after = {s.role: s for s in find_anatomy(program).sites}
    assert list(after) == list(before)

    def essence(site: Site) -> tuple[object, ...]:
        return (site.weight, site.rows, site.shape, site.heads, site.parameters, site.facts.get("norm"), site.facts.get("activation"))

    assert {r: essence(s) for r, s in after.items()} == {r: essence(s) for r, s in before.items()}


# ---------------------------------------------------------------- flat view and sources


def test_flat_view_inlines_everything_with_full_names() -> None:
    program = zoo_program("bert")
    graph = flatten(program.graph, program.aliases)
    assert all(n.op in ("placeholder", "get_attr", "call_function", "output") for n in graph.nodes)
    names = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
    known = {n for n, _ in [*program.graph.named_parameters(), *program.graph.named_buffers()]}
    assert len(names) == len(set(names)) and set(names) <= known
    for node in graph.nodes:
        if node.op == "output":
            continue
        assert isinstance(node.meta["spec"], (ValueSpec, tuple)), node
        origin = node.meta["origin"]
        program.node(origin)
    linear = next(n for n in graph.nodes if n.target is torch.ops.aten.linear.default)
    assert linear.args[1].target == "encoder.layer.0.attention.self.query.weight"
    assert linear.meta["path"] == "encoder.layer.0.attention.self.query"


def test_a_value_knows_its_name_in_every_graph_that_sees_it() -> None:
    program = zoo_program("bert")
    graph = flatten(program.graph, program.aliases)
    norm = next(n for n in graph.nodes if n.op == "call_function" and n.meta["origin"] == NodeRef("encoder.layer.0", "output_layer_norm"))
    graphs = [r.graph for r in norm.meta["refs"]]
    assert graphs[0] == "encoder.layer.0" and "" in graphs and "encoder.layer.1" in graphs


def test_flat_view_equals_the_model_when_run() -> None:
    """The flat graph computes what the tree computes."""
    torch.manual_seed(0)
    model = Handmade().eval()
    program = module_program(model, {"ids": torch.randint(0, 50, (2, 7))})
    graph = flatten(program.graph, program.aliases)
    flat = fx.GraphModule(_with_weights(model), graph)
    for node in flat.graph.nodes:
        node.args = fx.node.map_aggregate(node.args, lambda a: torch.float32 if a is torch.bfloat16 else a)
        node.kwargs = fx.node.map_aggregate(node.kwargs, lambda a: torch.float32 if a is torch.bfloat16 else a)
    flat.recompile()
    ids = torch.randint(0, 50, (3, 11))
    with torch.no_grad():
        torch.testing.assert_close(flat(ids)[0], model(ids), rtol=0, atol=1e-6)


def _with_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in [*model.named_parameters(), *model.named_buffers()]}


def test_analysis_of_a_deep_model_is_fast_and_linear() -> None:
    """Not a benchmark: guards against something quadratic. 3 and 6 layers differ by less than a factor of 4 a node, in the best of runs."""
    times = {}
    for family in ("llama", "gemma3_text"):
        program = zoo_program(family)
        taken = []
        for _ in range(5):
            program.touch()
            start = time.process_time()
            find_anatomy(program)
            taken.append(time.process_time() - start)
        times[family] = min(taken) / len(program.dims.graph.nodes)
    assert times["gemma3_text"] < 4 * times["llama"]


def llama(layers: int) -> Program:
    from transformers import LlamaConfig

    from surgery.model.capture import capture_config

    config = LlamaConfig(hidden_size=512, intermediate_size=1408, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=4,
                         vocab_size=1000)  # fmt: skip
    return program_of(capture_config(config, "LlamaForCausalLM"), "llama")


def test_classes_and_roles_of_thirty_two_layers_take_half_a_second() -> None:
    """The best of three in processor time: classes with their flat graph, then roles; four times the layers, about four times the time."""
    times = {}
    for layers in (8, 32):
        program = llama(layers)
        taken = []
        for _ in range(3):
            program.touch()
            start = time.process_time()
            assert program.anatomy.stacks[0].layers == layers
            taken.append(time.process_time() - start)
        times[layers] = min(taken)
    assert times[32] < 0.5
    assert times[32] < 8 * times[8]


def test_sources_are_the_rows_that_cuts_leave(handmade: Program) -> None:
    view = GraphView(handmade.dims)
    sources = Sources(view, handmade.dims)
    softmax = next(n for n in view.nodes if n.target is torch.ops.aten.softmax.int)
    assert sources.of(softmax) == []
    mix = next(p for p in view.projections if p.weight == "trunk.0.mix.weight")
    (whole,) = sources.of(mix.node)
    assert whole.projection is mix and whole.rows.tolist() == list(range(72))
    scores, context = (n for n in view.nodes if n.target is torch.ops.aten.matmul.default and n.meta["origin"].graph == "trunk.0")
    q, k, v = scores.args[0], scores.args[1], context.args[1]
    taken = [sources.of(n)[0].rows.tolist() for n in (q, k, v)]
    # a head has 24 rows: 8 of q, 8 of k, 8 of v
    assert taken == [[24 * h + 8 * i + j for h in range(3) for j in range(8)] for i in range(3)]


class Twins(nn.Module):
    """Gate and value of one class of units in one projection, read in three cuts one behind the other; weights are turned and sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(12, 40))
        self.low = nn.Linear(20, 12)

    def forward(self, x: Tensor) -> Tensor:
        both = F.linear(x, self.wide.t())
        rest = both[..., 5:]
        gate, up = rest[..., :15], F.pad(rest[..., 15:30], (0, 0))
        return x + self.low(F.pad(torch.tanh(gate) * up, (0, 5)))


def test_cuts_of_cuts_and_turned_weights() -> None:
    program = module_program(Twins(), {"x": torch.randn(2, 7, 12)})
    view = GraphView(program.dims)
    sources = Sources(view, program.dims)
    wide = next(p for p in view.projections if p.weight == "wide")
    assert (wide.out_axis, wide.in_axis, wide.whole) == (1, 0, True)
    product = next(n for n in view.nodes if n.target is torch.ops.aten.mul.Tensor)
    gate, up = product.args
    assert [(p.projection, p.rows.tolist()) for p in sources.of(gate)] == [(wide, list(range(5, 20)))]
    assert [(p.projection, p.rows.tolist()) for p in sources.of(up)] == [(wide, list(range(20, 35)))]


class Strided(nn.Module):
    """Features taken with a stride: of whole pairs, and one that cuts through units, where a second cut follows."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.odd = nn.Linear(12, 40), nn.Linear(12, 40)

    def forward(self, x: Tensor) -> Tensor:
        pairs = self.wide(x)
        even = pairs[..., ::2][..., 4:12]
        other = self.odd(x)[..., 1::3][..., 2:10]
        return torch.sigmoid(even) * other


def test_rows_of_strides_are_exact_or_not_claimed() -> None:
    program = module_program(Strided(), {"x": torch.randn(2, 7, 12)})
    view = GraphView(program.dims)
    sources = Sources(view, program.dims)
    product = next(n for n in view.nodes if n.target is torch.ops.aten.mul.Tensor)
    even, other = product.args
    assert [p.rows.tolist() for p in sources.of(even)] == [list(range(8, 24, 2))]
    assert sources.of(other) == []  # the classes do not follow what a stride of 3 leaves of 40


class Packed(nn.Module):
    """One square parameter used twice, as stored and turned, and the lower half of another."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Parameter(torch.randn(12, 12))
        self.tall = nn.Parameter(torch.randn(24, 12))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.linear(x, self.square)
        x = x + F.linear(x, self.square.t())
        return x + F.linear(x, self.tall[12:])


def test_axes_and_rows_of_viewed_weights() -> None:
    program = module_program(Packed(), {"x": torch.randn(2, 7, 12)})
    plain, turned, part = GraphView(program.dims).projections
    assert (plain.out_axis, plain.in_axis) == (0, 1) and (turned.out_axis, turned.in_axis) == (1, 0)
    assert part.rows.tolist() == list(range(12, 24)) and not part.whole


def test_one_analysis_serves_the_program_until_it_changes(handmade: Program) -> None:
    dims = handmade.dims
    assert handmade.dims is dims and handmade.copy().dims is dims
    changed = handmade.copy()
    changed.touch()
    assert changed.dims is not dims and handmade.dims is dims


def test_layers_of_nested_containers() -> None:
    assert find_stacks([], ["a.0.b", "a.1.b"]) == []
    assert Layer("a.0", 0).first > 1 << 30
