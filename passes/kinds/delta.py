"""Kind ``delta``: a change of one weight, live as a module beside the weight or folded into it.

A method of this kind subclasses :class:`DeltaMethod` (or :class:`~surgery.passes.kinds.lowrank.LowRankMethod` when its change is
``s B K A``) and states tensors, change and count; this module owns everything else: nodes, names, seeds, slices, folding.

Meaning with several adapters on one site: each one's change is computed from the stored weight ``W`` alone and the changes
add up, ``W' = W + sum_i dW_i(W)``. So their order does not matter, DoRA's included. On a masked weight (see
:mod:`surgery.model.masked`) the changes stay off the zeros, ``W' = M * (W + sum_i dW_i(W))``, live and folded alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.core.diagnostics import fail
from surgery.core.method import Method
from surgery.core.site import Site
from surgery.model import masked
from surgery.model.byrows import Operand, Rows, by_rows
from surgery.model.cut_attached import Around, Follow
from surgery.model.flows import Parts, by_parts
from surgery.model.modules import register_module
from surgery.model.pieces import Pieces, by_pieces, whole
from surgery.model.program import Attachment, Program
from surgery.model.weights import Apply, Expr
from surgery.passes.kinds import attach, tie_fold
from surgery.passes.kinds.blocks import fold_by_rows, folded_rows, stored_parts
from surgery.passes.kinds.calls import call_config, calls_of, operand, weight_names, weight_of
from surgery.passes.kinds.delta_method import DeltaMethod, Tensors
from surgery.passes.kinds.follow import follow_delta
from surgery.passes.kinds.geometry import Geometry, geometry_of, take
from surgery.passes.kinds.parts import part_of, rewrite, size_of, untie
from surgery.passes.operation import Resolved, SiteChange

MODULE_TAG = "surgery.delta"

__all__ = ["DeltaMethod", "DeltaModule", "Tensors", "apply", "attach_one", "chain", "end_of_chain", "fold", "fold_attachments"]


class DeltaModule(nn.Module):
    """What stands in the graph: ``(x, out, *reads) -> out'``, or for expert tensors ``(stored, base) -> stored'``.

    On a masked weight the mask is one more argument.
    """

    edits: int
    """Which argument is the value that passes through when the module is taken out."""

    def __init__(self, method: DeltaMethod, site: Geometry, masked: bool = False) -> None:
        super().__init__()
        self._setup(method, site, masked)
        for spec in method.tensors(site):
            empty = torch.empty(spec.shape, dtype=attach.torch_dtype(spec.dtype or "float32"))
            if spec.buffer:
                self.register_buffer(spec.name, empty)
            else:
                self.register_parameter(spec.name, nn.Parameter(empty, requires_grad=spec.trainable))

    def _setup(self, method: DeltaMethod, site: Geometry, masked: bool) -> None:
        self.method = method
        self.site = site
        self.edits = 0 if site.op == "experts" else 1
        self.active = True
        self.masked = masked

    @classmethod
    def bare(cls, method: DeltaMethod, site: Geometry, masked: bool) -> DeltaModule:
        """Without tensors: the attaching pass adds them with their expressions."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._setup(method, site, masked)
        return module

    def tensors(self) -> dict[str, Tensor]:
        return {**self._parameters, **self._buffers}  # type: ignore[dict-item]

    def forward(self, x: Tensor, out: Tensor, *extra: Tensor) -> Tensor:
        site, method = self.site, self.method
        *extra, keep = extra if self.masked else (*extra, None)  # type: ignore[assignment]
        if site.op == "experts":
            if not self.active:
                return x
            changed = site.put(x, method.on_weight(site, self.tensors(), site.own(x), site.to_canonical(site.select(out))))
            return changed if keep is None else torch.where(keep, changed, x)
        if not self.active:
            return out
        more = dict(zip(method.reads, extra, strict=True))
        if "weight" in more:
            more["weight"] = site.to_canonical(site.select(more["weight"]))
        if site.rows and more.get("bias") is not None:
            more["bias"] = take(more["bias"], site.rows, 0)
        if keep is not None:
            keep = site.to_canonical(site.select(keep))
            return method.through_weight(site, self.tensors(), x, out, more, self.training, keep)
        return method.forward(site, self.tensors(), x, out, more, self.training)

    def with_base(self, x: Tensor, base: nn.Module) -> Tensor | None:
        """``self(x, base(x))`` in one step where the method has one for the pair, else None."""
        plain = self.active and not self.masked and not self.site.rows and self.site.op == "linear" and type(base) is nn.Linear
        return self.method.on_linear(self.site, self.tensors(), x, base.weight, base.bias, self.training) if plain else None  # type: ignore[arg-type,union-attr]

    def surgery_events(self) -> tuple[Method, nn.Module]:
        """Who acts during training on whose behalf (see ``surgery.train``)."""
        return self.method, self

    def follow(self, around: Around) -> Follow | str:
        """How the tensors follow when the site loses units (see :mod:`surgery.model.cut_attached`)."""
        return follow_delta(self.method, self.site, around)

    def module_config(self) -> dict[str, Any]:
        config = {"method": f"{self.method.verb}/{self.method.name}", "params": self.method.params(), "site": self.site.as_json()}
        return config | ({"masked": True} if self.masked else {})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> DeltaModule:
        from surgery.passes import registry

        verb, _, name = config["method"].partition("/")
        method = registry.get(verb, name)
        if not issubclass(method, DeltaMethod):
            raise ValueError(f"{config['method']} is not a method of kind delta")
        return cls(method(**config["params"]), Geometry.of(config["site"]), bool(config.get("masked", False)))

    def extra_repr(self) -> str:
        return f"{self.method.verb} {self.method.name}, {self.site.op} {self.site.inp} -> {self.site.out}"


