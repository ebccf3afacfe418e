"""Adapters on weights that layers share: when they fold for all layers at once, and when folding would undo the sharing."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.core.diagnostics import fail
from surgery.core.near import quoted
from surgery.core.plan import group_roles
from surgery.core.site import Site
from surgery.model.program import Attachment, Program
from surgery.passes.kinds.calls import ties_outside, weight_names
from surgery.passes.operation import Resolved


def shared_weight(program: Program, a: Attachment) -> str:
    """The first name of the weight that an adapter stands on, if a statement let layers share it; else an empty text."""
    if a.method.kind != "delta":
        return ""
    names = weight_names(program, a.site)
    first = program.aliases.get(names[0], names[0])
    said = any(o.verb == "share" for n in (first, *names) for o in program.journal.of(n))
    return first if said and ties_outside(program, names) else ""


def uses_of(program: Program, first: str) -> set[str]:
    """All names of a shared weight."""
    return {first, *(k for k, v in program.aliases.items() if v == first)}


def common_adapters(program: Program, first: str, chosen: Sequence[Attachment]) -> list[list[Attachment]] | None:
    """The adapters on a shared weight, those that are one together, if every use of the weight has each of them and all are chosen.

    None where some layer has an adapter of its own, or none: then there is no one change for all.
    """
    here = [a for a in program.attachments if a.method.kind == "delta" and shared_weight(program, a) == first]
    if any(a not in chosen for a in here):
        return None
    sets: dict[tuple[object, ...], list[Attachment]] = {}
    for a in here:
        tensors = tuple(program.aliases.get(t, t) for t in a.tensors)
        sets.setdefault((tensors, a.site.rows), []).append(a)
    uses = uses_of(program, first)
    for members in sets.values():
        if {n for a in members for n in weight_names(program, a.site)} != uses:
            return None
    return list(sets.values())


def stay_live(program: Program) -> list[Attachment]:
    """The adapters that an output which folds will keep as they are, because layers share the weights that they change."""
    found = []
    for a in program.attachments:
        first = shared_weight(program, a)
        if first and common_adapters(program, first, program.attachments) is None:
            found.append(a)
    return found


def refuse_or_reason(program: Program, op: Resolved, a: Attachment, first: str) -> str:
    """Why a layer's own adapter does not fold into a shared weight: the reason for a fold that an output asks for.

    Raises S0489 for a ``fold`` statement: it cannot mean this.
    """
    others = sorted(uses_of(program, first) - set(weight_names(program, a.site)))
    roles = [s.role for s in program.anatomy.sites if s.weight == first and s.role != a.site.role and s.rows == a.site.rows]
    told = quoted(group_roles(roles)[:3], "and") if roles else others[0]
    if op.origin.verb == "emit":
        return f"its weight is shared with {told}, and folding would undo that"
    origin = next((o for n in (first, *others) for o in reversed(program.journal.of(n)) if o.verb == "share"), None)
    raise fail(
        "S0489", f"{a.name} of {a.site.role} changes a weight that it shares with {told}", op.origin.span, "folded here",
        also=[(origin.span, "shared here")] if origin is not None and origin.span.end else (),
        help=[
            "leave it live: fold other parts only; outputs that fold keep it, too",
            f"or write `{a.origin.verb} {a.method.name}(shared = true)` on all layers that share: one adapter for all of them folds",
        ],
    )  # fmt: skip


def all_uses_selected(program: Program, op: Resolved, site: Site, first: str) -> None:
    """A method that rewrites a shared weight for all its uses has to stand on all of them. Raises S0489."""
    selected = {n for s in op.sites if s.weight and s.rows == site.rows for n in weight_names(program, s)}
    left = sorted(n for n in uses_of(program, first) - selected if ties_outside(program, (first,)))
    if left:
        raise fail(
            "S0489", f"{op.method.name} rewrites the weight of {site.role}, which {left[0]} shares and which is not selected", op.origin.span,
            "rewritten here", help="select every layer that shares the weight, or leave `shared = true` out",
        )  # fmt: skip
