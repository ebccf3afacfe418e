"""Kind ``drop``: parts of a model are bypassed and leave it, whole layers or branches beside the residual stream.

What computes the rest, and what nothing reads any more, goes too: cache entries of the parts, inputs of a layer that only they
read, adapters on them. Layers are numbered anew, as deleting from a list of modules numbers them, and the config says how many
there are. The promise, measured before anything is written: the result equals the model before in which these parts are bypassed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from surgery.core.diagnostics import SurgeryError, fail
from surgery.core.method import Method
from surgery.core.near import quoted
from surgery.core.plan import group_roles, plural
from surgery.core.site import Site
from surgery.model.program import Gone, Program
from surgery.passes.kinds import attach
from surgery.passes.kinds.drop_choice import amount, choose
from surgery.passes.kinds.drop_extract import Extraction, is_layer
from surgery.passes.kinds.drop_oracle import Bypassed, bypass_claim
from surgery.passes.operation import Resolved, SiteChange
from surgery.passes.resolve import within


@dataclass(frozen=True)
class DropMethod(Method):
    """Base of the methods that take parts out. ``branches`` says whether parts of a layer may be selected,
    ``every`` whether all that is selected goes when no amount is given."""

    kind: ClassVar[str] = "drop"
    fold_class: ClassVar[str] = "slice"
    identity: ClassVar[str] = "changed"
    one_of: ClassVar[tuple[str, ...]] = ("count", "ratio", "keep")
    branches: ClassVar[bool] = False
    every: ClassVar[bool] = False


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Bypass what the statement chooses. Raises S0473 for what cannot be bypassed, S0474 for the last cache, S0475 for what is
    no such part, S0476 for impossible amounts, S0477 for what others need or would leave a stack empty, S0478 for what an
    earlier line shared or converted, S0493 below virtual tokens."""
    method = op.method
    assert isinstance(method, DropMethod)
    _are_parts(op, method)
    _no_virtual_tokens(program, op)
    gone = amount(op, method.every)
    open_ = [s for s in op.sites if not any(within(s.role, k.role) for k in op.keep)]
    if not open_:
        raise fail(
            "S0476", "`keep` holds back everything that is selected", op.origin.span, "nothing is left to drop", help="hold back less"
        )
    _untouched(program, op, open_)
    note, chosen = "", open_
    if gone is not None:
        free, held = _free(program, op, open_)
        if gone > len(free):
            raise fail(
                "S0476", f"{plural(gone, 'part')} should go, and only {len(free)} of {len(op.sites)} may", op.origin.span, "asks for too much",
                notes=held, help="ask for fewer, or select more",
            )  # fmt: skip
        chosen, note = choose(program, op, free, gone)
    _stacks_stay(program, op, chosen)
    chosen = [s for s in chosen if not any(s is not t and within(s.role, t.role) for t in chosen)]
    before = program.copy() if op.study is not None else None
    _remember(program, op, chosen)
    took = Extraction(program, op.origin.span)
    took.run([s for s in chosen if is_layer(s)], [s for s in chosen if not is_layer(s)])
    program.journal.record(_where(chosen), op.origin)
    if before is not None:
        bypassed = Bypassed(before, took.layers, took.branches)
        op.claim(bypass_claim(bypassed, program.copy(), took.inputs, took.outputs, op.origin.span))
    return _changes(chosen, took.removed, note)


def _remember(program: Program, op: Resolved, chosen: Sequence[Site]) -> None:
    """A later line that names a part of a layer which goes is told so. The place of a whole layer is taken by the next one."""
    layers, parts = [c for c in chosen if is_layer(c)], [c for c in chosen if not is_layer(c)]
    lost = {s.role: Gone(s, op.origin, "bypassed") for s in program.anatomy.sites if any(within(s.role, p.role) for p in parts)}
    program.gone = {role: g for role, g in (program.gone | lost).items() if not any(within(role, c.role) for c in layers)}


