"""Kind ``tie``: layers share parameters. A shared parameter is one tensor of the program under several names.

Every layer keeps its own graph and its own place; what they share stands once in weights, counts, files and exports, its gradient
is the sum over the layers. What a statement of this kind promises is measured: each layer computes with the stated weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from surgery.core.diagnostics import fail
from surgery.core.method import Method
from surgery.core.near import near, quoted
from surgery.core.plan import plural
from surgery.core.roles import split_role
from surgery.core.site import Site
from surgery.model import masked
from surgery.model.claims import Claim
from surgery.model.program import Origin, Program
from surgery.model.running import outputs_of
from surgery.model.weights import Add, Cast, Expr, Scale, cast
from surgery.passes.kinds import attach
from surgery.passes.kinds.drop_choice import span_of
from surgery.passes.kinds.state import norm_parameters
from surgery.passes.kinds.tie_groups import grouped, one_stack
from surgery.passes.operation import Resolved, SiteChange


@dataclass(frozen=True)
class TieMethod(Method):
    """Base of the methods that let layers share. Fields ``groups``, ``order`` and ``weights`` are read by the kind."""

    kind: ClassVar[str] = "tie"
    fold_class: ClassVar[str] = "none"
    identity: ClassVar[str] = "changed"


def apply(program: Program, op: Resolved) -> list[SiteChange]:
    """Let the groups of the statement share. Raises S0475, S0480 to S0482 for the selection and its groups, S0483 for layers
    that differ, S0484 for shapes that differ, S0485 for what is shared already, S0486 for adapters, S0487 for masks,
    S0488 for a part to keep that is not there."""
    layers = one_stack(op)
    away = {s.role for s in op.keep}
    groups = grouped(op, [s for s in layers if s.role not in away])
    own = {s.role: _parameters(program, op, s) for s in layers}
    kept = _kept(program, op, layers, own)
    notes: dict[str, list[str]] = {s.role: [] for s in layers}
    plans = [(group, _common(program, op, group, own, kept, notes)) for group in groups]
    for group, names in plans:
        _agree(program, op, group, names, own)
    before = program.copy() if op.study is not None else None
    stated: dict[str, Expr] = {}
    removed = dict.fromkeys(own, 0)
    for group, names in plans:
        for name in names:
            members = [own[s.role][name] for s in group]
            expr = _weights(program, op, members)
            stated |= dict.fromkeys(members, expr)
            size = math.prod(expr.shape)
            for site, member in list(zip(group, members, strict=True))[1:]:
                removed[site.role] += size if member in program.weights else 0
            if _tie(program, op, members, expr):
                notes[group[0].role].append(f"{members[0]} trains, as it did in some of these layers")
        notes[group[0].role].insert(0, f"{' = '.join(s.role for s in group)}: {plural(len(names), 'shared tensor')}")
    program.touch()
    if before is not None:
        op.claim(_claim(before, stated, program.copy(), op))
    return [
        SiteChange(s.role, s.path, removed=removed[s.role], note="; ".join(notes[s.role])) for g in groups for s in g
    ]  # fmt: skip


# ------------------------------------------------------------------ what is shared


def _parameters(program: Program, op: Resolved, site: Site) -> dict[str, str]:
    """Parameters inside a layer, by their name inside it; what methods attached stays the layer's own."""
    module = attach.parent_module(program, site.path) if site.path else None
    if module is None:
        raise fail(
            "S0483", f"{site.role} is no module of its own, so it has no names to share", op.origin.span, "selected here",
            help="put each layer into one module",
        )  # fmt: skip
    added = {t for a in program.attachments for t in a.tensors}
    return {
        n: full for n, _ in module.named_parameters(remove_duplicate=False) if (full := attach.join(site.path, n)) not in added
    }  # fmt: skip


