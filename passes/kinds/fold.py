"""Kind ``fold``: put what was attached into the weights and take its modules out of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import ClassVar

import torch

from surgery.core.method import Method
from surgery.model.program import Attachment, Program
from surgery.passes.kinds import attach
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
    for a in chosen:
        key = weight_names(program, a.site) if a.method.kind == "delta" else (a.module,)
        groups.setdefault(key, []).append(a)
    for names, group in groups.items():
        kind = import_module(f"surgery.passes.kinds.{group[0].method.kind}")
        sizes = {a.module: _count(program, a) for a in group}
        tied = group[0].method.kind == "delta" and bool(ties_outside(program, names))
        reason = "" if hasattr(kind, "fold_attachments") else "its kind has no fold"
        if group[0].method.fold_class == "none":
            reason = f"{group[0].method.name} has no place in an existing weight"
        reason = reason or kind.fold_attachments(program, list(group), op) or ""
        for a in group:
            shape = a.site.shape
            note = f"{a.name} stays in the graph: {reason}" if reason else f"{a.name} folded"
            copied = 0
            if tied and not reason and a is group[0]:
                copied = torch.Size(program.weights[program.aliases.get(names[0], names[0])].shape).numel()
                note += f"; {names[0]} is no longer tied, {copied:,} parameters more"
            removed = 0 if reason else sizes[a.module]
            changes.append(SiteChange(a.site.role, a.site.path, a.site.rows, shape, shape, added=copied, removed=removed, note=note))
    program.touch()
    return changes


def _count(program: Program, a: Attachment) -> int:
    return sum(p.numel() for p in program.module(a.module).parameters())