register_module(MODULE_TAG, DeltaModule)


# ------------------------------------------------------------------ attach


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Attach the statement's method at every site. O(sites); no weight is read or copied."""
    attach.freeze_base(program)
    pool: dict[str, str] = {}
    touched: dict[str, fx.GraphModule] = {}
    changes = [attach_one(program, op, site, method, pool, touched) for site, method in zip(op.sites, op.methods, strict=True)]
    for gm in touched.values():
        attach.recompile_later(gm)
    return changes


def attach_one(
    program: Program, op: Resolved, site: Site, method: Method, pool: dict[str, str], touched: dict[str, fx.GraphModule]
) -> SiteChange:
    """Attaches ``method`` at one site under the names and seeds of ``op``; graphs that were changed go to ``touched``, to be compiled anew."""
    assert isinstance(method, DeltaMethod)
    calls = calls_of(program, site)
    if not site.weight or not calls:
        geometry_of(replace(site, op=site.op if site.op != "linear" else "param"), (), {}, op.origin.span)
    own_names = weight_names(program, site)
    weight_name = program.aliases.get(own_names[0], own_names[0])
    source = program.weights[weight_name]
    graph = calls[0][0]
    geometry = geometry_of(site, source.shape, call_config(program, graph, calls[0][1]), op.origin.span)
    why = method.check(geometry)
    if why:
        raise fail("S0271", f"{op.method.name} cannot stand at {site.role}: {why}", op.origin.span, "asked for here")
    rebase = method.rebase(geometry)
    note, copied = method.note(geometry), 0
    common = method.shared and weight_name in program.aliases.values()
    place = f"{weight_name} {geometry.rows}" + (f" {geometry.member}" if geometry.member >= 0 else "")
    again = common and place in pool
    if rebase:
        _refuse_rebase(program, op, site, own_names)
        if common:
            tie_fold.all_uses_selected(program, op, site, weight_name)
        elif untie(program, own_names):
            weight_name, copied = own_names[0], torch.Size(source.shape).numel()
            note = "; ".join(filter(None, (note, f"{own_names[0]} is no longer tied, {copied:,} parameters more")))

    module = DeltaModule.bare(method, geometry, masked.key_of(program, weight_name) is not None)
    parent, leaf = own_names[0].rpartition(".")[::2]
    if attach.relative(parent, graph) is None:
        parent = graph
    word = site.role.rpartition(".")[2].partition("[")[0]
    label = op.name if leaf == "weight" and not geometry.rows else f"{op.name}_{word}"
    label += f"_{geometry.member}" if geometry.member >= 0 else ""
    path = attach.join(parent, attach.free_name(attach.parent_module(program, parent), label))
    program.graph.add_submodule(path, module)

    params = (*_hashable(method.params()), ("site", geometry.pairs()))
    part = part_of(source, site, geometry)
    specs = method.tensors(geometry)
    if common:
        specs = tuple(replace(s, shared=f"{place} {s.name} {s.shared}") for s in specs)
        first_path = pool.setdefault(place, path)
        note = "; ".join(filter(None, (note, f"one with {first_path}" if again else "")))
    names, added, trainable = attach.add_tensors(
        program, module, path, specs, op,
        dtype=attach.adapter_dtype(source.dtype), source=part, params=params, pool=pool,
    )  # fmt: skip
    if rebase and not again:
        function, output = rebase
        new = Apply(part.shape, source.dtype, f"{op.verb}/{op.method.name}:{function}", (part,), _seeded(params, op, path), output)
        rewrite(program, weight_name, source, new, geometry)
        masked.keep_mask(program, weight_name)
        program.journal.record(weight_name, op.origin)
    first = None
    for graph, node in calls:
        made = _insert(program, graph, node, site, module, path, op)
        touched[graph] = program.module(graph)
        first = first or attach.node_ref(graph, made)
    assert first is not None
    program.journal.record(path, op.origin)
    program.attachments.append(Attachment(op.name, method, site, path, first, tuple(names), op.origin))
    own = 0 if weight_name in program.frozen else torch.Size(geometry.canonical).numel()
    own += 0 if not site.bias or site.bias in program.frozen else size_of(program, site.bias)
    shape = geometry.canonical
    return SiteChange(site.role, site.path, site.rows, shape, shape, added + copied, 0, trainable + own, note)


