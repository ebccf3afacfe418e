"""Kind ``fold``: put what was attached into the weights and take its modules out of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import torch

from surgery.core.method import Method
from surgery.model import cost
from surgery.model.program import Attachment, Program
from surgery.passes.kinds import attach, tie_fold
from surgery.passes.kinds.calls import ties_outside, weight_names
from surgery.passes.operation import Resolved, SiteChange


@dataclass(frozen=True)
class FoldMethod(Method):
    """Base of the methods of the verb ``fold``."""

    kind: ClassVar[str] = "fold"
    identity: ClassVar[str] = "near"
    identity_bound: ClassVar[float] = 1e-5
    needs_sites: ClassVar[bool] = False


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Fold what the statement selects; what cannot fold stays in the graph and is reported with the reason.

    Folding where nothing is attached changes nothing, so a second fold is the same as one.
    """
    chosen = attach.attachments_of(program, op)
    changes: list[SiteChange] = []
    groups: dict[tuple[str, ...], list[Attachment]] = {}
    held: dict[str, str] = {}
    structural = False  # changes of weights leave the model's own structure, and what is known of it, as they are
    for a in chosen:
        if not any(b is a for b in program.attachments):
            continue  # folded with another that it is one with
        shared = tie_fold.shared_weight(program, a)
        common = tie_fold.common_adapters(program, shared, chosen) if shared else None
        if common is not None:
            structural = True
            _together(program, common, op, changes)
        elif shared:
            held[a.module] = tie_fold.refuse_or_reason(program, op, a, shared)
        if any(b is a for b in program.attachments):
            key = weight_names(program, a.site) if a.method.kind == "delta" else (a.module,)
            groups.setdefault(key, []).append(a)
    # changes of weights first: a weight that is to become wider takes none on top of it
    for names, group in sorted(groups.items(), key=lambda g: g[1][0].method.kind != "delta"):
        kind = import_module(f"surgery.passes.kinds.{group[0].method.kind}")
        sizes = {a.module: _count(program, a) for a in group}
        total = sum(sizes.values()) - cost.parameters(program) if group[0].method.kind == "insert" else 0
        tied = group[0].method.kind == "delta" and bool(ties_outside(program, names))
        structural |= tied or group[0].method.kind != "delta"
        reason = "" if hasattr(kind, "fold_attachments") else "its kind has no fold"
        if group[0].method.fold_class == "none":
            reason = f"{group[0].method.name} has no place in an existing weight"
        reason = reason or held.get(group[0].module, "")
        reason = reason or kind.fold_attachments(program, list(group), op) or ""
        for a in group:
            shape = a.site.shape
            note = f"{a.name} stays in the graph: {reason}" if reason else f"{a.name} folded"
            copied = 0
            if not reason and a.method.kind == "insert":
                copied = cost.parameters(program) + total  # what the model's own weights grew by, and what stays in another form
                if any(b.module == a.module for b in program.attachments):
                    note = f"{a.name} folded: {program.module(a.module).folded}"
            if tied and not reason and a is group[0]:
                copied = torch.Size(program.weights[program.aliases.get(names[0], names[0])].shape).numel()
                note += f"; {names[0]} is no longer tied, {copied:,} parameters more"
            removed = 0 if reason else sizes[a.module]
            changes.append(SiteChange(a.site.role, a.site.path, a.site.rows, shape, shape, added=copied, removed=removed, note=note))
    if structural:
        program.touch()
    return changes


def _together(program: Program, sets: list[list[Attachment]], op: Resolved, changes: list[SiteChange]) -> None:
    """Fold adapters that are one for all uses of a shared weight into that weight, which stays shared."""
    kind = import_module("surgery.passes.kinds.delta")
    if any(members[0].method.fold_class == "none" for members in sets):
        return
    before = {a.module: sum(p.numel() for p in program.module(a.module).parameters()) for members in sets for a in members[:1]}
    kind.fold_attachments(program, [members[0] for members in sets], op, tied=True)
    for members in sets:
        for a in members[1:]:
            attach.detach(program, a)
        for i, a in enumerate(members):
            note = f"{a.name} folded" if i == 0 else f"{a.name} folded with {members[0].site.role}"
            changes.append(
                SiteChange(a.site.role, a.site.path, a.site.rows, a.site.shape, a.site.shape, removed=before.get(a.module, 0), note=note)
            )


def _count(program: Program, a: Attachment) -> int:
    """Parameters of an attached module that nothing else holds: what several share goes with the last of them."""
    shared = {*program.aliases, *program.aliases.values()}
    parameters = program.module(a.module).named_parameters()
    return sum(p.numel() for leaf, p in parameters if (name := attach.join(a.module, leaf)) not in shared or not _others(program, name))


def _others(program: Program, name: str) -> bool:
    first = program.aliases.get(name, name)
    return name != first or first in program.aliases.values()
