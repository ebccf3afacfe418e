"""Folding on behalf of an output: which attachments go into the weights and which an `emit` keeps as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from surgery.core.diagnostics import fail
from surgery.core.near import suggestion
from surgery.core.source import Span
from surgery.model.live import Tensors
from surgery.model.program import Attachment, Origin, Program
from surgery.model.threads import one_thread
from surgery.model.weights import DTYPE_BYTES, Cast, Expr, Init, is_float
from surgery.passes import registry
from surgery.passes.kinds import delta_probe, tie_fold
from surgery.passes.kinds.calls import weight_names
from surgery.passes.kinds.delta_method import DeltaMethod
from surgery.passes.operation import Resolved, SiteChange
from surgery.session import apply


def named_by(a: Attachment, keep: frozenset[str]) -> bool:
    """Whether ``keep`` names an attachment: by its label (``as`` name, else the method's), by the path of its module, or by a path around it."""
    return a.name in keep or any(a.module == name or a.module.startswith(name + ".") for name in keep if name)


def live_names(live: Any) -> frozenset[str]:
    """The names in a ``live`` parameter: ``@news`` and ``news`` are one. None where it says true or false for all."""
    return frozenset(str(name).removeprefix("@") for name in live) if isinstance(live, list | tuple) else frozenset()


def refuse_unknown(program: Program, live: Any, span: Span) -> None:
    """S0870 when ``live`` names something that no statement attached, or that was folded or removed since."""
    known = {a.name: None for a in program.attachments} | {a.module: None for a in program.attachments}
    for name in unknown_names(program, live_names(live)):
        help, notes = suggestion(name, known, "attached to the model here")
        help.append("`live` takes names that `as` gave, names of methods, and paths of modules; what is folded above is gone")
        raise fail(
            "S0870", f"`live` names `{name}`, and nothing of this name is attached to the model", span, "named here", help=help, notes=notes
        )


def live_modules(program: Program, live: Any) -> frozenset[str]:
    """The modules of a program, folded for an output, that ``live`` asks to keep: all of them for true."""
    names = live_names(live)
    return frozenset(a.module for a in program.attachments if live is True or named_by(a, names))


def unknown_names(program: Program, keep: frozenset[str]) -> list[str]:
    """The names of ``keep`` that name no attachment, sorted."""
    return sorted(name for name in keep if not any(named_by(a, frozenset({name})) for a in program.attachments))


def kept(program: Program, keep: frozenset[str]) -> dict[str, str]:
    """The modules that stay when ``keep`` is asked for, each with the reason.

    Besides those that are named these are adapters that are one tensor with a named one, and those on a weight that a named
    adapter reads: folding them would change what the named one computes (DoRA's norm of the weight is of the stored one).
    """
    found = {a.module: "asked to stay live" for a in program.attachments if named_by(a, keep)}
    held = [a for a in program.attachments if a.module in found]
    tensors = {program.aliases.get(t, t) for a in held for t in a.tensors}
    read = {_weight(program, a) for a in held if isinstance(a.method, DeltaMethod) and a.method.wants_weight()}
    for a in program.attachments:
        if a.module in found:
            continue
        if any(program.aliases.get(t, t) in tensors for t in a.tensors):
            found[a.module] = "is one with an adapter that stays live"
        elif a.method.kind == "delta" and _weight(program, a) in read:
            found[a.module] = "an adapter that stays live reads its weight"
        elif tie_fold.shared_weight(program, a) and any(
            b.method.kind == "delta" and _weight(program, b) == _weight(program, a) for b in held
        ):
            found[a.module] = "layers share its weight, on which an adapter stays live"
    return found


def _weight(program: Program, a: Attachment) -> str:
    """The stored name of the weight that an adapter changes; its own module's path for what changes none."""
    if a.method.kind != "delta":
        return a.module
    name = weight_names(program, a.site)[0]
    return program.aliases.get(name, name)


def fold_all(program: Program, origin: Origin, keep: frozenset[str] = frozenset()) -> list[SiteChange]:
    """Folds every attachment whose method can, except what ``keep`` names (see :func:`named_by`) and what has to stay with it.

    Returns what became of each, those that stay with the reason. A name that is not there keeps nothing: see :func:`unknown_names`.
    """
    stay = kept(program, keep)
    left = [_change(a, f"{a.name} stays in the graph: {stay[a.module]}") for a in program.attachments if a.module in stay]
    chosen = [a for a in program.attachments if a.module not in stay]
    if not chosen:
        return left
    sites = tuple(
        replace(a.site, role=f"{a.site.role}.{a.name}", op="attachment", path=a.module, weight="", bias="", parameters=a.tensors)
        for a in chosen
    )
    method = registry.get("fold", "all")()
    op = Resolved(verb="fold", name="all", place="on", sites=sites, methods=(method,) * len(sites), origin=origin)
    return [*apply(program, op), *left]


def staying(program: Program, changes: Iterable[SiteChange], keep: frozenset[str], said: set[str]) -> tuple[str, ...]:
    """Lines on what stays when an output folds all that can fold, one for each reason. ``changes`` are what :func:`fold_all` says of a copy of
    the program; ``keep`` was asked for, ``said`` are modules of which another line speaks."""
    told = {a.module: a for a in program.attachments}
    counts: dict[tuple[str, str], int] = {}
    quiet = said | {a.module for a in told.values() if named_by(a, keep)}
    roles = {(a.name, a.site.role) for a in told.values() if a.module in quiet}
    for change in changes:
        name, _, reason = change.note.partition(" stays in the graph: ")
        if reason and (name, change.role) not in roles:
            counts[name, reason] = counts.get((name, reason), 0) + 1
    return tuple(f"{n} x {name} stay{'s' if n == 1 else ''} in the graph: {reason}" for (name, reason), n in counts.items())


def _change(a: Attachment, note: str) -> SiteChange:
    return SiteChange(a.site.role, a.site.path, a.site.rows, a.site.shape, a.site.shape, note=note)


def stir(program: Program) -> Program:
    """The same program with attachments that do something: tensors that start at zero get small seeded values. It has the graph of
    ``program``: copy it before changing its structure.

    A fresh adapter adds nothing, so that folding it would prove nothing; one that was trained is left as it is.
    """
    weights = type(program.weights)(program.weights)
    for name in sorted({program.aliases.get(t, t) for a in program.attachments for t in a.tensors}):
        expr = weights[name]
        if isinstance(expr, Init) and expr.kind == "zeros":
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
            weights[name] = Init(expr.shape, expr.dtype, "normal", (0.0, 0.02), seed)
    return replace(program, weights=weights)


def widened(program: Program) -> Program:
    """The same program with half-precision tensors computed in float32. It has the graph of ``program``: copy it before changing its structure.

    Folding it shows whether the folded weights are the right numbers. In the program itself they are these numbers rounded once to the stored
    type, and what rounding does to the outputs of a whole model says nothing about the fold.
    """
    weights = type(program.weights)(program.weights)
    for name, expr in program.weights.items():
        if is_float(expr.dtype) and DTYPE_BYTES[expr.dtype] < 4:
            weights[name] = Cast(expr.shape, "float32", expr)
    return replace(program, weights=weights)


def probed(
    program: Program, before: Program, ready: Program, again: Callable[[], Program], tensors: Tensors
) -> list[tuple[Tensor, Tensor]] | None:
    """What some weights of each kind that folded give, before and after; None where that cannot be said weight by weight.

    ``program`` was folded into ``ready``, which is written, and ``before`` is ``program`` in float32, stirred. Compared are the expressions of ``ready``
    themselves, in float32; where they hold what is none of the program's, those of ``again()``, which folds ``before``.
    """
    left = {a.module for a in ready.attachments}
    found = delta_probe.probes(program, [a for a in program.attachments if a.module not in left])
    if not found:
        return None
    try:
        wide = Widening(program, before)
        sites = [site.mapped(wide) for site in delta_probe.sites(ready, found)]
    except LookupError:
        sites = delta_probe.sites(again(), found)
    with one_thread():
        return list(zip(delta_probe.computed(delta_probe.sites(before, found), tensors), delta_probe.computed(sites, tensors), strict=True))


class Widening:
    """Expressions of ``folded``, a program in which attachments of ``program`` were folded, as folding ``widened`` gives them: a program with the
    names of ``program`` whose half-precision tensors are computed in float32.

    What a fold makes is an expression over the tensors of the program that it folds. These are replaced, and what stands on top of them is
    computed in float32, so that nothing has to be folded once more. :class:`LookupError` where a stored half-precision tensor is none of the program's.
    """

    def __init__(self, program: Program, widened: Program) -> None:
        self._made: dict[int, Expr] = {}
        self._held = list(program.weights.values())  # of whose identities the table is
        for name, expr in program.weights.items():
            wide = widened.weights[name]
            known = self._made.setdefault(id(expr), wide)
            if known is not wide and known.identity != wide.identity:
                raise LookupError(name)  # one expression under two names, of which only one was stirred

    def __call__(self, expr: Expr) -> Expr:
        known = self._made.get(id(expr))
        if known is not None:
            return known
        half = is_float(expr.dtype) and DTYPE_BYTES[expr.dtype] < 4
        if not expr.inputs:
            if half:
                raise LookupError(type(expr).__name__)
            return expr
        changed: dict[str, Any] = {"dtype": "float32"} if half else {}
        for f in fields(expr):
            value = getattr(expr, f.name)
            if isinstance(value, Expr):
                changed[f.name] = self(value)
            elif isinstance(value, tuple) and value and all(isinstance(v, Expr) for v in value):
                changed[f.name] = tuple(self(v) for v in value)
        made = replace(expr, **changed)
        self._made[id(expr)] = made
        self._held.append(expr)
        return made
