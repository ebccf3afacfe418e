"""Packing the first product of a sequential bottleneck into the product in front of it.

Behind a linear map ``y = W x + b`` a bottleneck computes ``y + s (U f(D y + d) + u)``. Because ``D y + d = (D W) x + (D b + d)``, one product
with ``[W; D W]`` gives ``y`` and the inside of ``f`` together: one product less that waits for another. It costs ``width in`` multiply-adds
in place of ``width out``, so it is done where ``in <= out``: behind an attention's output projection, and not behind the wide inner side of a
feed-forward block.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.core.method import Method
from surgery.core.site import Site
from surgery.model import masked
from surgery.model.cut_attached import Around, Follow
from surgery.model.modules import register_module
from surgery.model.program import Attachment, Program, ValueSpec
from surgery.model.weights import Apply, Concat, Expr, Init, Reshape, cast
from surgery.passes.kinds import attach
from surgery.passes.kinds.calls import calls_of
from surgery.passes.kinds.widen import bias_of, resize_module
from surgery.passes.kinds.widen_path import plain_moves
from surgery.passes.operation import Resolved

MODULE_TAG = "surgery.packed"
aten = torch.ops.aten


class PackedModule(nn.Module):
    """What is left of a packed bottleneck: ``(inside, value) -> value + s (U f(inside) + u)``, ``inside [..., width]``."""

    edits = 1
    """Which argument is the value that passes through when the module is taken out."""
    folded = "its first product is packed into the one in front of it"
    """What a fold made of it, for the plan."""

    def __init__(self, method: Any, site: Any) -> None:
        super().__init__()
        self.method, self.site = method, site
        self.active = True
        for spec in method.tensors(site):
            if not spec.name.startswith("down_"):
                self.register_parameter(spec.name, nn.Parameter(torch.empty(spec.shape), requires_grad=False))

    def forward(self, inside: Tensor, value: Tensor) -> Tensor:
        if not self.active:
            return value
        return self.method.behind(self.site, self._parameters, inside, value, self.training)  # type: ignore[no-any-return]

    def surgery_events(self) -> tuple[Method, nn.Module]:
        """Who acts during training on whose behalf (see ``surgery.train``)."""
        return self.method, self

    def follow(self, around: Around) -> Follow | str:
        """A part of it is rows of another weight, which a cut of that weight does not know."""
        return "its first half is packed into the weight in front of it"

    def module_config(self) -> dict[str, Any]:
        from dataclasses import asdict

        return {"method": f"{self.method.verb}/{self.method.name}", "params": self.method.params(), "site": asdict(self.site)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedModule:
        from surgery.passes import registry
        from surgery.passes.kinds.insert import Stream

        verb, _, name = config["method"].partition("/")
        method = registry.get(verb, name)
        if not hasattr(method, "behind"):
            raise ValueError(f"{config['method']} is never packed")
        return cls(method(**config["params"]), Stream(**config["site"]))

    def extra_repr(self) -> str:
        return f"{self.method.verb} {self.method.name}, packed, {self.site.inp} -> {self.site.out}"


register_module(MODULE_TAG, PackedModule)


def pack(program: Program, a: Attachment, op: Resolved) -> str:
    """Fold ``a`` by packing; returns why that is not done (then nothing was changed), else an empty text."""
    module = program.module(a.module)
    if isinstance(module, PackedModule):
        return "its first product is packed already; its second one stays"
    found = _base(program, a, module)
    if isinstance(found, str):
        return found
    site, graph, base = found
    inp, out = (program.weights[site.weight].shape[axis] for axis in (site.in_axis, site.out_axis))
    if inp > out:
        return f"packed into the map in front of it, a unit of its first product would cost {inp:,} multiply-adds in place of {out:,}"
    _pack(program, a, op, site, graph, base)
    return ""


def _base(program: Program, a: Attachment, module: Any) -> tuple[Site, str, fx.Node] | str:
    """The linear map right in front of a bottleneck, its graph and call."""
    method, stream = module.method, module.site
    branch = getattr(method, "branch", lambda site: None)(stream)
    if stream.place != "after" or branch is None or not getattr(method, "residual", True) or not hasattr(method, "behind"):
        return f"only a plain {a.method.name} with its residual, behind a linear map, is packed into that map"
    node = program.node(a.node)
    gm = program.module(a.node.graph)
    value = node.args[0]
    while isinstance(value, fx.Node):
        moved = plain_moves(value, 1)
        if moved is not value:
            value = moved
        elif value.op == "call_module" and isinstance(gm.get_submodule(str(value.target)), (nn.Dropout, nn.Identity)):
            value = value.args[0]
        else:
            break
    sites = [s for s in program.anatomy.sites if not s.is_region and any(r.graph == a.node.graph and r.node == value.name for r in s.calls)]  # type: ignore[union-attr]
    site = sites[0] if len(sites) == 1 else None
    if site is None or site.op not in ("linear", "conv1d") or site.rows or len(site.calls) != 1:
        return "no linear map of its own stands right in front of it"
    if program.aliases.get(site.weight, site.weight) in program.aliases.values():
        return f"{site.weight} is shared with other parts"
    if any(b.site.weight == site.weight for b in program.attachments if b.site.weight):
        return "other adapters stand on the map in front of it; fold them first"
    graph, call = calls_of(program, site)[0]
    return site, graph, call


def _pack(program: Program, a: Attachment, op: Resolved, site: Site, graph: str, base: fx.Node) -> None:
    module = program.module(a.module)
    weights = program.weights
    weight, bias = weights[site.weight], bias_of(site)
    out, width = weight.shape[site.out_axis], module.method.branch(module.site)["width"]
    down, shift = (weights[attach.join(a.module, n)] for n in ("down_weight", "down_bias"))
    function = f"{a.method.verb}/{a.method.name}:through"
    shape = list(weight.shape)
    shape[site.out_axis] = width
    params = (("axis", site.out_axis),)
    old = weights.get(bias, Init((out,), weight.dtype, "zeros"))

    def put(name: str, first: Expr, more: Expr, axis: int) -> None:
        sizes = list(first.shape)
        sizes[axis] += width
        if name not in weights:
            program.frozen.add(name)
        weights[name] = Concat(tuple(sizes), first.dtype, (first, cast(more, first.dtype)), axis)
        program.journal.fold(name, a.origin, op.origin)

    column = Reshape((out, 1), old.dtype, old)
    moved = Apply((width, 1), old.dtype, function, (down, column, shift), (("axis", 0),))
    put(site.weight, weight, Apply(tuple(shape), weight.dtype, function, (down, weight), params), site.out_axis)
    put(bias, old, Reshape((width,), old.dtype, moved), 0)
    masked.reshape_mask(program, site.weight, lambda keep: _open(keep, width, site.out_axis))
    resize_module(program, site)
    stay = _tail(program, a, module)
    _rewire(program, a, graph, base, out, width)
    parent, _, leaf = a.module.rpartition(".")
    setattr(program.module(parent), leaf, stay)
    kept = tuple(n for n in a.tensors if not n.rpartition(".")[2].startswith("down_"))
    for name in a.tensors:
        if name not in kept:
            attach.drop_tensor(program, name)
    program.frozen |= {program.aliases.get(n, n) for n in kept}
    at = next(i for i, b in enumerate(program.attachments) if b is a)
    program.attachments[at] = replace(a, tensors=kept)
    attach.recompile_later(program.module(graph))
    program.touch()


def _open(keep: Expr, width: int, axis: int) -> Expr:
    """A mask of a weight that became longer: nothing of what was added is masked."""
    shape = list(keep.shape)
    shape[axis] = width
    more = Init(tuple(shape), "bool", "ones")
    shape[axis] += keep.shape[axis]
    return Concat(tuple(shape), "bool", (keep, more), axis)


def _tail(program: Program, a: Attachment, module: Any) -> PackedModule:
    """The second half, with the tensors that it has in the graph."""
    stay = PackedModule.__new__(PackedModule)
    nn.Module.__init__(stay)
    stay.method, stay.site, stay.active = module.method, module.site, True
    for name, parameter in module._parameters.items():
        if not name.startswith("down_"):
            stay.register_parameter(name, nn.Parameter(torch.empty_like(parameter), requires_grad=False))
    stay.train(module.training)
    return stay


def _rewire(program: Program, a: Attachment, graph: str, base: fx.Node, out: int, width: int) -> None:
    """The product gives both; its old users read the first part, the module's new input is the second one."""
    gm = program.module(graph)
    node = program.node(a.node)
    spec = base.meta["spec"]
    users = list(base.users)

    def part(start: int, stop: int) -> fx.Node:
        made = gm.graph.call_function(aten.slice.Tensor, (base, -1, start, stop))
        made.meta["spec"] = replace(spec, shape=(*spec.shape[:-1], stop - start))
        return made

    with gm.graph.inserting_after(base):
        inside = part(out, out + width)
    with gm.graph.inserting_after(base):
        whole = part(0, out)
    for user in users:
        user.replace_input_with(base, whole)
    base.meta["spec"] = ValueSpec(spec.kind, spec.dtype, (*spec.shape[:-1], out + width))
    value = node.args[0]
    assert isinstance(value, fx.Node)
    lead = value.meta["spec"].shape
    if len(lead) != len(spec.shape):  # the product runs on rows, the value has the model's axes
        sizes = next(n.args[1] for n in _moves(value, whole))
        with gm.graph.inserting_before(node):
            inside = gm.graph.call_function(aten.reshape.default, (inside, [*sizes[:-1], width]))  # type: ignore[index]
        inside.meta["spec"] = replace(value.meta["spec"], shape=(*lead[:-1], width))
    node.args = (inside, value)


def _moves(value: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The changes of shape between a product and the value that became of it."""
    found = []
    while value is not end:
        if plain_moves(value, 1) is not value:
            found.append(value)
        value = value.args[0]  # type: ignore[assignment]
    return found
