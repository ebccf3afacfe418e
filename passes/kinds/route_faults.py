"""What cannot become experts, and the errors that say why."""

from __future__ import annotations

from typing import Any

from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.plan import group_roles
from surgery.core.site import Site
from surgery.model.masked import masks
from surgery.model.program import Program
from surgery.passes.gone import short
from surgery.passes.operation import Resolved


def check(program: Program, op: Resolved) -> None:
    """Raises for a statement that cannot be applied, before anything is changed."""
    _blocks(program, op)
    _adapted(program, op)
    _masked(program, op)
    _sizes(op)
    _data(op)


def _data(op: Resolved) -> None:
    using = op.statement.using if op.statement is not None else ""
    method: Any = op.method
    if method.wants_data and not using:
        raise fail(
            "S0415", "routers that start from data need data", op.origin.span, "`init = data` without `using`",
            help='define data, `data text = lines("calib.txt")`, and write `using text`; or leave `init` out',
        )  # fmt: skip
    if using and not method.reads_data:
        raise fail(
            "S0420", f"routers that start from {method.init} look at no data", op.origin.span, f"`init = {method.init}` with `using {using}`",
            help="leave `using` out, or `init`",
        )  # fmt: skip


def _blocks(program: Program, op: Resolved) -> None:
    """Only whole feed-forward blocks that are dense yet."""
    roles = {s.role for s in program.anatomy.sites}
    for site in op.sites:
        if f"{site.role}.experts" in roles or ".experts" in site.role:
            raise _twice(program, op, site)
        if not site.is_region or f"{site.role}.up" not in roles or f"{site.role}.down" not in roles:
            blocks = [s.role for s in program.anatomy.sites if s.is_region and f"{s.role}.up" in roles and f"{s.role}.down" in roles]
            known = ", ".join(f"`{r}`" for r in group_roles(blocks))
            raise fail(
                "S0414", f"{site.role} is no feed-forward block", op.origin.span, "experts are made of a whole block: up, activation, down",
                help=f"select the block: {known}" if blocks else "this model has no feed-forward block that is dense: see `surgery show`",
            )  # fmt: skip


def _twice(program: Program, op: Resolved, site: Site) -> SurgeryError:
    inside = [s for s in program.anatomy.sites if s.role.startswith(f"{site.role}.") and s.weight] or [site]
    made = [o for s in inside for o in program.journal.of(s.weight) if o.verb == "convert"]
    also = [(made[-1].span, f"made of a dense block by `convert {made[-1].method}` here")] if made else []
    return fail(
        "S0412", f"{site.role} has experts already", op.origin.span, "converted again here" if made else "selected here", also=also,
        help="`prune experts` takes experts away; convert only blocks that are dense",
    )  # fmt: skip


def _adapted(program: Program, op: Resolved) -> None:
    """An adapter on a projection has no place in experts: which of them would it be on?"""
    for site in op.sites:
        inside = [a for a in program.attachments if a.site.role == site.role or a.site.role.startswith(f"{site.role}.")]
        if not inside:
            continue
        first = inside[0]
        selector = op.statement.selectors[0].span if op.statement is not None and op.statement.selectors else op.origin.span
        roles = short([a.site.role for a in inside if a.name == first.name])
        raise fail(
            "S0409", f"{site.role} carries `{first.name}`, which would lose its place", selector, f"selects {site.role}",
            also=[(op.origin.span, "the block becomes experts here"), (first.origin.span, f"`{first.name}` was put on {roles} here")],
            help=f"convert first and adapt the experts: put this statement in front, then `on @{op.name}.experts[*].{{up, down}}`",
        )  # fmt: skip


def _masked(program: Program, op: Resolved) -> None:
    """A mask is of one weight; the experts' weights are others."""
    held = masks(program)
    for site in op.sites:
        for name in site.parameters:
            if program.aliases.get(name, name) in held:
                made = program.journal.of(held[program.aliases.get(name, name)])
                raise fail(
                    "S0419", f"weights of {site.role} are masked, and experts would not keep the zeros", op.origin.span, "converted here",
                    also=[(made[0].span, "masked here")] if made else [], help="convert first, then mask the experts",
                )  # fmt: skip


def few_tokens(op: Resolved, site: str, found: int, needed: int) -> SurgeryError:
    return fail(
        "S0418", f"the data has {found} tokens, too few to start a router of {needed} experts", op.origin.span, f"{site} sees no more",
        help="give longer or more samples, or another `init`",
    )  # fmt: skip


def _sizes(op: Resolved) -> None:
    for site, method in zip(op.sites, op.methods, strict=True):
        experts, top_k, capacity = (getattr(method, n) for n in ("experts", "top_k", "capacity"))
        if top_k > experts:
            raise fail(
                "S0410", f"a token cannot go to {top_k} of {experts} expert{'' if experts == 1 else 's'}", op.origin.span, f"{site.role}: top_k = {top_k}, experts = {experts}",
                help=f"write `top_k` from 1 to {experts}, or more `experts`",
            )  # fmt: skip
        if capacity and not 1 <= capacity:
            raise fail(
                "S0413", f"a capacity of {capacity:g} drops tokens even when all experts get the same number", op.origin.span, "below 1",
                help="write 1 or more (WideNet: 1.2), or leave `capacity` out to drop none",
            )  # fmt: skip


def indivisible(op: Resolved, site: Site, method: Any, width: int) -> SurgeryError:
    near = sorted((n for n in range(1, width + 1) if width % n == 0 and n >= method.top_k), key=lambda n: (abs(n - method.experts), n))[:2]
    return fail(
        "S0411", f"{width} units cannot be divided into {method.experts} equal experts", op.origin.span, f"{site.role} is {width} wide",
        help=f"write {' or '.join(str(n) for n in sorted(near))} experts, or `split = upcycle`, where every expert is a copy of the whole block",
    )  # fmt: skip


def not_plain(op: Resolved, site: Site, why: str) -> SurgeryError:
    return fail(
        "S0416", f"{site.role} cannot become experts: {why}", op.origin.span, "selected here",
        help="experts are made of blocks of two or three linear projections with elementwise functions between",
    )  # fmt: skip


def unequal(op: Resolved, site: Site, other: Site) -> SurgeryError:
    return fail(
        "S0417", f"{site.role} shares its weights with {other.role}, which became other experts", op.origin.span, "converted here",
        help="give layers that share one block the same `experts` and `top_k`",
    )  # fmt: skip


def converted(program: Program, op: Resolved) -> None:
    """The analysis must find experts where they were made: everything later rests on it."""
    roles = {s.role for s in program.anatomy.sites}
    lost = [s.role for s in op.sites if f"{s.role}.experts" not in roles]
    if lost:
        raise fail(
            "S0902", f"the experts of {', '.join(group_roles(lost))} are not found in the graph", op.origin.span, "made here", exit_code=2,
            help="this is a fault of surgery: please report it with the spec and the model's config",
        )  # fmt: skip