def _kept(program: Program, op: Resolved, layers: Sequence[Site], own: dict[str, dict[str, str]]) -> set[str]:
    """The names inside a layer of what ``keep own PART`` keeps apart."""
    if not op.keep_own:
        return set()
    norms = norm_parameters(program)
    parts: dict[str, set[str]] = {"norm": set(), "bias": set()}
    roles = {s.role: s for s in layers}
    for role, names in own.items():
        first = {n: program.aliases.get(full, full) for n, full in names.items()}
        parts["norm"] |= {n for n in names if first[n] in norms or names[n] in norms}
        parts["bias"] |= {n for n in names if n.rpartition(".")[2] == "bias"}
        for site in program.anatomy.sites:
            if site.stack != roles[role].stack or site.layer != roles[role].layer or site.role == role:
                continue
            inside = {*site.parameters, site.weight, site.bias} - {""}
            mine = {n for n in names if first[n] in inside}
            steps = [name for name, _ in split_role(site.role[len(role) + 1 :])]
            if site.bias:
                parts["bias"] |= {n for n in names if first[n] == site.bias}
            for word in {steps[-1], ".".join(steps)}:
                parts.setdefault(word, set()).update(mine)
    found: set[str] = set()
    for part in op.keep_own:
        inside = parts.get(part, set())
        if not inside:
            known = sorted(p for p, names in parts.items() if names)
            close = near(part, known)
            raise fail(
                "S0488", f"these layers have no part `{part}` to keep", op.origin.span, "kept here",
                notes=[f"there is: {', '.join(known)}"], help=f"did you mean {quoted(close)}?" if close else "keep one of these, or leave the clause out",
            )  # fmt: skip
        found |= inside
    return found


def _common(
    program: Program, op: Resolved, group: Sequence[Site], own: dict[str, dict[str, str]], kept: set[str], notes: dict[str, list[str]]
) -> list[str]:
    """The names that every layer of a group has. One layer may have more (it keeps them); that two differ both ways is refused."""
    sets = {s.role: set(own[s.role]) - kept for s in group}
    common = set.intersection(*sets.values())
    ranked = sorted(group, key=lambda s: -len(sets[s.role]))
    for a in ranked:
        for b in ranked:
            here, there = sets[a.role] - sets[b.role], sets[b.role] - sets[a.role]
            if here and there:
                raise fail(
                    "S0483", f"{a.role} and {b.role} are made of different parts", op.origin.span, "selected here",
                    notes=[f"only in {a.role}: {_some(here)}", f"only in {b.role}: {_some(there)}"],
                    help="share layers of one kind, or keep the parts that differ apart with `keep own`",
                )  # fmt: skip
    if not common:
        raise fail("S0483", "nothing is left to share", op.origin.span, "keeps everything apart", help="keep less apart with `keep own`")
    for site in group:
        more = sets[site.role] - common
        if more:
            notes[site.role].append(f"{_some(more)} of {site.role} stays its own: not every layer of its group has it")
    return [n for n in own[group[0].role] if n in common]


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "")


def _agree(program: Program, op: Resolved, group: Sequence[Site], names: Sequence[str], own: dict[str, dict[str, str]]) -> None:
    """Shapes, heads, earlier ties, adapters and masks of a group."""
    first = group[0]
    for name in names:
        exprs = [program.weights[program.aliases.get(own[s.role][name], own[s.role][name])] for s in group]
        for site, expr in zip(group, exprs, strict=True):
            if (expr.shape, expr.dtype) != (exprs[0].shape, exprs[0].dtype):
                made = _changed(program, [own[s.role][name] for s in (first, site)])
                raise _differ(op, first, site, name, _form(exprs[0]), _form(expr), made)
    for site in group[1:]:
        for a, b in _blocks(program, first, site):
            mine, other = (a.heads, a.kv_heads), (b.heads, b.kv_heads)
            if mine != other:
                made = _changed(program, [*a.parameters, *b.parameters])
                raise _differ(op, first, site, a.role.removeprefix(first.role + "."), f"heads {mine}", f"heads {other}", made)
    inside = dict.fromkeys(own[s.role][n] for s in group for n in names)
    for full in inside:
        others = _names_of(program, full) - inside.keys()
        if others:
            origin = next((o for o in reversed(program.journal.of(full)) if o.verb == "share" and o.span.end), None)
            raise fail(
                "S0485", f"{full} is shared with {_some(others)} already, which is not in its group here", op.origin.span, "shared again",
                also=[(origin.span, "shared here")] if origin else (), help="put all layers that are to share into one group of one statement",
            )  # fmt: skip
    shared = {program.aliases.get(n, n) for n in inside}
    for added in program.attachments:
        if added.method.kind == "delta" and program.aliases.get(added.site.weight, added.site.weight) in shared:
            raise fail(
                "S0486", f"{added.name} on {added.site.role} was made for a weight that this statement would replace", op.origin.span, "shared here",
                also=[(added.origin.span, f"{added.name} is attached here")], help=f"share first: put this statement above `{added.origin.verb} {added.method.name}`",
            )  # fmt: skip
    hidden = [n for n in inside if masked.mask_of(program, n) is not None]
    if hidden and op.method.params()["weights"] == "mean":
        raise fail(
            "S0487", f"the mean of masked weights has other zeros than their masks: {_some(hidden)}", span_of(op, "weights"), "averaged here",
            help="write `weights = first`, which keeps the first layer's mask, or share first and `prune mask` afterwards",
        )  # fmt: skip