def _no_virtual_tokens(program: Program, op: Resolved) -> None:
    """What stands in front of the sequence has keys and values of every layer, which no part of one layer takes along."""
    a = next(
        (a for a in program.attachments if a.method.stands == "tokens" and not getattr(program.module(a.module), "in_rows", False)), None
    )
    if a is not None:
        raise fail(
            "S0493", f"{a.name} keeps keys and values of virtual tokens for every layer, so no part of a layer can go", op.origin.span,
            "dropped here", also=[(a.origin.span, f"{a.name} is put in front here")] if a.origin.span.source.text else (),
            help=f"write this line in front of `{a.origin.verb} {a.method.name}`",
        )  # fmt: skip


def _changes(chosen: Sequence[Site], removed: dict[str, int], note: str) -> list[SiteChange]:
    left = dict(removed)
    changes = []
    for i, site in enumerate(chosen):
        last = i == len(chosen) - 1
        own = set(site.parameters)
        mine = [n for n in left if last or n in own or (site.path and attach.inside(n, site.path))]
        changes.append(SiteChange(site.role, site.path, removed=sum(left.pop(n) for n in mine), note="" if i else note))
    return changes


def _where(chosen: Sequence[Site]) -> str:
    """The path under which the journal remembers that something went: the list of modules that a first part stood in."""
    return chosen[0].path.rpartition(".")[0] or chosen[0].stack


# ------------------------------------------------------------------ what may go


def _are_parts(op: Resolved, method: DropMethod) -> None:
    wrong = [s for s in op.sites if not (is_layer(s) or (method.branches and s.is_region and s.layer is not None))]
    if wrong:
        what = "layer, attention or feed-forward block" if method.branches else "whole layer"
        raise fail(
            "S0475", f"{quoted(group_roles([s.role for s in wrong])[:3], 'and')} is no {what}", op.origin.span, "selected here",
            help="select layers, as in `on layers[3..5]`" + (", or their blocks, as in `on layers[3..5].attn`" if method.branches else ""),
        )  # fmt: skip


def _untouched(program: Program, op: Resolved, sites: Sequence[Site]) -> None:
    """What a statement of the same spec shared or converted is not dropped: the order of the lines is wrong."""
    for site in sites:
        names = {*site.parameters}
        for key, origins in program.journal.entries.items():
            place = key.partition("::")[0]
            if place not in names and not (site.path and attach.inside(place, site.path)):
                continue
            for origin in origins:
                if origin.verb in ("share", "convert") and origin.span.end and origin.span.source is op.origin.span.source:
                    verb = {"share": "shared", "convert": "converted"}[origin.verb]
                    raise fail(
                        "S0478", f"{site.role} was {verb} by a line above, and would be dropped here", op.origin.span, "dropped here",
                        also=[(origin.span, f"{verb} here")], help=f"drop layers first: put this statement above the `{origin.verb}`",
                    )  # fmt: skip


def _free(program: Program, op: Resolved, sites: Sequence[Site]) -> tuple[list[Site], list[str]]:
    """The parts that can be bypassed one by one, and why the others cannot: a choice by score passes those over."""
    free, held = [], []
    for site in sites:
        try:
            took = Extraction(program, op.origin.span)
            took.plan([site] if is_layer(site) else [], [] if is_layer(site) else [site])
            free.append(site)
        except SurgeryError as why:
            held.append(why.diagnostics[0].message)
    return free, held


def _stacks_stay(program: Program, op: Resolved, chosen: Sequence[Site]) -> None:
    for stack in program.anatomy.stacks:
        gone = [s for s in chosen if s.stack == stack.name and is_layer(s)]
        if len(gone) == stack.layers:
            raise fail(
                "S0477", f"no layer would be left of `{stack.name}`", op.origin.span, f"drops {plural(len(gone), 'layer')} of {stack.layers}",
                help="keep at least one, for example with `keep " + f"{stack.name}[0]`",
            )  # fmt: skip
