"""A hand-made Program with one site of every kind that methods can stand at, and the steps that method tests share."""

from __future__ import annotations

import copy
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from surgery.core.method import Method
from surgery.core.site import Anatomy, NodeRef, Site
from surgery.model import pytree
from surgery.model.live import Tensors, live_root
from surgery.model.program import ModelInfo, Origin, Program, Signature, ValueSpec
from surgery.model.weights import Held, Init, Weights
from surgery.passes import registry
from surgery.passes.operation import Resolved, SiteChange

aten = torch.ops.aten


class Bench(nn.Module):
    """An embedding, an attention-like block (fused qkv, output projection stored transposed), a feed-forward block, experts
    and two convolutions, one of them grouped and strided."""

    def __init__(self, d: int = 16) -> None:
        super().__init__()
        self.d = d
        self.tokens = nn.Embedding(23, d, padding_idx=0)
        self.qkv = nn.Linear(d, 3 * d)
        self.o_weight = nn.Parameter(torch.randn(d, d) / 4)
        self.o_bias = nn.Parameter(torch.randn(d) / 4)
        self.norm = nn.LayerNorm(d)
        self.up = nn.Linear(d, 32)
        self.act = nn.GELU()
        self.drop = nn.Dropout(0.0)
        self.down = nn.Linear(32, d)
        self.norm_2 = nn.LayerNorm(d)
        self.experts = nn.Parameter(torch.randn(3, 24, d) / 4)
        self.experts_down = nn.Parameter(torch.randn(3, 24, d) / 4)
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(6, 8, (3, 1), padding=(1, 0), dilation=(2, 1), groups=2, bias=False)
        self.head = nn.Linear(d, 23, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.tokens(ids)
        parts = aten.split.Tensor(self.qkv(h), self.d, -1)
        q, k, v = parts[0], parts[1], parts[2]
        a = aten.add.Tensor(aten.mul.Tensor(aten.tanh.default(q), k), v)
        a = aten.addmm.default(self.o_bias, aten.reshape.default(a, [-1, self.d]), self.o_weight)
        a = aten.reshape.default(a, [-1, 5, self.d])
        h = self.norm(aten.add.Tensor(h, a))
        f = self.drop(self.down(aten.gelu.default(self.up(h))))
        h = self.norm_2(aten.add.Tensor(h, f))
        mixed = aten.einsum.default("bti,eoi->beto", [h, self.experts])
        mixed = aten.einsum.default("beto,eoi->bti", [aten.relu.default(mixed), self.experts_down])
        return self.head(h), mixed, self.grouped(aten.relu.default(self.conv(image)))


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(1, 23, (2, 5), generator=g), torch.randn(2, 4, 8, 8, generator=g)


def bench_program(seed: int = 0) -> Program:
    torch.manual_seed(seed)
    live = Bench()
    with torch.no_grad():
        for p in live.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape))
    return make_program(live, inputs(), bench_sites)


def make_program(live: nn.Module, example: tuple[Tensor, ...], sites: Any) -> Program:
    """A Program of a module that fx can trace; ``sites(nodes)`` gives the anatomy's sites from the nodes by name."""
    traced = fx.symbolic_trace(copy.deepcopy(live))
    ShapeProp(traced).propagate(*example)
    output = next(n for n in traced.graph.nodes if n.op == "output")
    if not isinstance(output.args[0], tuple):
        output.args = ((output.args[0],),)
        traced.recompile()
    for node in traced.graph.nodes:
        info = node.meta.pop("tensor_meta", None)
        if hasattr(info, "shape"):
            node.meta["spec"] = ValueSpec("tensor", str(info.dtype).removeprefix("torch."), tuple(info.shape))
        for key in [k for k in node.meta if k != "spec"]:
            del node.meta[key]
    weights, aliases, first = Weights(), {}, {}
    everything = {**dict(live.named_parameters(remove_duplicate=False)), **dict(live.named_buffers(remove_duplicate=False))}
    for name, tensor in everything.items():
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
        else:
            weights[name] = Held(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), name, tensor.detach().clone())
    root = traced.to("meta")
    for alias, name in aliases.items():  # moving to meta keeps ties only within one module
        owner, _, leaf = alias.rpartition(".")
        setattr(root.get_submodule(owner), leaf, root.get_parameter(name))
    names = tuple(n.name for n in root.graph.nodes if n.op == "placeholder")
    results = pytree.spec_of(live(*example) if isinstance(live(*example), tuple) else (live(*example),))
    signature = Signature(names, pytree.spec_of(dict(zip(names, example, strict=True))), results)
    found = Anatomy(tuple(sites({n.name: n for n in root.graph.nodes})), ())
    return Program(root, signature, weights, ModelInfo("bench", dtype="float32"), aliases, _anatomy=found)


