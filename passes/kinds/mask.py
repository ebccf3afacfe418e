"""Kind ``mask``: entries of a weight become zero and stay zero through adapters, folds and training.

A method says which entries go, in canonical form; this module owns the rest: slices, tied weights, earlier masks, adapters that
stand on the weight already, and the lazy expressions. What a mask is to a program stands in :mod:`surgery.model.masked`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.diagnostics import Diagnostic, Severity, error, fail
from surgery.core.method import Method
from surgery.core.plan import group_roles
from surgery.core.site import Site
from surgery.model import cost, masked
from surgery.model.program import Attachment, Program
from surgery.model.realise import held
from surgery.model.spill import spilled
from surgery.model.study_run import check_finite
from surgery.model.weights import Apply, Expr, Masked, Update
from surgery.passes.kinds import attach
from surgery.passes.kinds.calls import call_config, calls_of, ties_outside, weight_names, weight_of
from surgery.passes.kinds.delta import DeltaModule, chain
from surgery.passes.kinds.drop_choice import span_of
from surgery.passes.kinds.geometry import Geometry, geometry_of
from surgery.passes.kinds.parts import part_of, size_of, untie
from surgery.passes.operation import Resolved, SiteChange, predicted


@dataclass(frozen=True)
class MaskMethod(Method):
    """Base of the methods that mask single weights. All tensors are canonical (see :class:`Geometry`)."""

    kind: ClassVar[str] = "mask"
    fold_class: ClassVar[str] = "merge"
    identity: ClassVar[str] = "changed"

    @property
    def statistic(self) -> str:
        """What the choice needs to know of the site's inputs: nothing, their ``norms`` or their ``gram`` matrix."""
        return ""

    def stand_in(self) -> MaskMethod:
        """A method that drops as many entries and needs no data, for a plan."""
        return self

    def faults(self, site: Geometry) -> tuple[str, str] | None:
        """Message and help when the method cannot mask this site, else None."""
        return None

    def dropped(self, site: Geometry) -> int:
        """How many entries of the site go."""
        raise NotImplementedError

    def drop(self, site: Geometry, weight: Tensor, statistic: Tensor | None, gone: Tensor | None) -> Tensor:
        """Which entries go, as a bool tensor of the weight's shape; those that are ``gone`` already go first."""
        raise NotImplementedError

    def solve(self, site: Geometry, weight: Tensor, statistic: Tensor, gone: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Which entries go and the new values of the others, for methods that change those; None for methods that do not."""
        return None

    def advice(self) -> tuple[bool, str]:
        """Whether to warn that the mask makes nothing faster, and a line for the plan."""
        return False, ""


def keep(
    cls: type[MaskMethod],
    part: Tensor,
    *more: Tensor,
    site: Any,
    tensor: str = "",
    statistic: bool = False,
    old: bool = False,
    **params: Any,
) -> Tensor:
    """The function ``VERB/NAME:keep``: the mask of a stored weight (of the site's rows), from the weight, what is known of its inputs
    and the mask that it has already. Raises S0752 for a weight that is not finite."""
    geometry, rest = Geometry.of(site), list(more)
    known = rest.pop(0) if statistic else None
    before = geometry.to_canonical(rest.pop(0)) if old else None
    weight = geometry.to_canonical(part.double() if part.dtype == torch.float64 else part.float())
    check_finite(tensor, weight)
    stays = cls(**params).drop(geometry, weight, known, None if before is None else before.logical_not()).logical_not()
    return geometry.from_canonical(stays if before is None else stays & before).contiguous()


# ------------------------------------------------------------------ apply


@dataclass
class Target:
    """One site to be masked, with what was found out about it."""

    site: Site
    method: MaskMethod
    geometry: Geometry
    names: tuple[str, ...]
    note: str = ""
    added: int = 0
    standing: tuple[Attachment, ...] = ()
    """Adapters on this weight and no other."""


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Mask the weight of every site. While planning no weight and no data is read; lazy expressions choose when weights are realised.

    Raises S0274 without data that the score needs and S0275 with data that it does not read, S0460 for a pattern that does not fit, S0461 where there is no weight to mask, S0462 where
    a part of the weight is in an adapter and S0466 where a part is selected of what layers share. Warns with S0449 of weights of which nothing goes: they get no mask.
    """
    method = op.method
    assert isinstance(method, MaskMethod)
    _data_fits(op, method)
    targets, twins = _targets(program, op)
    idle = [t for t in targets if not t.method.dropped(t.geometry)]
    active = [t for t in targets if t not in idle] if idle else targets
    if idle:
        op.warn(_no_change(op, idle))
    if method.statistic:
        from surgery.passes.kinds.mask_data import check_visible, study_targets

        for target in active:
            check_visible(program, target, op)
    if method.statistic and op.study is not None:
        study_targets(program, op, active)
    else:
        for target in active:
            put(program, op, target)
        if method.statistic and active:
            op.tell("which weights go is decided by compile, from the data")
    masked.in_order(program)
    if active:
        _advise(program, op, method)
    changes = [_change(program, t) for t in targets]
    shared = {id(s): SiteChange(s.role, s.path, s.rows, note=f"its weight is masked with {role}") for s, role in twins}
    order = {t.site.role: c for t, c in zip(targets, changes, strict=True)}
    return [shared[id(s)] if id(s) in shared else order[s.role] for s in op.sites]


def _data_fits(op: Resolved, method: MaskMethod) -> None:
    score = getattr(method, "score", method.name)
    if method.statistic and op.data is None and not (op.statement is not None and op.statement.using):
        raise fail(
            "S0274", f"the score `{score}` is computed from data, and `{op.verb} {op.method.name}` has no `using`", span_of(op, "score"), "needs data",
            help='define data, `data text = lines("calib.txt")`, and write `using text`; magnitude and random need none',
        )  # fmt: skip
    if not method.statistic and op.statement is not None and op.statement.using:
        span = op.statement.using_span if op.statement.using_span.end else op.origin.span
        raise fail(
            "S0275", f"the score `{score}` reads no data", span, "nothing looks at this",
            help="leave `using` out, or choose by wanda or sparsegpt",
        )  # fmt: skip


def _targets(program: Program, op: Resolved) -> tuple[list[Target], list[tuple[Site, str]]]:
    """The sites to mask, each stored part once, and those that share one with an earlier site."""
    names_of: dict[str, dict[str, None]] = {}
    for site in op.sites:
        names = weight_names(program, site) if site.weight else ("",)
        names_of.setdefault(masked.first(program, names[0]), {}).update(dict.fromkeys(names))
    standing: dict[str, list[tuple[Attachment, set[str]]]] = {}
    for a in program.attachments:
        if a.method.kind == "delta":
            own = set(weight_names(program, a.site))
            for name in own:
                standing.setdefault(name, []).append((a, own))
    seen: dict[tuple[str, tuple[tuple[int, int], ...]], str] = {}
    targets, twins = [], []
    for site, method in zip(op.sites, op.methods, strict=True):
        assert isinstance(method, MaskMethod)
        target = _target(program, op, site, method, names_of, standing)
        key = masked.first(program, target.names[0]), target.geometry.rows
        if key in seen:
            twins.append((site, seen[key]))
            continue
        seen[key] = site.role
        targets.append(target)
    return targets, twins


def _target(
    program: Program, op: Resolved, site: Site, method: MaskMethod, names_of: dict[str, dict[str, None]],
    standing: dict[str, list[tuple[Attachment, set[str]]]],
) -> Target:  # fmt: skip
    span = op.origin.span
    calls = calls_of(program, site) if site.op in ("linear", "conv1d", "conv", "experts") and site.weight else []
    if not calls or site.op == "expert":
        what = "is a region, which has no weight of its own" if site.is_region else f"is of kind {site.op}, which is not masked"
        what = "is one expert of a tensor that is masked as a whole" if site.op == "expert" else what
        raise fail(
            "S0461", f"{site.role} {what}", span, "selected here",
            help=_instead(site),
        )  # fmt: skip
    names = tuple(names_of[masked.first(program, weight_names(program, site)[0])])
    weight = masked.first(program, names[0])
    geometry = geometry_of(site, program.weights[weight].shape, call_config(program, *calls[0]), span)
    fault = method.faults(geometry)
    if fault is not None:
        raise fail("S0460", f"{site.role}: {fault[0]}", span, "asked for here", help=fault[1])
    here = {a.module: (a, own) for n in names for a, own in standing.get(n, ())}
    for a, _ in here.values():
        module = program.module(a.module)
        if isinstance(module, DeltaModule) and module.method.rebase(module.site):
            raise fail(
                "S0462", f"a part of the weight of {site.role} is in the adapter {a.name}, so that its entries cannot be ranked", span,
                "masked here", also=[(a.origin.span, "the part was moved here")], help=f"put this statement in front of {a.name}, or fold it first",
            )  # fmt: skip
    target = Target(site, method, geometry, names, standing=tuple(a for a, own in here.values() if own <= set(names)))
    outside = ties_outside(program, names)
    if outside:
        shared = next((o for n in names for o in program.journal.of(n) if o.verb == "share"), None)
        if shared is not None:
            raise fail(
                "S0466", f"{site.role} shares its weight with parts that are not selected", span, "masked here",
                also=[(shared.span, "shared here")], help="select all layers that share it, or put this statement in front of the sharing",
            )  # fmt: skip
        untie(program, names)
        program.touch()
        target.added = size_of(program, names[0])
        target.note = f"{names[0]} is no longer tied, {target.added:,} parameters more"
    return target


def _instead(site: Site) -> str:
    """What can be masked in place of a site that cannot."""
    if site.op == "expert":
        every = site.role.replace(f".experts[{site.facts['expert']}].", ".experts.")
        return f"select the tensor of all experts: `{every}`"
    return "select linear, convolution or expert sites, for example `layers[*].attn.{q, k, v, o}, layers[*].ffn.{up, down}`"


def put(
    program: Program, op: Resolved, target: Target, statistic: Tensor | None = None, weight: Tensor | None = None, *, wire: bool = True
) -> None:
    """Mask one weight: lazily, or with ``weight`` (the stored tensor) by values that the method computes now. Without ``wire`` the
    adapters that stand on it are not told."""
    site, geometry, names = target.site, target.geometry, target.names
    method = target.method if statistic is not None or not target.method.statistic else target.method.stand_in()
    name = masked.first(program, names[0])
    source, old = program.weights[name], masked.mask_of(program, name)
    old_part = None if old is None else part_of(old, site, geometry)
    part = part_of(source, site, geometry)
    solved = (
        None if weight is None or statistic is None else _solve(method, geometry, name, geometry.select(weight), statistic, op, old_part)
    )
    if solved is None:
        args = [part, *(() if statistic is None else (held(statistic),)), *(() if old_part is None else (old_part,))]
        flags: list[tuple[str, Any]] = [("tensor", name), ("site", geometry.pairs())]
        flags += [("statistic", True)] if statistic is not None else []
        flags += [("old", True)] if old_part is not None else []
        params = method.params() | (
            {"seed": attach.seed_of(op.seed, op.name, name, str(geometry.rows))} if "seed" in method.params() else {}
        )
        pairs = (*((k, tuple(v) if isinstance(v, list) else v) for k, v in params.items()), *flags)
        stays: Expr = Apply(part.shape, "bool", f"{op.verb}/{op.method.name}:keep", tuple(args), pairs)
        value: Expr | None = None
    else:
        stays, new = spilled(solved[0]), spilled(solved[1].to(getattr(torch, source.dtype)))
        value = Update(source.shape, source.dtype, source, new, geometry.out_axis, geometry.rows) if geometry.rows else new
    whole = masked.spread(stays, old, source.shape, geometry.out_axis, geometry.rows)
    if value is None and isinstance(source, Masked) and source.keep is old:
        value = source.source  # the new mask is within the old one: one suffices
    masked.set_mask(program, names, whole, op.origin, value)
    program.journal.record(name, op.origin)
    if wire:
        put_under_mask(program, target)


def _solve(
    method: MaskMethod, geometry: Geometry, name: str, part: Tensor, statistic: Tensor, op: Resolved, old: Expr | None
) -> tuple[Tensor, Tensor] | None:
    """The stored mask and values of a site that the method solves for; None when it only chooses."""
    from surgery.model.realise import realise
    from surgery.passes import registry

    before = None if old is None else geometry.to_canonical(realise(old, functions=registry.function))
    weight = geometry.to_canonical(part.double() if part.dtype == torch.float64 else part.float())
    check_finite(name, weight, op.origin.span)
    found = method.solve(geometry, weight, statistic, None if before is None else before.logical_not())
    if found is None:
        return None
    stays = found[0].logical_not()
    stays = stays if before is None else stays & before
    return geometry.from_canonical(stays).contiguous(), geometry.from_canonical(found[1]).contiguous()


def put_under_mask(program: Program, target: Target) -> None:
    """The adapters that stand on the weight of a target respect its mask from here on."""
    modules: list[DeltaModule] = []
    for site in {a.site.role: a.site for a in target.standing}.values():
        for graph, base in calls_of(program, site):
            gm = program.module(graph)
            for node in list(chain(gm, base)):
                module = gm.get_submodule(str(node.target))
                if not module.masked:
                    local = attach.relative(masked.mask_name(weight_of(graph, base)), graph)
                    assert local is not None  # the mask stands where the weight stands
                    node.args = (*node.args, attach.get_attr(gm, local, base))
                    modules.append(module)
            attach.recompile_later(gm)
    for module in modules:
        module.masked = True


def _change(program: Program, target: Target) -> SiteChange:
    name = masked.first(program, target.names[0])
    shape = target.geometry.canonical
    count = target.method.dropped(target.geometry)
    notes = [f"{count} {'weight becomes' if count == 1 else 'weights become'} zero", target.note]
    trainable = 0 if name in program.frozen else torch.Size(shape).numel()
    site = target.site
    return SiteChange(site.role, site.path, site.rows, shape, shape, target.added, 0, trainable, "; ".join(filter(None, notes)))


def _no_change(op: Resolved, idle: Sequence[Target]) -> Diagnostic:
    roles = ", ".join(group_roles([t.site.role for t in idle])[:4])
    smallest = min(torch.Size(t.geometry.canonical).numel() for t in idle)
    return error(
        "S0449", f"no weight of `{roles}` becomes zero: the share is smaller than one weight", span_of(op, "ratio"), "too small",
        notes=[f"the smallest has {smallest:,} weights"], help="raise `ratio`, or leave these parts out", severity=Severity.WARNING,
    )  # fmt: skip


def _advise(program: Program, op: Resolved, method: MaskMethod) -> None:
    slow, line = method.advice()
    if line:
        op.tell(line)
    if slow:
        counted, size = cost.count(program), cost.bytes_of(program)
        op.warn(
            error(
                "S0463", "an unstructured mask makes nothing faster: dense kernels compute with its zeros", op.origin.span, "masked here",
                severity=Severity.WARNING, notes=[predicted(counted.per_token, counted.per_token, size, size, counted.unit)],
                help="to compute less, prune heads, ffn or channels; `pattern = \"2:4\"` suits sparse tensor cores",
            )
        )  # fmt: skip