def _seeded(params: tuple[tuple[str, Any], ...], op: Resolved, path: str) -> tuple[tuple[str, Any], ...]:
    kept = tuple(p for p in params if p[0] != "seed")
    return (*kept, ("seed", attach.seed_of(op.seed, op.name, path)))


def _refuse_rebase(program: Program, op: Resolved, site: Site, names: tuple[str, ...]) -> None:
    for a in program.attachments:
        if a.method.kind == "delta" and _wants(a) and weight_names(program, a.site) == names and _meet(a.site, site):
            raise fail(
                "S0470", f"{op.method.name} rewrites the weight of {site.role}, on which {a.name} depends", op.origin.span, "rewritten here",
                also=[(a.origin.span, f"{a.name} reads this weight")], help=f"put this statement in front of {a.name}",
            )  # fmt: skip


def _wants(a: Attachment) -> bool:
    return isinstance(a.method, DeltaMethod) and a.method.wants_weight()


def _insert(program: Program, graph: str, base: fx.Node, site: Site, module: DeltaModule, path: str, op: Resolved) -> fx.Node:
    gm = program.module(graph)
    target = attach.relative(path, graph)
    if target is None:
        raise fail("S0571", f"{site.role} is used from {graph or 'the root'}, where {path} cannot be reached", op.origin.span)
    current = end_of_chain(gm, base)
    x = None if module.site.op == "experts" else operand(base)

    def read(name: str) -> fx.Node:
        local = attach.relative(name, graph)
        if local is None:
            raise fail("S0571", f"{site.role} is used from {graph or 'the root'}, where {name} cannot be reached", op.origin.span)
        return attach.get_attr(gm, local, base)

    def args() -> tuple[Any, ...]:
        name = weight_of(graph, base)
        mask = (read(masked.mask_name(name)),) if module.masked else ()
        if module.site.op == "experts":
            return (current, base, *mask)
        sources = {"weight": lambda: read(name), "bias": lambda: read(_spelt_in(program, site.bias, graph)), "base": lambda: base}
        return (x, current, *(None if r == "bias" and not site.bias else sources[r]() for r in module.method.reads), *mask)

    node = attach.call_after(program, graph, current, target, args)
    program.journal.record(attach.node_ref(graph, node), op.origin)
    return node


def _spelt_in(program: Program, name: str, graph: str) -> str:
    """The name that a tensor has in ``graph``: a shared one has another in each layer that uses it."""
    if attach.relative(name, graph) is not None:
        return name
    stored = program.aliases.get(name, name)
    return next((n for n, t in program.aliases.items() if t == stored and attach.relative(n, graph) is not None), name)


def end_of_chain(gm: fx.GraphModule, base: fx.Node) -> fx.Node:
    """The value that the rest of the graph reads as the site's output: behind all adapters that are already there."""
    return [base, *chain(gm, base)][-1]


def chain(gm: fx.GraphModule, base: fx.Node) -> Iterator[fx.Node]:
    """The calls of adapters on a value, in order."""
    current = base
    while True:
        for user in current.users:
            if user.op == "call_module":
                module = gm.get_submodule(str(user.target))
                if isinstance(module, DeltaModule) and user.args[module.edits] is current:
                    yield (current := user)
                    break
        else:
            return


def _hashable(params: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in params.items() if k not in ("seed", "shared"))


# ------------------------------------------------------------------ fold