def _changed(program: Program, names: Iterable[str]) -> Origin | None:
    """The last statement of this spec that made one of some tensors what it is."""
    every = [o for n in names for o in program.journal.of(program.aliases.get(n, n)) if o.span.end]
    return max(every, key=lambda o: o.span.start, default=None)


def _differ(op: Resolved, a: Site, b: Site, name: str, first: str, second: str, made: Origin | None) -> Exception:
    return fail(
        "S0484", f"{a.role} and {b.role} cannot share: {name} is {first} in one and {second} in the other", op.origin.span, "one group",
        also=[(made.span, f"`{made.verb} {made.method}` changes one of them here")] if made is not None else (),
        help="share layers of equal shape, prune them alike first, or keep the part apart with `keep own`",
    )  # fmt: skip


def _form(expr: Expr) -> str:
    return f"{expr.dtype}[{', '.join(str(n) for n in expr.shape)}]"


def _blocks(program: Program, a: Site, b: Site) -> list[tuple[Site, Site]]:
    by_role = {s.role: s for s in program.anatomy.sites if s.is_region}
    pairs = []
    for role, site in by_role.items():
        if role.startswith(a.role + "."):
            other = by_role.get(b.role + role[len(a.role) :])
            if other is not None:
                pairs.append((site, other))
    return pairs


def _names_of(program: Program, name: str) -> set[str]:
    first = program.aliases.get(name, name)
    return {first, *(k for k, v in program.aliases.items() if v == first)}


# ------------------------------------------------------------------ how


def _weights(program: Program, op: Resolved, members: Sequence[str]) -> Expr:
    """The value that wins: the first layer's, the last layer's, or the mean (added in float32 at least, rounded once)."""
    exprs = [program.weights[program.aliases.get(n, n)] for n in members]
    which = op.method.params()["weights"]
    if which != "mean":
        return exprs[0] if which == "first" else exprs[-1]
    distinct = {e.identity for e in exprs}
    if len(distinct) == 1:
        return exprs[0]
    wide = "float64" if exprs[0].dtype == "float64" else "float32"
    shape = exprs[0].shape
    total = Add(shape, wide, tuple(cast(e, wide) for e in exprs))
    mean = Scale(shape, wide, total, 1.0 / len(exprs))
    return mean if wide == exprs[0].dtype else Cast(shape, exprs[0].dtype, mean)


def _tie(program: Program, op: Resolved, members: Sequence[str], expr: Expr) -> bool:
    """One tensor under the names ``members``, in the place of the first; True when it trains though some of them were frozen."""
    first = members[0]
    frozen = [program.aliases.get(n, n) in program.frozen for n in members]
    source = members[-1] if op.method.params()["weights"] == "last" else first
    keep = masked.mask_of(program, source)
    for name in members:
        _drop_mask(program, name)
    for name in members:
        program.aliases.pop(name, None)
        program.frozen.discard(name)
        if name != first:
            program.weights.pop(name, None)
    program.weights[first] = expr
    program.aliases.update({n: first for n in members[1:]})
    if all(frozen):
        program.frozen.add(first)
    parameter = program.graph.get_parameter(first)
    for name in members[1:]:
        owner, _, leaf = name.rpartition(".")
        program.module(owner)._parameters[leaf] = parameter
    if keep is not None:
        masked.set_mask(program, members, keep, op.origin)
        masked.in_order(program)
    for name in members:
        program.journal.record(name, op.origin)
    return any(frozen) and not all(frozen)


def _drop_mask(program: Program, name: str) -> None:
    owner, _, leaf = name.rpartition(".")
    module = program.module(owner)
    if leaf + masked.SUFFIX in module._modules:
        delattr(module, leaf + masked.SUFFIX)
        attach.drop_tensor(program, masked.mask_name(name))


def _claim(before: Program, stated: dict[str, Expr], after: Program, op: Resolved) -> Claim:
    """``shared = each layer with these weights``: the program before with the stated values written into every layer."""
    for name, expr in stated.items():
        before.weights[before.aliases.get(name, name)] = expr
    return Claim(
        "shared = each layer with these weights", before, outputs_of(before), outputs_of(after), tolerance=1e-6, span=op.origin.span
    )