def bench_sites(nodes: dict[str, fx.Node]) -> list[Site]:
    def at(name: str) -> tuple[NodeRef, ...]:
        return (NodeRef("", name),)

    addmm = next(n for n in nodes if n.startswith("addmm"))
    qkv = {"weight": "qkv.weight", "bias": "qkv.bias", "calls": at("qkv"), "dtype": "float32"}
    attn_out = str(nodes[str(nodes["norm"].args[0])].args[1])
    region = {"op": "region", "path": ""}
    attn = ("qkv.weight", "qkv.bias", "o_weight", "o_bias")
    ffn = ("up.weight", "up.bias", "down.weight", "down.bias")
    return [
        Site("embed.tokens", "embedding", "tokens", "tokens.weight", out_axis=1, in_axis=0, shape=(16, 23), calls=at("tokens")),
        Site("layers[0].attn.q", "linear", "qkv", rows=((0, 16),), shape=(16, 16), **qkv),
        Site("layers[0].attn.v", "linear", "qkv", rows=((32, 40), (40, 48)), shape=(16, 16), **qkv),
        Site("layers[0].attn.o", "conv1d", "", "o_weight", "o_bias", out_axis=1, in_axis=0, shape=(16, 16), calls=at(addmm)),
        Site("layers[0].attn", **region, parameters=attn, input=NodeRef("", "tokens"), output=NodeRef("", attn_out), norm_output=NodeRef("", "norm")),
        Site("layers[0].norm[0]", "norm", "norm", "norm.weight", "norm.bias", calls=at("norm")),
        Site("layers[0].ffn.up", "linear", "up", "up.weight", "up.bias", shape=(32, 16), calls=at("up")),
        Site("layers[0].ffn.down", "linear", "down", "down.weight", "down.bias", shape=(16, 32), calls=at("down")),
        Site("layers[0].ffn", **region, parameters=ffn, input=NodeRef("", "norm"), output=NodeRef("", "drop"), norm_output=NodeRef("", "norm_2")),
        Site("layers[0].norm[1]", "norm", "norm_2", "norm_2.weight", "norm_2.bias", calls=at("norm_2")),
        Site("layers[0].ffn.experts.up", "experts", "", "experts", rows=((0, 12),), out_axis=1, in_axis=2, shape=(3, 12, 16)),
        Site("layers[0].ffn.experts.down", "experts", "", "experts_down", out_axis=2, in_axis=1, shape=(3, 16, 24)),
        Site("stem.conv[0]", "conv", "conv", "conv.weight", "conv.bias", shape=(6, 4, 3, 3), calls=at("conv")),
        Site("stem.conv[1]", "conv", "grouped", "grouped.weight", shape=(8, 3, 3, 1), calls=at("grouped")),
        Site("head", "linear", "head", "head.weight", shape=(23, 16), calls=at("head"), tied_to="tokens.weight"),
    ]  # fmt: skip


def run(program: Program, op: Resolved) -> list[SiteChange]:
    return import_module(f"surgery.passes.kinds.{op.method.kind}").apply(program, op)


def operation(
    program: Program, verb: str, name: str, roles: list[str], place: str = "on", seed: int = 0, label: str = "", **params: Any
) -> Resolved:
    method: Method = registry.get(verb, name)(**params)
    by_role = {s.role: s for s in program.anatomy.sites}
    sites = tuple(by_role[r] for r in roles)
    return Resolved(verb, label or name, place, sites, (method,) * max(1, len(sites)), Origin(verb=verb, method=name), seed=seed)


def fold_all(program: Program, label: str = "") -> list[SiteChange]:
    """Fold everything, or what one label names (as ``fold all on @label`` resolves)."""
    anatomy = program.anatomy
    made = [a for a in program.attachments if a.name == label]
    sites = tuple(
        replace(a.site, role=f"{a.site.role}.{a.name}", op="attachment", path=a.module, weight="", bias="", parameters=a.tensors)
        for a in made
    )
    method = registry.get("fold", "all")()
    changes = run(program, Resolved("fold", "all", "on", sites, (method,) * max(1, len(sites)), Origin(verb="fold", method="all")))
    program._anatomy = anatomy
    return changes


def live(program: Program, dtype: torch.dtype | None = None) -> fx.GraphModule:
    return live_root(program, Tensors(registry.function), dtype=dtype).eval()


def outputs(program: Program, *args: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    given = args or inputs()
    with torch.no_grad():
        made = live(program, dtype)(*(a.to(dtype) if dtype and a.is_floating_point() else a for a in given))
    return list(made) if isinstance(made, (tuple, list)) else [made]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    """The largest absolute difference, relative to the largest value of ``b`` where that is above 1."""
    return max(((x.double() - y.double()).abs().max() / y.double().abs().max().clamp(min=1)).item() for x, y in zip(a, b, strict=True))


def perturb(program: Program, amount: float = 0.2) -> None:
    """As if trained: every attached parameter gets random values around its initial one."""
    tensors = Tensors(registry.function)
    values = {
        t: tensors.of(program, t).clone()
        for a in program.attachments
        for t in a.tensors
        if t in program.weights and t not in program.frozen
    }
    for i, (name, value) in enumerate(values.items()):
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(i)) * amount
        program.weights[name] = Held(
            tuple(value.shape), str(value.dtype).removeprefix("torch."), f"trained {i} {name}", value + noise.to(value.dtype)
        )


__all__ = ["Init", "bench_program", "difference", "fold_all", "inputs", "live", "make_program", "operation", "outputs", "perturb", "run"]