def _rows(cls: type[DeltaMethod], current: Operand, *tensors: Operand, site: Any, base: bool = False, **params: Any) -> Rows | None:
    """What :func:`fold` gives, some rows at a time."""
    return None if base else folded_rows(cls(**params), Geometry.of(site), current, tensors)


def _parts(
    cls: type[DeltaMethod], current: Tensor | Pieces, *tensors: Tensor | Pieces, site: Any, base: bool = False, **params: Any
) -> Parts | None:
    """What :func:`fold` gives, in parts."""
    if base or not isinstance(current, Pieces):
        return None
    geometry, method = Geometry.of(site), cls(**params)
    wide = torch.float64 if current.dtype == torch.float64 else torch.float32
    t = {s.name: whole(v).to(wide) for s, v in zip(method.tensors(geometry), tensors, strict=True)}
    return stored_parts(method, geometry, t, current, wide)


@by_pieces
@by_parts(_parts)
@by_rows(_rows)
def fold(
    cls: type[DeltaMethod], current: Tensor | Pieces, *tensors: Tensor | Pieces, site: Any, base: bool = False, **params: Any
) -> Tensor:
    """The function ``VERB/NAME:fold``: the stored weight (of the site's rows) with the method's change in it.

    Computed in float32 (float64 for a float64 weight) and given back in that dtype: the one rounding is the caller's cast.
    With ``base`` the second tensor is the weight before other adapters were folded, from which this change is computed.
    """
    geometry = Geometry.of(site)
    method = cls(**params)
    wide = torch.float64 if current.dtype == torch.float64 else torch.float32
    rest = [whole(t) for t in tensors]
    origin = geometry.to_canonical(rest.pop(0).to(wide)) if base else None
    names = [s.name for s in method.tensors(geometry)]
    t = {n: v.to(wide) for n, v in zip(names, rest, strict=True)}
    if origin is None and (done := fold_by_rows(method, geometry, t, current, wide)) is not None:
        return done
    weight = geometry.to_canonical(whole(current).to(wide))
    folded = method.fold(geometry, t, weight) if origin is None else weight + method.delta(geometry, t, origin)
    return geometry.from_canonical(folded).contiguous()


def fold_attachments(program: Program, group: list[Attachment], op: Resolved, *, tied: bool = False) -> None:
    """Fold all of ``group`` (attachments on one stored weight, in the order of attaching) and take their modules out.

    A weight with other names is untied first; ``tied`` leaves it shared, for a change that is meant for all its uses.
    Raises S0471 when an adapter that stays reads the weight that would change.
    """
    names = weight_names(program, group[0].site)
    for a in program.attachments:
        if a not in group and _wants(a) and weight_names(program, a.site) == names and _overlap(a, group):
            raise fail(
                "S0471", f"folding {group[0].name} changes the weight of {a.site.role}, on which {a.name} depends", op.origin.span,
                "folded here", also=[(a.origin.span, f"{a.name} reads this weight")], help=f"fold {a.name} in the same statement",
            )  # fmt: skip
    if not tied:
        untie(program, names)
    name = program.aliases.get(names[0], names[0])
    before = program.weights[name]
    for a in group:
        module = program.module(a.module)
        assert isinstance(module, DeltaModule)
        geometry, method = module.site, module.method
        source = program.weights[name]
        part = part_of(source, a.site, geometry)
        inputs: list[Expr] = [part]
        flags: tuple[tuple[str, Any], ...] = ()
        if method.wants_weight() and source is not before:
            inputs.append(part_of(before, a.site, geometry))
            flags = (("base", True),)
        inputs += [program.weights[program.aliases.get(n, n)] for n in a.tensors]
        params = (*_hashable(method.params()), *flags, ("site", geometry.pairs()))
        new = Apply(part.shape, part.dtype, f"{method.verb}/{method.name}:fold", tuple(inputs), params)
        rewrite(program, name, source, new, geometry)
        program.journal.fold(name, a.origin, op.origin)
        attach.detach(program, a)
    masked.keep_mask(program, name)


def _overlap(a: Attachment, group: list[Attachment]) -> bool:
    mine = a.site.rows
    return any(
        _meet(a.site, b.site) and (not mine or not b.site.rows or any(x < d and c < y for x, y in mine for c, d in b.site.rows))
        for b in group
    )


def _meet(left: Site, right: Site) -> bool:
    """Whether two sites of one expert tensor have an expert in common."""
    return not (left.op == right.op == "expert" and left.facts["expert"] != right.facts["expert"])
